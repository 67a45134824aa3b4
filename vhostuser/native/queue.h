/*
 * The inside of a device-side queue: what queue.c (every format: guard, counters), chain.c (chains), the formats of rings
 * (split.c, packed.c), the tables of both (table.c) and their in-flight regions (inflight.c, inflight_split.c,
 * inflight_packed.c) share.
 */
#ifndef VHOSTUSER_QUEUE_H
#define VHOSTUSER_QUEUE_H

#include "core.h"

/* ---- guest memory, each value loaded once -------------------------------------------------------------------- */

/* Everything in a ring is little-endian, but for that of a legacy driver of another order (split_swapped.c): vhost-user
 * peers share a machine, and this project supports little-endian ones. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are read as little-endian");

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
#define VU_RING_SIZE_MAX 32768

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

/* ---- the packed ring in memory (virtio 1.2, 2.8) --------------------------------------------------------------- */

#define VU_PACKED_AVAIL (1 << 7)
#define VU_PACKED_USED (1 << 15)
#define VU_EVENT_ENABLE 0
#define VU_EVENT_DISABLE 1
#define VU_EVENT_DESC 2

struct vu_packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id, flags;
};

struct vu_packed_event {
    uint16_t at; /* bits 0 to 14: the place, bit 15: the wrap counter there */
    uint16_t flags;
};

/* A place in a packed ring: the index and the wrap counter of who goes there. */
struct vu_place {
    uint16_t index;
    bool wrap;
};

static inline uint16_t vu_place_word(struct vu_place place)
{
    return (uint16_t)(place.index | place.wrap << 15);
}

static inline struct vu_place vu_place_of(uint16_t word)
{
    return (struct vu_place){word & 0x7fff, word >> 15};
}

/* `count` is at most `size`. */
static inline struct vu_place vu_place_after(struct vu_place place, uint32_t count, uint32_t size)
{
    uint32_t index = place.index + count;
    bool turned = index >= size;
    return (struct vu_place){(uint16_t)(turned ? index - size : index), place.wrap != turned};
}

/* As long before it. */
static inline struct vu_place vu_place_before(struct vu_place place, uint32_t count, uint32_t size)
{
    bool turned = count > place.index;
    return (struct vu_place){(uint16_t)(place.index - count + (turned ? size : 0)), place.wrap != turned};
}

/* How far it is from one place on to another, 0 to size - 1 within a turn, size if they differ in the turn alone. */
static inline uint32_t vu_place_distance(struct vu_place from, struct vu_place to, uint32_t size)
{
    return from.wrap == to.wrap ? (uint32_t)(to.index - from.index) : (uint32_t)(to.index - from.index) + size;
}

/* ---- the in-flight region, one queue's part of it --------------------------------------------------------------- */

struct vu_inflight_split; /* as laid out in the file */
struct vu_inflight_packed;

struct vu_slot;

struct vu_inflight_queue {
    struct vu_inflight_split *split; /* NULL without a region, or in the other format */
    struct vu_inflight_packed *packed;
    uint64_t counter;                /* the next one; they order the resubmission */
    uint16_t last_batch;             /* split: what last_batch_head holds; never read back */
    uint16_t free_head;              /* packed: what old_free_head holds; never read back */
    uint16_t *next;                  /* packed: [size], what `next` of every entry holds; never read back */
};

/* 0, VU_E_NOMEM, or VU_E_INFLIGHT when the region has no such queue. Touches nothing. */
int vu_inflight_attach(const vu_inflight *inflight, uint32_t index, uint32_t size, bool packed,
                       struct vu_inflight_queue *queue);
struct vu_span vu_inflight_span(const vu_inflight *inflight);
#define VU_INFLIGHT_VERSION 1
/* Bytes of one queue's part, without what aligns the next. */
uint64_t vu_inflight_split_bytes(uint32_t size);
uint64_t vu_inflight_packed_bytes(uint32_t size);

struct vu_taken {
    uint64_t counter;
    uint16_t head; /* packed: the chain's entry */
    uint16_t num;  /* packed: entries of the chain */
};

/* Puts them into the order in which they were taken. */
void vu_inflight_sort(struct vu_taken *taken, uint32_t count);

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

