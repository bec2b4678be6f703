#include "command_line.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MANY_WORDS = 12, LONGEST_WORD = 40 };

static int min_of(int a, int b)
{
    return a < b ? a : b;
}

/* Letters to change, add or take away until a is how b begins: the distance of Levenshtein, row by row. */
static int distance(const char *a, const char *b)
{
    int row[LONGEST_WORD + 1];
    const int length = min_of((int)strlen(b), LONGEST_WORD);
    for (int j = 0; j <= length; j++) row[j] = j;
    for (int i = 0; a[i]; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 1; j <= length; j++) {
            const int above = row[j];
            row[j] = min_of(diagonal + (a[i] != b[j - 1]), min_of(above, row[j - 1]) + 1);
            diagonal = above;
        }
    }
    int nearest = LONGEST_WORD;
    for (int j = 0; j <= length; j++) nearest = min_of(nearest, row[j]);
    return nearest;
}

/* "relu, swiglu, gelu": all words, or of many those nearest to word. */
static void list_words(const char *const *words, const char *word, char *text, size_t size)
{
    int count = 0, nearest = LONGEST_WORD, length = 0;
    for (; words[count]; count++) {
        if (word) nearest = min_of(nearest, distance(word, words[count]));
    }
    text[0] = '\0';
    for (int i = 0; i < count && length < (int)size; i++) {
        if (word && count > MANY_WORDS && distance(word, words[i]) > nearest) continue;
        length += snprintf(text + length, size - (size_t)length, "%s%s", length ? ", " : "", words[i]);
    }
}

/* Behind an option's text, on lines of their own. */
static void print_wrapped(const char *words)
{
    enum { INDENT = 19, WIDTH = 100 };
    putchar(':');
    for (int column = WIDTH; *words;) {
        const int length = (int)strcspn(words, " ") + 1;
        if (column + length > WIDTH) column = printf("\n%*s", INDENT, "") - 1;
        column += printf("%.*s", length, words);
        words += strspn(words + length - 1, " ") + (size_t)length - 1;
    }
}

static _Noreturn void help(const program_t *program)
{
    printf("%s: %s\n\n", program->name, program->about);
    for (int i = 0; i < program->count; i++) {
        const option_t *o = &program->options[i];
        char words[800];
        printf("  --%-14s %s", o->name, o->text);
        if (o->choice) {
            list_words(o->words, NULL, words, sizeof words);
            print_wrapped(words);
        }
        const int least = o->number ? o->min : 0, *value = o->number ? o->number : o->choice;
        const int values = o->count ? *o->count : value && *value >= least;
        for (int v = 0; v < values; v++) {
            fputs(v ? "," : " (default ", stdout);
            o->number ? printf("%d", o->number[v]) : printf("%s", o->words[o->choice[v]]);
        }
        puts(values ? ")" : "");
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

int command_line_find(const program_t *program, const char *what, const char *word, const char *const *words)
{
    for (int i = 0; words[i]; i++) {
        if (strcmp(word, words[i]) == 0) return i;
    }
    char list[800], rule[840];
    int count = 0;
    while (words[count]) count++;
    list_words(words, word, list, sizeof list);
    snprintf(rule, sizeof rule,
             count > MANY_WORDS ? "there is none of that name; near it: %s" : "must be one of %s", list);
    command_line_fail(program, what, word, rule);
}

static int read_number(const program_t *program, const option_t *o, const char *argument, const char *text)
{
    char *end, rule[100];
    const long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < o->min || value > o->max) {
        snprintf(rule, sizeof rule, "must be a whole number, %d..%d", o->min, o->max);
        command_line_fail(program, argument, text, rule);
    }
    return (int)value;
}

static void read_value(const program_t *program, const option_t *o, const char *argument, const char *text,
                       int place)
{
    if (o->number) o->number[place] = read_number(program, o, argument, text);
    if (o->choice) o->choice[place] = command_line_find(program, argument, text, o->words);
}

static void read_list(const program_t *program, const option_t *o, const char *argument, const char *text)
{
    char word[LONGEST_WORD + 1];
    *o->count = 0;
    do {
        const size_t length = strcspn(text, ",");
        if (*o->count == o->most || length > LONGEST_WORD)
            command_line_fail(program, argument, text, "is too long a list");
        memcpy(word, text, length);
        word[length] = '\0';
        read_value(program, o, argument, word, (*o->count)++);
        text += length;
    } while (*text++ == ',');
}

static const option_t *find_option(const program_t *program, const char *argument)
{
    const char *names[64] = {NULL};
    char near[200], rule[240];
    for (int i = 0; i < program->count; i++) {
        names[i] = program->options[i].name;
        if (strncmp(argument, "--", 2) == 0 && strcmp(argument + 2, names[i]) == 0) return &program->options[i];
    }
    list_words(names, argument + strspn(argument, "-"), near, sizeof near);
    snprintf(rule, sizeof rule, "no such option; near it: %s", near);
    command_line_fail(program, argument, NULL, rule);
}

void command_line_read(const program_t *program, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i];
        if (strcmp(argument, "--help") == 0) help(program);
        const option_t *o = find_option(program, argument);
        if (o->flag) {
            *o->flag = 1;
            continue;
        }
        if (++i == argc) command_line_fail(program, argument, NULL, "needs a value");
        if (o->string) *o->string = argv[i];
        o->count ? read_list(program, o, argument, argv[i]) : read_value(program, o, argument, argv[i], 0);
    }
}
