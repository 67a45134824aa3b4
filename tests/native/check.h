/*
 * What every program in this directory needs: to end where something is wrong, and random numbers.
 */
#ifndef VHOSTUSER_TEST_CHECK_H
#define VHOSTUSER_TEST_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

/* xorshift64*: the same sequence on every machine. */
static uint64_t state;

static inline uint64_t any(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * UINT64_C(2685821657736338717);
}

static inline uint64_t below(uint64_t limit)
{
    return any() % limit;
}

#endif
