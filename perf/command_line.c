#include "command_line.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "relu, swiglu, gelu" */
static void list_words(const option_t *o, char *text, size_t size)
{
    int length = 0;
    text[0] = '\0';
    for (int i = 0; o->words[i] && length < (int)size; i++) {
        length += snprintf(text + length, size - (size_t)length, "%s%s", i ? ", " : "", o->words[i]);
    }
}

static _Noreturn void help(const program_t *program)
{
    printf("%s: %s\n\n", program->name, program->about);
    for (int i = 0; i < program->count; i++) {
        const option_t *o = &program->options[i];
        char words[400];
        printf("  --%-14s %s", o->name, o->text);
        if (o->choice) {
            list_words(o, words, sizeof words);
            printf(":\n%19s%s", "", words);
        }
        if (o->number) printf(" (default %d)", *o->number);
        if (o->choice && *o->choice >= 0) printf(" (default %s)", o->words[*o->choice]);
        puts("");
    }
    puts("  --help           this text");
    exit(EXIT_SUCCESS);
}

_Noreturn void command_line_fail(const program_t *program, const char *option, const char *value, const char *rule)
{
    fprintf(stderr, "%s: %s%s%s: %s; see --help\n", program->name, option, value ? " " : "", value ? value : "",
            rule);
    exit(2);
}

static void read_number(const program_t *program, const option_t *o, const char *argument, const char *text)
{
    char *end, rule[100];
    const long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < o->min || value > o->max) {
        snprintf(rule, sizeof rule, "must be a whole number, %d..%d", o->min, o->max);
        command_line_fail(program, argument, text, rule);
    }
    *o->number = (int)value;
}

static void read_choice(const program_t *program, const option_t *o, const char *argument, const char *text)
{
    for (int i = 0; o->words[i]; i++) {
        if (strcmp(text, o->words[i]) == 0) {
            *o->choice = i;
            return;
        }
    }
    char words[400], rule[420];
    list_words(o, words, sizeof words);
    snprintf(rule, sizeof rule, "must be one of %s", words);
    command_line_fail(program, argument, text, rule);
}

void command_line_read(const program_t *program, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i];
        const option_t *o = NULL;
        if (strcmp(argument, "--help") == 0) help(program);
        for (int n = 0; n < program->count && strncmp(argument, "--", 2) == 0; n++) {
            if (strcmp(argument + 2, program->options[n].name) == 0) o = &program->options[n];
        }
        if (!o) command_line_fail(program, argument, NULL, "no such option");
        if (o->flag) {
            *o->flag = 1;
            continue;
        }
        if (++i == argc) command_line_fail(program, argument, NULL, "needs a value");
        if (o->number) read_number(program, o, argument, argv[i]);
        if (o->choice) read_choice(program, o, argument, argv[i]);
        if (o->string) *o->string = argv[i];
    }
}