/* The packed format. */
struct vu_packed_found {
    struct vu_place used; /* where the ring goes on: as the base says, and then as the region does unless it is fresh */
    uint32_t held;        /* places of the ring that chains in flight have; in and out as `used` */
};
/* As vu_inflight_recover; or VU_E_NOMEM. */
int vu_inflight_packed_recover(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                               struct vu_taken *taken, struct vu_packed_found *found, uint32_t *count);
/* The descriptor in an entry of a chain that was in flight; returns the next entry of the chain. */
uint16_t vu_inflight_packed_load(const struct vu_inflight_queue *queue, uint16_t entry, uint64_t words[2]);
/* Takes the `count` descriptors from place `first` on as one chain, and stores the slot's entry and last entry. */
void vu_inflight_packed_take(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                             uint16_t first, uint16_t count, struct vu_slot *slot);
/* As above: link each chain of a batch; move before the first shows in the ring; finish each after it has; seal. */
void vu_inflight_packed_link(struct vu_inflight_queue *queue, const struct vu_slot *slot);
void vu_inflight_packed_move(struct vu_inflight_queue *queue, struct vu_place used);
void vu_inflight_packed_finish(struct vu_inflight_queue *queue, const struct vu_slot *slot);
void vu_inflight_packed_seal(struct vu_inflight_queue *queue, struct vu_place used);
/* The chain that was taken last was not. */
void vu_inflight_packed_untake(struct vu_inflight_queue *queue, const struct vu_slot *slot);

/* ---- the queue -------------------------------------------------------------------------------------------------- */

#define VU_SLOT_SEGMENTS 4
#define VU_QUEUE_COUNTERS (offsetof(struct vu_queue_stats, out) / sizeof(uint64_t))
#define VU_QUEUE_COUNTER(queue, name) \
    (&(queue)->counters[offsetof(struct vu_queue_stats, name) / sizeof(uint64_t)])

/* Where a chain lives from pop to push. Split: the slot of its head, so a head that is out already is seen at once. */
struct vu_slot {
    vu_chain chain; /* first: a chain's address is its slot's */
    struct vu_ahead_link link;
    uint32_t capacity; /* of chain.segments */
    uint16_t entry;    /* packed: of the in-flight region */
    uint16_t last;     /* packed: its last entry there */
    bool out;
    _Atomic uint64_t since; /* when it was popped, in nanoseconds; 0: it is not out */
    bool again; /* a process before us had taken it */
    vu_segment few[VU_SLOT_SEGMENTS]; /* a block request of one page needs three */
    uint64_t *iovas; /* [capacity] behind an IOMMU: where the driver has the segments; NULL until the first is known */
};

struct vu_queue {
    /* Read by every call. */
    vu_map *map;
    vu_log *log;
    const struct vu_format *format;
    uint32_t size; /* split: a power of two */
    uint32_t flags;
    _Atomic int broken; /* why nothing more is taken */
    int silenced;       /* why nothing more is returned either */
    _Atomic int call;
    _Atomic bool forced; /* the next signal goes out whatever the driver asked for */
    _Atomic bool leaves; /* chains under way need not be returned before a stop */
    bool started;        /* the ring's own indexes have been read */
    bool only_reads;     /* no buffer is written into, whatever its descriptor says */
    _Atomic uint16_t broken_head;
    _Atomic uint32_t base;     /* as in GET_VRING_BASE; split: the next available index */
    _Atomic uint64_t out;      /* chains popped and not pushed */
    _Atomic uint64_t counters[VU_QUEUE_COUNTERS]; /* in the order of struct vu_queue_stats */
    union {
        struct {
            const struct vu_desc *desc;
            struct vu_avail *avail;
            struct vu_used *used;
            uint16_t used_index; /* ours; what the ring says is never read back */
            uint16_t signalled;  /* used_index at the last signal */
        };
        struct {
            struct vu_packed_desc *ring;
            struct vu_packed_event *driver, *device; /* who writes it */
            struct vu_place next_avail, next_used;
            uint32_t held;       /* places of the ring popped and not returned */
            uint32_t moved;      /* returned since the last signal, `size` at most */
            uint64_t ring_guest; /* for the dirty log */
            uint64_t device_guest;
            uint16_t *free; /* [size] slots that no chain has */
            uint32_t free_count;
        } packed;
    };
    struct vu_slot *slots; /* [size] */
    struct vu_window near; /* of the map: where the last buffer was found */
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
    struct vu_translator *translator; /* NULL without an IOMMU */
};

/* The host address of one part of the ring, aligned and in one piece, since a ring is an array to us: 0, VU_E_ALIGN,
 * VU_E_OVERFLOW or VU_E_RANGE; behind an IOMMU also VU_E_MISSING, VU_E_ACCESS or VU_E_PIECES. */
struct vu_part {
    uint64_t address, bytes, alignment;
    uint32_t access; /* VU_ACCESS_ */
};
int vu_queue_place(vu_queue *queue, const struct vu_part *part, void *host);

