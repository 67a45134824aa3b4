/*
 * The inside of the fault server: what its loop (faultserver.c), bringing pages (faultplace.c, faultput.c) and waking
 * (faultwake.c) share.
 */
#ifndef VHOSTUSER_FAULT_H
#define VHOSTUSER_FAULT_H

#include <pthread.h>

#include "core.h"

enum { VU_FAULT_BATCH = 64, VU_FAULT_COUNTERS = sizeof(struct vu_client_stats) / sizeof(uint64_t) };

/* A region of guest memory. */
struct vu_fault_part {
    struct vu_fault_region region;
    uint64_t first, pages; /* numbers of its pages: [first, first + pages) */
    unsigned shift;        /* page size: 1 << shift */
    uint8_t *alias;        /* a second mapping of its file, where a write needs one */
};

/* A region, or some pages of one, where a client has it. */
struct vu_client_span {
    uint64_t host, first, pages;
    const struct vu_fault_part *part;
};

/* Belongs to whoever holds the client's number (vu_pages_hold), and at last to who learns that nobody does. */
struct vu_fault_client {
    int uffd, channel;
    uint32_t ranges; /* of a message of the channel, at most */
    uint32_t span_count;
    struct vu_client_span *spans;
    _Atomic unsigned state;                       /* see faultclient.c */
    atomic_bool silent;                           /* the channel is of no use any more */
    _Atomic uint64_t messages;                    /* sent by the channel */
    _Atomic uint64_t counters[VU_FAULT_COUNTERS]; /* in the order of struct vu_client_stats */
};

struct vu_fault_record {
    pthread_mutex_t lock; /* of what follows */
    uint64_t last;        /* sequence number of the last event */
    uint32_t size;        /* a power of two, or 0: nothing is recorded */
    struct vu_fault_event *events;
};

struct vu_faults {
    struct vu_fault_config config;
    vu_pages *pages;
    uint32_t part_count;
    struct vu_fault_part *parts;
    struct vu_fault_client clients[VU_PAGES_CLIENTS];
    struct vu_fault_record record;
    uint8_t *zeros;   /* a page of them, where the kernel has no UFFDIO_ZEROPAGE */
    int epoll;
    bool mapped;      /* the source is mapped: the loop places pages itself */
    uint64_t total;   /* pages */
    _Atomic uint64_t settled;
    atomic_bool paused, stopping;
    _Atomic uint64_t placed, demanded, zero, duplicates, present, requests, error;
};

#define VU_CLIENT_COUNTER(name) (offsetof(struct vu_client_stats, name) / sizeof(uint64_t))

static inline void vu_fault_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

#define VU_CLIENT_COUNT(client, name, n) vu_fault_count(&(client)->counters[VU_CLIENT_COUNTER(name)], (n))

/* The part of a page, and its addresses. */
const struct vu_fault_part *vu_fault_part_of(const struct vu_faults *server, uint64_t page);
static inline uint64_t vu_fault_guest(const struct vu_fault_part *part, uint64_t page)
{
    return part->region.guest + ((page - part->first) << part->shift);
}

/* ---- the record (faultrecord.c) ---------------------------------------------------------------------------------- */
int vu_record_open(struct vu_fault_record *record, uint32_t size);
void vu_record_close(struct vu_fault_record *record);
/* One event, if there is a record; from any thread. */
void vu_record_add(struct vu_faults *server, uint32_t kind, uint32_t client, uint64_t page, uint64_t count,
                   uint64_t ns);

/* ---- bringing pages (faultplace.c) ------------------------------------------------------------------------------- */
/* Has those that are missing asked for: by the loop, or by the source. */
void vu_fault_ask(struct vu_faults *server);
/* Places what clients wait for, from a mapped source; until a pause. */
void vu_fault_place_wanted(struct vu_faults *server);
/* Gives up the pages in [from, end) of one part that are missing; how many those were. */
uint64_t vu_fault_lose(struct vu_faults *server, uint64_t from, uint64_t end);

/* ---- placing (faultput.c) ---------------------------------------------------------------------------------------- */
int vu_put_open(struct vu_faults *server);
void vu_put_close(struct vu_faults *server);
/* Puts pages of a part where clients can find them; data NULL: zeros. 0, or a negative code and errno: some or none of
 * them are put. */
int vu_put_pages(struct vu_faults *server, const struct vu_fault_part *part, uint64_t first, uint64_t count,
                 const uint8_t *data);
/* Zeros, unless something is there: by other means than a write into the file, which would write over it. */
void vu_put_hole(struct vu_faults *server, const struct vu_fault_part *part, uint64_t page);

/* ---- waking (faultwake.c) ---------------------------------------------------------------------------------------- */
enum vu_wake_kind { VU_WAKE_PRESENT, VU_WAKE_LOST };
/* Wakes the waits' clients, each of which is held, and releases them. */
void vu_wake_waits(struct vu_faults *server, struct vu_wait *waits, uint32_t count, enum vu_wake_kind kind);
/* Wakes for pages of a part every client that does not wait. */
void vu_wake_all(struct vu_faults *server, uint64_t first, uint64_t count, const struct vu_wait *waits,
                 uint32_t waited);
/* Everything that a client has: whoever waits looks again. The client is held. */
void vu_wake_everything(struct vu_fault_client *client);
/* Reads what the back-end has acknowledged; false: it has closed the channel. */
bool vu_wake_acknowledged(struct vu_fault_client *client);

/* ---- clients (faultclient.c) ------------------------------------------------------------------------------------- */
#define VU_CHANNEL_EVENT (1ull << 32) /* in epoll's data beside a client's number: its channel, not its userfaultfd */
/* Forgets the client of an ended process; more than once does no harm. The caller holds it. */
void vu_client_gone(struct vu_faults *server, uint32_t number);
/* Ends a hold; closes the client if it has left and this was the last. */
void vu_client_release(struct vu_faults *server, uint32_t number);
/* The page of an address of the client, or -1. */
int64_t vu_client_page(const struct vu_fault_client *client, uint64_t address);
/* Where the client has a page; 0: nowhere. */
uint64_t vu_client_address(const struct vu_fault_client *client, uint64_t page);

#endif
