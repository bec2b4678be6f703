/* Command lines of the programs in this folder: a table of options, --help made of it, one sentence for what is
 * wrong.
 */
#ifndef CUMOE_PERF_COMMAND_LINE_H
#define CUMOE_PERF_COMMAND_LINE_H

/* --name VALUE, or --name alone for a flag. Given twice, the last one counts. */
typedef struct option {
    const char *name; /* without dashes */
    const char *text; /* for --help */
    /* One of these takes the value. What stands in it before is the default. */
    int *number;              /* a whole number, min..max */
    int *choice;              /* the index of one of words, which NULL ends */
    int *flag;                /* 1 */
    const char **string;      /* anything */
    int *count;               /* number and choice are arrays that take a list, a,b,c, and this its length */
    int most;                 /* the longest list */
    int min, max;             /* of number */
    const char *const *words; /* of choice */
} option_t;

typedef struct program {
    const char *name;
    const char *about; /* what --help says above the options */
    const option_t *options;
    int count;
} program_t;

/* Ends the program after --help, and with command_line_fail() where something is wrong. */
void command_line_read(const program_t *program, int argc, char **argv);

/* The index of a word; ends the program if there is none, with what is near it. what: "--shape" */
int command_line_find(const program_t *program, const char *what, const char *word, const char *const *words);

/* A sentence on stderr, and status 2. value may be NULL. */
_Noreturn void command_line_fail(const program_t *program, const char *option, const char *value, const char *rule);

#endif
