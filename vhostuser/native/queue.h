/*
 * The inside of a device-side queue: what queue.c (every format: pool, guard, copies) and the formats of rings
 * (split.c) share, and what the split format shares with its in-flight region (inflight.c).
 */
#ifndef VHOSTUSER_QUEUE_H
#define VHOSTUSER_QUEUE_H

#include "core.h"

/* ---- guest memory, each value loaded once -------------------------------------------------------------------- */

/* Everything in a split ring is little-endian: vhost-user peers share a machine, and this project supports
 * little-endian ones. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "split rings are read as little-endian");

static inline uint16_t vu_load16(const uint16_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static inline uint16_t vu_load16_acquire(const uint16_t *at)
{
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static inline void vu_store16(uint16_t *at, uint16_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

static inline void vu_store16_release(uint16_t *at, uint16_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

/* ---- the split ring in memory (virtio 1.2, 2.7) ---------------------------------------------------------------- */

#define VU_DESC_NEXT 1
#define VU_DESC_WRITE 2
#define VU_DESC_INDIRECT 4
#define VU_AVAIL_NO_INTERRUPT 1
#define VU_USED_NO_NOTIFY 1
#define VU_SPLIT_SIZE_MAX 32768

struct vu_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct vu_avail {
    uint16_t flags, idx;
    uint16_t ring[]; /* [size], then used_event */
};

struct vu_used_entry {
    uint32_t id, len;
};

struct vu_used {
    uint16_t flags, idx;
    struct vu_used_entry ring[]; /* [size], then avail_event */
};

static inline uint64_t vu_desc_bytes(uint32_t size)
{
    return 16 * (uint64_t)size;
}

/* With the event index field, which is there whether it was negotiated or not. */
static inline uint64_t vu_avail_bytes(uint32_t size)
{
    return 6 + 2 * (uint64_t)size;
}

static inline uint64_t vu_used_bytes(uint32_t size)
{
    return 6 + 8 * (uint64_t)size;
}

/* Virtio 1.2, 2.7.10: whether moving an index from `before` to `now` passes `event`. */
static inline bool vu_passed(uint16_t event, uint16_t now, uint16_t before)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

/* ---- the in-flight region, one queue's part of it --------------------------------------------------------------- */

struct vu_inflight_split; /* as laid out in the file */

struct vu_inflight_queue {
    struct vu_inflight_split *split; /* NULL without a region */
    uint64_t counter;                /* the next one; they order the resubmission */
    uint16_t last_batch;             /* what last_batch_head holds; never read back */
};

/* 0, or VU_E_INFLIGHT when the region has no such queue. Touches nothing. */
int vu_inflight_attach(const vu_inflight *inflight, uint32_t index, uint32_t size, struct vu_inflight_queue *queue);
struct vu_span vu_inflight_span(const vu_inflight *inflight);

struct vu_taken {
    uint64_t counter;
    uint16_t head;
};

/* Reads the region once, as the queue starts. `taken` has room for `size`; *count of them were in flight, in the order in
 * which they were taken. 0 or VU_E_INFLIGHT. [touches] */
int vu_inflight_recover(struct vu_inflight_queue *queue, uint32_t size, uint16_t used, struct vu_taken *taken,
                        uint32_t *count);

/* In the order of the specification: take as a chain is popped; link each chain of a batch before the used index
 * moves; finish each after it has; seal with the new index when all are finished. [touches] */
void vu_inflight_take(struct vu_inflight_queue *queue, uint16_t head);
void vu_inflight_link(struct vu_inflight_queue *queue, uint16_t head);
void vu_inflight_finish(struct vu_inflight_queue *queue, uint16_t head);
void vu_inflight_seal(struct vu_inflight_queue *queue, uint16_t used);

/* ---- the queue -------------------------------------------------------------------------------------------------- */

#define VU_SLOT_SEGMENTS 4
#define VU_QUEUE_COUNTERS (offsetof(struct vu_queue_stats, out) / sizeof(uint64_t))
#define VU_QUEUE_COUNTER(queue, name) \
    (&(queue)->counters[offsetof(struct vu_queue_stats, name) / sizeof(uint64_t)])

/* Where a chain lives from pop to push: the slot of its head, so a head that is out already is seen at once. */
struct vu_slot {
    vu_chain chain; /* first: a chain's address is its slot's */
    struct vu_ahead_link link;
    uint32_t capacity; /* of chain.segments */
    bool out;
    _Atomic uint64_t since; /* when it was popped, in nanoseconds; 0: it is not out */
    vu_segment few[VU_SLOT_SEGMENTS]; /* a block request of one page needs three */
};

struct vu_queue {
    /* Read by every call. */
    vu_map *map;
    vu_log *log;
    uint32_t size; /* a power of two */
    uint32_t flags;
    _Atomic int broken; /* why nothing more is taken */
    int silenced;       /* why nothing more is returned either */
    _Atomic int call;
    _Atomic bool forced; /* the next signal goes out whatever the driver asked for */
    bool started;        /* the ring's own indexes have been read */
    _Atomic uint16_t broken_head;
    _Atomic uint16_t next_avail;
    uint16_t used_index;     /* ours; what the ring says is never read back */
    uint16_t signalled;      /* used_index at the last signal */
    _Atomic uint64_t out;    /* chains popped and not pushed */
    _Atomic uint64_t counters[VU_QUEUE_COUNTERS]; /* in the order of struct vu_queue_stats */
    const struct vu_desc *desc;
    struct vu_avail *avail;
    struct vu_used *used;
    struct vu_slot *slots; /* [size] */
    uint64_t large;        /* segments in arrays outside of slots */
    struct vu_inflight_queue inflight;
    /* Chains that a previous process had taken; they are popped first. */
    struct vu_taken *resubmit; /* [size], NULL without an in-flight region */
    uint32_t resubmit_next, resubmit_count;
    /* Rarely. */
    uint64_t log_addr;
    struct vu_desc *table; /* copy of an indirect table that is not in one piece, made when the first one comes */
    vu_inflight *region;
    struct vu_span extra[2]; /* log and in-flight region, for guards */
    vu_touch *touch;
    struct vu_ahead *ahead;
};

/* Adds what one descriptor names to the chain of the slot: 0, VU_E_ORDER, _OVERFLOW, _RANGE, _SIZE or _NOMEM. */
int vu_slot_add(vu_queue *queue, struct vu_slot *slot, const struct vu_desc *desc);
/* Marks what was written into the chain: at least `length` bytes, which are no more than it has room for. */
int vu_chain_log(vu_queue *queue, const vu_chain *chain, uint64_t length);

/* The split format. All but setup run inside a guard. `done` tells how far pop got when a fault cuts it off. */
int vu_split_setup(vu_queue *queue, const struct vu_ring *ring);
int vu_split_start(vu_queue *queue);
int vu_split_pop(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done);
int vu_split_push(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count);
bool vu_split_wants_call(vu_queue *queue);
int vu_split_arm(vu_queue *queue);
int vu_split_disarm(vu_queue *queue);

#endif
