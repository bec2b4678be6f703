/* The data: texts as numbers, cut into training and held-out characters, and batches of contexts out of them. */
#ifndef TEXT_H
#define TEXT_H

#include <stdint.h>

enum {
    WINDOW = 10,         /* characters that the model sees */
    BLOCK = 2000,        /* the texts are cut into blocks of so many characters, and of every */
    HELD_OUT_EVERY = 20, /* so many blocks one is held out; the first WINDOW of a block are context only */
    MAX_TEXTS = 8,
    MIN_CHARACTERS = 100000
};

typedef struct text {
    int num_texts;
    char name[MAX_TEXTS][32];     /* file names without folder and suffix, letters and digits of them */
    int64_t start[MAX_TEXTS + 1]; /* text i is symbol[start[i]] .. symbol[start[i+1] - 1] */

    int symbols;                 /* V: distinct characters (bytes) */
    unsigned char alphabet[256]; /* [V] symbol -> byte */
    uint8_t *symbol;             /* [start[num_texts]] */

    int64_t num_train, num_held_out;
    int32_t *train, *held_out; /* positions of the characters to predict, ascending */
} text_t;

/* A batch: the window before each of some positions, nearest character first, and the character that stands there.
 */
typedef struct batch {
    int64_t size;
    int64_t first,
        all;          /* of a batch that ranks share out: where this part begins, and the characters of all parts */
    uint8_t *context; /* [size, WINDOW] */
    uint8_t *target;  /* [size] */
} batch_t;

/* Read files; ends the program with a sentence if one cannot be read, or all together are too short. */
void text_load(text_t *text, int num_paths, const char *const *paths);
void text_free(text_t *text);

/* The text to which a position belongs. */
int text_of(const text_t *text, int64_t position);

batch_t batch_create(int64_t capacity);
void batch_fill(batch_t *batch, const text_t *text, const int32_t *position, int64_t size);
/* The part of rank of num_ranks, as even as can be. */
void batch_fill_part(batch_t *batch, const text_t *text, const int32_t *position, int64_t size, int rank,
                     int num_ranks);
void batch_free(batch_t *batch);

/* A copy of the training positions in random order. The caller frees it. */
int32_t *text_shuffled(const text_t *text, uint64_t seed);

/* The next number of a sequence that starts from any *state (splitmix64). */
uint64_t random_next(uint64_t *state);

#endif
