#include "host/error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

cumoe_status_t cumoe__fail(cumoe_status_t status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *cumoe_last_error(void)
{
    return last_error;
}

const char *cumoe_status_name(cumoe_status_t status)
{
    switch (status) {
#define ENTRY(name, value, text)                                                                                   \
    case CUMOE_##name:                                                                                             \
        return "CUMOE_" #name;
        CUMOE_STATUS_MAP(ENTRY)
#undef ENTRY
    default:
        return "CUMOE_UNKNOWN_STATUS";
    }
}

int cumoe_version(void)
{
    return CUMOE_VERSION;
}
