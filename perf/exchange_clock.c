/* Time on several ranks: all begin a sample together, and it takes as long as the slowest does. What one rank
 * decides by the clock, all decide alike, by the largest of their clocks. */
#include "exchange.h"

#include <math.h>
#include <string.h>

typedef struct timing {
    share_t *share;
    int calls[TIMED]; /* of a sample; 0 = not timed */
    double sample[TIMED + 2][MOST_ROUNDS];
} timing_t;

static double seconds_of(const timing_t *c, int timed, int calls)
{
    double seconds = 0;
    device_t *device = &c->share->rank->device;
    rank_max(c->share->rank, &seconds, 1); /* all are here */
    device_start_clock(device);
    for (int i = 0; i < calls; i++) share_enqueue(c->share, timed);
    seconds = device_stop_clock(device);
    rank_max(c->share->rank, &seconds, 1);
    return seconds;
}

static int calls_of(const timing_t *c, int timed)
{
    int calls = -1;
    while (calls < 0) calls = clock_calls(-calls, seconds_of(c, timed, -calls), MOST_CALLS);
    return calls;
}

/* Seconds of a call of each. */
static double run_round(timing_t *c, int round)
{
    double sum = 0;
    for (int timed = 0; timed < TIMED; timed++) {
        if (c->calls[timed] > 0)
            sum += c->sample[timed][round] = seconds_of(c, timed, c->calls[timed]) / c->calls[timed];
    }
    return sum;
}

static bool is_settled(const timing_t *c, int rounds)
{
    for (int timed = 0; timed < TIMED; timed++)
        if (c->calls[timed] > 0 && !clock_settled(c->sample[timed], rounds)) return false;
    return true;
}

static bool is_timed(const subject_t *s, int timed)
{
    const bool back = timed == RANKS_BACKWARD || timed == EXPERTS_BACKWARD;
    return timed == ROWS || has_part(s, back ? BACKWARD : FORWARD) || has_part(s, BOTH);
}

static double elapsed(const timing_t *c, double begin)
{
    double seconds = clock_now() - begin;
    rank_max(c->share->rank, &seconds, 1);
    return seconds;
}

/* From samples, which are then sorted, to times. */
static void summarize(timing_t *c, int rounds, times_t times[TIMED + 2])
{
    for (int both = RANKS_BOTH; both <= EXPERTS_BOTH; both++) {
        const int forward = both == RANKS_BOTH ? RANKS_FORWARD : EXPERTS_FORWARD;
        for (int i = 0; i < rounds; i++) c->sample[both][i] = c->sample[forward][i] + c->sample[forward + 1][i];
    }
    for (int timed = 0; timed < TIMED + 2; timed++) {
        const bool sum = timed >= TIMED;
        if (sum ? !has_part(c->share->subject, BOTH) : !c->calls[timed]) continue;
        times[timed] = (times_t){.samples = rounds,
                                 .calls = sum ? 1 : c->calls[timed],
                                 .seconds = clock_spread(c->sample[timed], rounds)};
    }
}

void exchange_clock(share_t *share, double seconds, exchange_t *exchange, void (*progress)(void *, const char *),
                    void *context)
{
    const double begin = clock_now();
    const bool once = seconds == 0, shown = share->rank->number == 0;
    timing_t c = {.share = share};
    if (shown) progress(context, "warm-up");
    for (int timed = 0; timed < TIMED; timed++) {
        if (is_timed(share->subject, timed)) c.calls[timed] = once ? 1 : calls_of(&c, timed);
    }
    double before = 0;
    for (int round = 0; !once && round < WARM_UP_ROUNDS && elapsed(&c, begin) < seconds / 3; round++) {
        const double sum = run_round(&c, 0);
        if (before > 0 && fabs(sum - before) <= 0.02 * before) break;
        before = sum;
    }
    int rounds = 0;
    while (rounds < (once ? 1 : MOST_ROUNDS)) {
        char text[40];
        snprintf(text, sizeof text, "round %d", rounds + 1);
        if (shown) progress(context, text);
        run_round(&c, rounds++);
        if (rounds >= FEWEST_ROUNDS && elapsed(&c, begin) > seconds) break;
        if (rounds >= SETTLED_ROUNDS && is_settled(&c, rounds)) break;
    }
    memset(exchange->times, 0, sizeof exchange->times);
    summarize(&c, rounds, exchange->times);
}

double exchange_link(rank_t *rank)
{
    enum { ROUNDS = 8 };
    const int32_t W = rank->count;
    const size_t all = rank->device.cpu ? (size_t)1 << 28 : (size_t)1 << 30, /* of those that share memory */
        row = (all / (size_t)W / (size_t)rank->beside + 15) / 16 * 16;
    memory_t m = {.device = &rank->device};
    void *out = memory_take(&m, W, row), *in = memory_take(&m, W, row);
    char why[200] = "";
    double best = INFINITY;
    int64_t one[1024];
    for (int32_t r = 0; r < W; r++) one[r] = 1;
    const bool room = rank_agree(rank, !m.failed, why, sizeof why);
    for (int round = 0; room && round < ROUNDS; round++) {
        double seconds = 0;
        rank_max(rank, &seconds, 1);
        device_start_clock(&rank->device);
        rank_exchange(rank, out, one, in, one, row);
        seconds = device_stop_clock(&rank->device);
        rank_max(rank, &seconds, 1);
        if (round > 0 && seconds < best) best = seconds;
    }
    memory_free(&m);
    const double rate = (double)row * W / best;
    return W > 1 ? rate * (W - 1) / W : rate;
}
