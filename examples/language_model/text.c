#include "text.h"

#include "device.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A name that tables and pictures can show: other characters become '-'. */
static void name_text(char *name, size_t size, const char *path)
{
    const char *slash = strrchr(path, '/'), *from = slash ? slash + 1 : path;
    size_t i = 0;
    for (; i + 1 < size && from[i] && from[i] != '.'; i++)
        name[i] = isalnum((unsigned char)from[i]) ? from[i] : '-';
    name[i] = 0;
}

/* Append a file to the bytes read so far. */
static void append_file(text_t *text, const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) die("cannot read the text %s: %s", path, strerror(errno));
    int64_t length = text->start[text->num_texts], capacity = length;
    size_t got;
    do {
        if (length + BUFSIZ > capacity) {
            capacity = 2 * capacity + BUFSIZ;
            text->symbol = realloc(text->symbol, (size_t)capacity);
            if (!text->symbol) die("out of memory while reading %s", path);
        }
        got = fread(text->symbol + length, 1, BUFSIZ, file);
        length += (int64_t)got;
        if (length > INT_MAX) die("the texts are longer than 2^31 characters, with %s", path);
    } while (got > 0);
    if (ferror(file)) die("cannot read the text %s: %s", path, strerror(errno));
    fclose(file);
    if (length == text->start[text->num_texts]) die("the text %s is empty", path);

    name_text(text->name[text->num_texts], sizeof text->name[0], path);
    text->start[++text->num_texts] = length;
}

/* Bytes become symbols 0..V-1, in the order of their codes. */
static void number_characters(text_t *text)
{
    uint8_t symbol_of[256] = {0};
    const int64_t length = text->start[text->num_texts];
    for (int64_t i = 0; i < length; i++) symbol_of[text->symbol[i]] = 1;
    for (int byte = 0; byte < 256; byte++)
        if (symbol_of[byte]) {
            symbol_of[byte] = (uint8_t)text->symbols;
            text->alphabet[text->symbols++] = (unsigned char)byte;
        }
    for (int64_t i = 0; i < length; i++) text->symbol[i] = symbol_of[text->symbol[i]];
}

static void split(text_t *text)
{
    const size_t length = (size_t)text->start[text->num_texts];
    text->train = host_alloc(length, sizeof *text->train);
    text->held_out = host_alloc(length, sizeof *text->held_out);
    for (int i = 0; i < text->num_texts; i++)
        for (int64_t position = text->start[i] + WINDOW; position < text->start[i + 1]; position++) {
            if (position % BLOCK < WINDOW) continue;
            if (position / BLOCK % HELD_OUT_EVERY == HELD_OUT_EVERY / 2)
                text->held_out[text->num_held_out++] = (int32_t)position;
            else
                text->train[text->num_train++] = (int32_t)position;
        }
}

void text_load(text_t *text, int num_paths, const char *const *paths)
{
    *text = (text_t){0};
    for (int i = 0; i < num_paths; i++) append_file(text, paths[i]);
    if (text->start[num_paths] < MIN_CHARACTERS)
        die("the text is too short: %lld characters, but at least %d are needed", (long long)text->start[num_paths],
            MIN_CHARACTERS);
    number_characters(text);
    split(text);
}

void text_free(text_t *text)
{
    free(text->symbol);
    free(text->train);
    free(text->held_out);
    *text = (text_t){0};
}

int text_of(const text_t *text, int64_t position)
{
    int i = 0;
    while (position >= text->start[i + 1]) i++;
    return i;
}

batch_t batch_create(int64_t capacity)
{
    return (batch_t){.context = host_alloc((size_t)capacity, WINDOW), .target = host_alloc((size_t)capacity, 1)};
}

void batch_fill(batch_t *batch, const text_t *text, const int32_t *position, int64_t size)
{
    batch->size = batch->all = size;
    batch->first = 0;
    for (int64_t t = 0; t < size; t++) {
        const uint8_t *here = text->symbol + position[t];
        for (int j = 0; j < WINDOW; j++) batch->context[t * WINDOW + j] = here[-1 - j];
        batch->target[t] = *here;
    }
}

void batch_fill_part(batch_t *batch, const text_t *text, const int32_t *position, int64_t size, int rank,
                     int num_ranks)
{
    const int64_t first = size * rank / num_ranks;
    batch_fill(batch, text, position + first, size * (rank + 1) / num_ranks - first);
    batch->first = first;
    batch->all = size;
}

void batch_free(batch_t *batch)
{
    free(batch->context);
    free(batch->target);
    *batch = (batch_t){0};
}

uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
}

int32_t *text_shuffled(const text_t *text, uint64_t seed)
{
    int32_t *order = host_alloc((size_t)text->num_train, sizeof *order);
    memcpy(order, text->train, (size_t)text->num_train * sizeof *order);
    for (int64_t i = text->num_train - 1; i > 0; i--) {
        int64_t j = (int64_t)(random_next(&seed) % (uint64_t)(i + 1));
        int32_t swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    return order;
}
