/*
 * Who is behind which port of a bridge.
 *
 * What belongs here: a table of addresses that is bounded, forgets who is silent (IEEE 802.1D, 7.9) and needs no lock. What
 * does not: which frames are forwarded (hub.c), the clock: the time is an argument.
 */
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum {
    WAYS = 8,
    SETS = 512, /* a power of two */
    SHARE = WAYS / 2,
};

_Static_assert(WAYS * SETS == VU_STATIONS, "as api.h says");

/* One word is one fact, so that threads need not agree: at worst a frame goes to more ports than it must. */
struct station {
    _Atomic uint64_t known; /* address << 16 | port + 1; 0: nobody */
    _Atomic uint32_t seen;  /* when, in seconds */
};

struct vu_stations {
    uint32_t ageing;
    struct station sets[SETS][WAYS];
};

static uint64_t packed(const uint8_t *address)
{
    uint64_t word = 0;
    memcpy((uint8_t *)&word, address, 6);
    return word;
}

static struct station *set_of(const vu_stations *stations, uint64_t address)
{
    return (struct station *)stations->sets[(address * 0x9E3779B97F4A7C15u) >> 55 & (SETS - 1)];
}

static uint64_t known(const struct station *station)
{
    return atomic_load_explicit(&station->known, memory_order_relaxed);
}

static uint32_t seen(const struct station *station)
{
    return atomic_load_explicit(&station->seen, memory_order_relaxed);
}

static uint32_t port_of(uint64_t known)
{
    return (uint32_t)(known & 0xffff) - 1;
}

/* Signed: another thread's clock may be ahead of the caller's. */
static bool fresh(const struct station *station, uint32_t ageing, uint32_t now)
{
    return (int32_t)(now - seen(station)) < (int32_t)ageing;
}

static struct station *older(struct station *one, struct station *other)
{
    return one && (int32_t)(seen(one) - seen(other)) <= 0 ? one : other;
}

/* Where the address is, or may be. A port that makes addresses up never has more than half of a set, whoever came first:
 * the stations of others find room in the rest. */
static struct station *place_for(struct station *set, uint64_t address, uint32_t port, uint32_t ageing, uint32_t now)
{
    struct station *vacant = NULL, *own = NULL, *oldest = NULL;
    uint32_t owned = 0;
    for (struct station *station = set; station < set + WAYS; station++) {
        uint64_t there = known(station);
        if (there >> 16 == address)
            return station;
        if (!there || !fresh(station, ageing, now)) {
            vacant = station;
            continue;
        }
        oldest = older(oldest, station);
        if (port_of(there) == port) {
            own = older(own, station);
            owned++;
        }
    }
    return owned >= SHARE ? own : vacant ? vacant : oldest;
}

/* Only what changes is written: ports that talk at the same time share these lines. */
void vu_stations_learn(vu_stations *stations, const uint8_t *address, uint32_t port, uint32_t now)
{
    uint64_t wanted = packed(address);
    struct station *station = place_for(set_of(stations, wanted), wanted, port, stations->ageing, now);
    wanted = wanted << 16 | (port + 1);
    if (known(station) != wanted)
        atomic_store_explicit(&station->known, wanted, memory_order_relaxed);
    if (seen(station) != now)
        atomic_store_explicit(&station->seen, now, memory_order_relaxed);
}

int vu_stations_find(const vu_stations *stations, const uint8_t *address, uint32_t now)
{
    uint64_t wanted = packed(address);
    struct station *set = set_of(stations, wanted);
    for (int i = 0; i < WAYS; i++) {
        uint64_t there = known(&set[i]);
        if (there && there >> 16 == wanted)
            return fresh(&set[i], stations->ageing, now) ? (int)port_of(there) : -1;
    }
    return -1;
}

void vu_stations_forget(vu_stations *stations, uint32_t port)
{
    struct station *all = stations->sets[0];
    for (uint32_t i = 0; i < VU_STATIONS; i++) {
        uint64_t there = known(&all[i]);
        if (there && port_of(there) == port) /* whoever is heard elsewhere meanwhile stays */
            atomic_compare_exchange_strong_explicit(&all[i].known, &there, 0, memory_order_relaxed, memory_order_relaxed);
    }
}

uint32_t vu_stations_count(const vu_stations *stations, uint32_t port, uint32_t now)
{
    const struct station *all = stations->sets[0];
    uint32_t count = 0;
    for (uint32_t i = 0; i < VU_STATIONS; i++)
        count += known(&all[i]) && port_of(known(&all[i])) == port && fresh(&all[i], stations->ageing, now);
    return count;
}

vu_stations *vu_stations_new(uint32_t ageing, int *error)
{
    vu_stations *stations = ageing <= INT32_MAX ? calloc(1, sizeof *stations) : NULL;
    if (stations)
        stations->ageing = ageing;
    else
        *error = ageing <= INT32_MAX ? VU_E_NOMEM : VU_E_SIZE;
    return stations;
}

void vu_stations_free(vu_stations *stations)
{
    free(stations);
}