/* An empty chain in the slot. */
void vu_slot_begin(struct vu_slot *slot, uint16_t head);
/* Adds what one descriptor names to the chain of the slot: 0, VU_E_ORDER, _OVERFLOW, _RANGE, _SIZE or _NOMEM. */
int vu_slot_add(vu_queue *queue, struct vu_slot *slot, const struct vu_desc *desc);
/* Room for twice as many segments, or NULL. */
vu_segment *vu_slot_outgrow(vu_queue *queue, struct vu_slot *slot);
/* The chain has been pushed, or given back: its slot is free. Again: nothing. */
void vu_chain_release(vu_queue *queue, vu_chain *chain);
/* What the driver is told of the i-th chain of a push, in bytes; without lengths, as far as it was filled. */
static inline uint32_t vu_chain_told(const vu_chain *chain, const uint32_t *lengths, uint32_t i)
{
    uint64_t told = lengths ? lengths[i] : chain->filled;
    return (uint32_t)(told < chain->writable ? told : chain->writable);
}

/* Marks what was written into the chain: at least `length` bytes, which are no more than it has room for. */
int vu_chain_log(vu_queue *queue, const vu_chain *chain, uint64_t length);

/* ---- a queue behind an IOMMU (translate.c) ---------------------------------------------------------------------------- */

#define VU_E_STALE -100 /* of this file and its users only: a translation has gone, parse again */

/* 0, VU_E_NOMEM, VU_E_SYS, or VU_E_SIZE where the IOTLB knows no such ring. */
int vu_translator_open(vu_queue *queue, vu_iotlb *iotlb, uint32_t ring);
void vu_translator_close(vu_queue *queue);
/* Of a part of the ring; what is in use from here on. */
int vu_translate_part(vu_queue *queue, uint64_t iova, uint64_t bytes, uint32_t access, uint8_t **host);
/* The first run of [iova, iova + length), length not 0: 0, VU_E_MISSING, VU_E_ACCESS or VU_E_RANGE. */
int vu_translate(vu_queue *queue, uint64_t iova, uint64_t length, uint32_t access, vu_segment *found);
/* Adds a buffer to the chain of the slot; what is missing shows when the chain is held. */
int vu_translate_buffer(vu_queue *queue, struct vu_slot *slot, uint64_t iova, uint64_t left, bool writable);
/* Whether the ring waits for something that it has asked for. */
bool vu_translator_waits(const vu_queue *queue);
/* Before chains are parsed. */
void vu_translator_begin(vu_queue *queue);
/* The chain that was parsed uses its addresses from here on: 0, VU_E_STALE or VU_E_MISSING. */
int vu_translator_hold(vu_queue *queue, struct vu_slot *slot);
/* Around what makes chains use theirs no longer. */
void vu_translator_lock(vu_queue *queue);
void vu_translator_unlock(vu_queue *queue);

/* The chain of the slot was parsed and is out from here on: 0, VU_E_STALE or VU_E_MISSING. */
static inline int vu_slot_hold(vu_queue *queue, struct vu_slot *slot)
{
    if (queue->translator)
        return vu_translator_hold(queue, slot);
    slot->out = true;
    return 0;
}

/* ---- tables of descriptors (table.c) ------------------------------------------------------------------------------- */

/* Guest memory as 64-bit words, wherever an indirect table begins. */
typedef uint64_t __attribute__((aligned(1), may_alias)) vu_word;

struct vu_table {
    const void *at;
    uint32_t count;
    bool indirect;
};

/* The two words of a descriptor. */
static inline void vu_table_load(const void *table, uint32_t index, uint64_t words[2])
{
    const volatile vu_word *at = (const volatile vu_word *)((const uint8_t *)table + 16 * (uint64_t)index);
    words[0] = at[0];
    words[1] = at[1];
}

/* The longest indirect table that is accepted, in descriptors. */
uint32_t vu_table_limit(const vu_queue *queue);
/* Goes into the indirect table that a descriptor names, as it is in both formats. */
int vu_table_enter(vu_queue *queue, const struct vu_desc *desc, struct vu_table *table);
/* Where the table of a descriptor begins, to be fetched ahead: false if there is none that would be entered. */
bool vu_table_span(const vu_queue *queue, const struct vu_desc *desc, struct vu_span *span);
#define VU_TABLE_FETCH 64 /* how many indirect tables are fetched ahead in one go */

/* ---- the formats ------------------------------------------------------------------------------------------------- */

/* All but setup, free and spans run inside a guard. `done` tells how far pop got when a fault cuts it off. */
struct vu_format {
    int (*setup)(vu_queue *queue, const struct vu_ring *ring);
    int (*start)(vu_queue *queue);
    int (*pop)(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done);
    void (*unpop)(vu_queue *queue, const struct vu_slot *slot); /* of the chain that was popped last */
    int (*push)(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count);
    bool (*wants_call)(vu_queue *queue);
    int (*arm)(vu_queue *queue);
    int (*disarm)(vu_queue *queue);
    void (*spans)(const vu_queue *queue, struct vu_span spans[3]);
};

extern const struct vu_format vu_split, vu_split_swapped, vu_packed;

#endif
