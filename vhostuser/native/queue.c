/*
 * The device side of a queue, whatever the format of its ring: its life, the pool of chains, the guard around every
 * touch, copies in and out of chains, calls.
 *
 * What belongs here: what every format needs. What does not: descriptors and indexes (split.c, packed.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"

/* What one queue may keep in segment arrays outside of its slots, in segments (24 MiB). A block device with 1024 requests
 * of 254 segments needs a quarter of that; only a guest that wants our memory gets there. */
#define LARGE_LIMIT (1u << 20)
/* Arrays up to this size stay with their slot for the next chain; longer ones are freed. */
#define KEPT_CAPACITY 64
/* Virtio 1.2, 2.7.5.2: a chain has at most 2^32 bytes in all. */
#define CHAIN_BYTES_MAX (UINT64_C(1) << 32)

/* ---- life ---------------------------------------------------------------------------------------------- */

static int open_queue(vu_queue *queue, const struct vu_ring *ring, vu_inflight *inflight)
{
    if (!ring->size || ring->size > VU_RING_SIZE_MAX)
        return VU_E_SIZE;
    int code = queue->format->setup(queue, ring);
    if (!code && inflight)
        code = vu_inflight_attach(inflight, ring->index, ring->size, ring->flags & VU_RING_PACKED, &queue->inflight);
    if (!code)
        code = vu_guard_install();
    if (code)
        return code;
    queue->slots = calloc(ring->size, sizeof *queue->slots);
    if (inflight)
        queue->resubmit = calloc(ring->size, sizeof *queue->resubmit);
    return queue->slots && (queue->resubmit || !inflight) ? 0 : VU_E_NOMEM;
}

vu_queue *vu_queue_new(vu_map *map, const struct vu_ring *ring, vu_log *log, vu_inflight *inflight, int *error)
{
    vu_queue *queue = calloc(1, sizeof *queue);
    if (!queue) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    vu_map_get(queue->map = map);
    if (log) {
        vu_log_get(queue->log = log);
        queue->extra[0] = vu_log_span(log);
    }
    if (inflight) {
        vu_inflight_get(queue->region = inflight);
        queue->extra[1] = vu_inflight_span(inflight);
    }
    queue->size = ring->size;
    queue->flags = ring->flags;
    queue->format = ring->flags & VU_RING_PACKED ? &vu_packed : &vu_split;
    queue->log_addr = ring->log_addr;
    atomic_init(&queue->call, -1);
    *error = open_queue(queue, ring, inflight);
    if (!*error)
        return queue;
    vu_queue_free(queue);
    return NULL;
}

void vu_queue_free(vu_queue *queue)
{
    if (!queue)
        return;
    if (queue->ahead)
        vu_ahead_free(queue->ahead);
    for (uint32_t i = 0; queue->slots && i < queue->size; i++)
        if (queue->slots[i].capacity > VU_SLOT_SEGMENTS)
            free(queue->slots[i].chain.segments);
    if (queue->flags & VU_RING_PACKED)
        free(queue->packed.free);
    free(queue->slots);
    free(queue->resubmit);
    free(queue->inflight.next);
    free(queue->table);
    vu_inflight_put(queue->region);
    vu_log_put(queue->log);
    vu_map_put(queue->map);
    free(queue);
}

int vu_queue_place(const vu_queue *queue, uint64_t address, uint64_t bytes, uint64_t alignment, void *host)
{
    if (address % alignment)
        return VU_E_ALIGN;
    if (bytes > UINT64_MAX - address)
        return VU_E_OVERFLOW;
    uint8_t *at = queue->flags & VU_RING_GUEST_ADDR ? vu_map_guest(queue->map, address, bytes)
                                                     : vu_map_user(queue->map, address, bytes);
    memcpy(host, &at, sizeof at);
    /* A region's offset in its page can make our address less aligned than the front-end's. */
    return !at ? VU_E_RANGE : (uintptr_t)at % alignment ? VU_E_ALIGN : 0;
}

/* ---- what others may ask --------------------------------------------------------------------------------- */

uint32_t vu_queue_base(const vu_queue *queue)
{
    return atomic_load(&queue->base);
}

uint32_t vu_queue_out(const vu_queue *queue)
{
    return (uint32_t)atomic_load(&queue->out);
}

int vu_queue_broken(const vu_queue *queue)
{
    return atomic_load(&queue->broken);
}

uint16_t vu_queue_broken_head(const vu_queue *queue)
{
    return atomic_load(&queue->broken_head);
}

bool vu_queue_drains(const vu_queue *queue)
{
    return vu_queue_broken(queue) && !queue->silenced;
}

const vu_map *vu_queue_map(const vu_queue *queue)
{
    return queue->map;
}

uint32_t vu_queue_size(const vu_queue *queue)
{
    return queue->size;
}

vu_touch *vu_queue_touch(const vu_queue *queue)
{
    return queue->touch;
}

void vu_queue_keep_touch(vu_queue *queue, vu_touch *touch)
{
    queue->touch = touch;
}

void vu_queue_spans(const vu_queue *queue, struct vu_span spans[3])
{
    queue->format->spans(queue, spans);
}

struct vu_ahead **vu_queue_ahead(vu_queue *queue)
{
    return &queue->ahead;
}

struct vu_ahead_link *vu_chain_link(struct vu_chain *chain)
{
    return &((struct vu_slot *)chain)->link;
}

/* ---- the pool ------------------------------------------------------------------------------------------ */

static vu_segment *outgrow(vu_queue *queue, struct vu_slot *slot)
{
    vu_chain *chain = &slot->chain;
    uint32_t capacity = slot->capacity * 2;
    if (queue->large + capacity > LARGE_LIMIT)
        return NULL;
    bool was_large = slot->capacity > VU_SLOT_SEGMENTS;
    vu_segment *segments = realloc(was_large ? chain->segments : NULL, capacity * sizeof *segments);
    if (!segments)
        return NULL;
    if (!was_large)
        memcpy(segments, slot->few, sizeof slot->few);
    queue->large += capacity - (was_large ? slot->capacity : 0);
    chain->segments = segments;
    slot->capacity = capacity;
    return segments;
}

void vu_slot_begin(struct vu_slot *slot, uint16_t head)
{
    vu_chain *chain = &slot->chain;
    slot->again = false;
    if (!slot->capacity) {
        chain->segments = slot->few;
        slot->capacity = VU_SLOT_SEGMENTS;
    }
    chain->head = head;
    chain->descriptors = 0;
    chain->readable_count = chain->writable_count = 0;
    chain->readable = chain->writable = chain->written = chain->filled = 0;
    chain->fault = 0;
    chain->cookie = 0;
}

/* A zero-length descriptor is passed over: the specification does not forbid it, and drivers exist that send some. */
int vu_slot_add(vu_queue *queue, struct vu_slot *slot, const struct vu_desc *desc)
{
    vu_chain *chain = &slot->chain;
    uint64_t guest = desc->addr, left = desc->len, run;
    bool writable = desc->flags & VU_DESC_WRITE;
    if (!writable && chain->writable_count)
        return VU_E_ORDER;
    if (left > UINT64_MAX - guest)
        return VU_E_OVERFLOW;
    *(writable ? &chain->writable : &chain->readable) += left;
    if (chain->readable + chain->writable > CHAIN_BYTES_MAX)
        return VU_E_SIZE;
    for (; left; guest += run, left -= run) {
        uint8_t *host = vu_map_run(queue->map, guest, left, &run);
        if (!host)
            return VU_E_RANGE;
        uint32_t at = chain->readable_count + chain->writable_count;
        if (at == slot->capacity && !outgrow(queue, slot))
            return VU_E_NOMEM;
        chain->segments[at] = (vu_segment){host, run, guest};
        (*(writable ? &chain->writable_count : &chain->readable_count))++;
    }
    return 0;
}

static void release(vu_queue *queue, vu_chain *chain)
{
    struct vu_slot *slot = (struct vu_slot *)chain;
    if (!slot->out)
        return;
    slot->out = false;
    atomic_store_explicit(&slot->since, 0, memory_order_relaxed);
    if (queue->flags & VU_RING_PACKED)
        queue->packed.free[queue->packed.free_count++] = (uint16_t)(slot - queue->slots);
    /* Whoever still holds the chain finds nothing to copy in it: its segments may be gone. */
    chain->readable_count = chain->writable_count = 0;
    chain->readable = chain->writable = 0;
    if (slot->capacity > KEPT_CAPACITY) {
        free(chain->segments);
        queue->large -= slot->capacity;
        slot->capacity = 0;
    }
}

/* ---- what is counted --------------------------------------------------------------------------------------
 * By the queue's thread alone, and before it is done: whoever was called finds in the counters what for. */

static void count_popped(vu_queue *queue, vu_chain *const *chains, uint32_t count)
{
    uint64_t now = vu_clock_ns();
    vu_add(&queue->out, count);
    for (uint32_t i = 0; i < count; i++)
        atomic_store_explicit(&((struct vu_slot *)chains[i])->since, now, memory_order_relaxed);
}

static void count_returned(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count)
{
    uint64_t now = vu_clock_ns(), readable = 0, written = 0, served = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t ns = now - atomic_load_explicit(&((struct vu_slot *)chains[i])->since, memory_order_relaxed);
        readable += chains[i]->readable;
        written += vu_chain_told(chains[i], lengths, i);
        served += ns;
        vu_add(VU_QUEUE_COUNTER(queue, histogram) + vu_bucket(ns), 1);
    }
    vu_add(&queue->out, -(uint64_t)count);
    vu_add(VU_QUEUE_COUNTER(queue, returned), count);
    vu_add(VU_QUEUE_COUNTER(queue, readable), readable);
    vu_add(VU_QUEUE_COUNTER(queue, written), written);
    vu_add(VU_QUEUE_COUNTER(queue, batches), 1);
    vu_add(VU_QUEUE_COUNTER(queue, served_ns), served);
}

void vu_queue_kicked(vu_queue *queue)
{
    vu_add(VU_QUEUE_COUNTER(queue, kicks), 1);
}

static uint64_t oldest(const vu_queue *queue)
{
    uint64_t first = 0;
    for (uint32_t i = 0; i < queue->size; i++) {
        uint64_t since = atomic_load_explicit(&queue->slots[i].since, memory_order_relaxed);
        if (since && (!first || since < first))
            first = since;
    }
    return first;
}

void vu_queue_get_stats(const vu_queue *queue, struct vu_queue_stats *stats)
{
    uint64_t *copy = (uint64_t *)stats;
    for (size_t i = 0; i < VU_QUEUE_COUNTERS; i++)
        copy[i] = atomic_load_explicit(&queue->counters[i], memory_order_relaxed);
    stats->out = vu_queue_out(queue);
    stats->oldest = stats->out ? oldest(queue) : 0;
}

/* ---- the ring ------------------------------------------------------------------------------------------ */

/* What goes wrong while chains are taken leaves those that were taken before: the used ring is ours, and the driver gets
 * them back. What goes wrong while they are returned ends that too. */
enum phase { TAKING, RETURNING };

static int break_queue(vu_queue *queue, enum phase phase, int code)
{
    int first = 0;
    atomic_compare_exchange_strong(&queue->broken, &first, code);
    if (phase == RETURNING)
        queue->silenced = code;
    return code;
}

static int refusal(const vu_queue *queue, enum phase phase)
{
    return phase == TAKING ? atomic_load_explicit(&queue->broken, memory_order_relaxed) : queue->silenced;
}

/* Around everything that touches the ring: the sticky code, or a guard over map, log and in-flight region. */
#define ENTER(queue, guard, phase)                                              \
    do {                                                                        \
        int sticky_ = refusal((queue), (phase));                                \
        if (sticky_)                                                            \
            return sticky_;                                                     \
        if (VU_GUARD(&(guard), (queue)->map))                                   \
            return break_queue((queue), (phase), VU_E_FAULT);                   \
        (guard).extra[0] = (queue)->extra[0];                                   \
        (guard).extra[1] = (queue)->extra[1];                                   \
    } while (0)

static int leave(vu_queue *queue, struct vu_guard *guard, enum phase phase, int code)
{
    vu_guard_leave(guard);
    return code < 0 ? break_queue(queue, phase, code) : code;
}

static int pop_guarded(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    struct vu_guard guard;
    ENTER(queue, guard, TAKING);
    int code = queue->started ? 0 : queue->format->start(queue);
    if (!code)
        code = queue->format->pop(queue, chains, max, done);
    return leave(queue, &guard, TAKING, code);
}

/* Chains that came before the one that broke the ring are handed out; the code follows with the next call. */
int vu_queue_pop(vu_queue *queue, vu_chain **chains, uint32_t max)
{
    volatile uint32_t done = 0;
    int code = pop_guarded(queue, chains, max, &done);
    uint32_t count = done;
    if (count)
        count_popped(queue, chains, count);
    return count ? (int)count : code;
}

static int unpop_guarded(vu_queue *queue, vu_chain *const *chains, uint32_t count)
{
    struct vu_guard guard;
    ENTER(queue, guard, TAKING);
    for (uint32_t i = 0; i < count; i++)
        queue->format->unpop(queue, (const struct vu_slot *)chains[count - 1 - i]);
    return leave(queue, &guard, TAKING, 0);
}

int vu_queue_unpop(vu_queue *queue, vu_chain *const *chains, uint32_t count)
{
    int code = unpop_guarded(queue, chains, count);
    for (uint32_t i = 0; i < count; i++)
        release(queue, chains[i]);
    vu_add(&queue->out, -(uint64_t)count);
    return code;
}

static int push_guarded(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count)
{
    struct vu_guard guard;
    ENTER(queue, guard, RETURNING);
    return leave(queue, &guard, RETURNING, queue->format->push(queue, chains, lengths, count));
}

int vu_queue_push(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count)
{
    if (!count)
        return atomic_load(&queue->broken);
    count_returned(queue, chains, lengths, count);
    int code = push_guarded(queue, chains, lengths, count);
    for (uint32_t i = 0; i < count; i++)
        release(queue, chains[i]);
    return code;
}

int vu_queue_arm(vu_queue *queue)
{
    struct vu_guard guard;
    ENTER(queue, guard, TAKING);
    int code = queue->started ? 0 : queue->format->start(queue);
    return leave(queue, &guard, TAKING, code ? code : queue->format->arm(queue));
}

int vu_queue_disarm(vu_queue *queue)
{
    struct vu_guard guard;
    ENTER(queue, guard, TAKING);
    return leave(queue, &guard, TAKING, queue->format->disarm(queue));
}

static int wants_call(vu_queue *queue)
{
    struct vu_guard guard;
    ENTER(queue, guard, RETURNING);
    return leave(queue, &guard, RETURNING, queue->format->wants_call(queue));
}

/* ---- calls --------------------------------------------------------------------------------------------- */

void vu_queue_set_call(vu_queue *queue, int fd)
{
    atomic_store(&queue->call, fd);
}

void vu_queue_force_signal(vu_queue *queue)
{
    atomic_store(&queue->forced, true);
}

int vu_queue_signal(vu_queue *queue)
{
    int wanted = wants_call(queue);
    if (wanted < 0)
        return wanted;
    if (!wanted && !atomic_load_explicit(&queue->forced, memory_order_relaxed))
        return 0;
    int call = atomic_load(&queue->call);
    /* A call that nobody can get yet waits for the descriptor: a front-end may kick before it gives one. */
    atomic_store(&queue->forced, call < 0);
    if (call < 0)
        return 0;
    uint64_t one = 1;
    vu_add(VU_QUEUE_COUNTER(queue, calls), 1);
    /* EAGAIN: the counter is full, so the driver has been told often enough. */
    if (write(call, &one, sizeof one) < 0 && errno != EAGAIN)
        return VU_E_SYS;
    return 1;
}

/* ---- copies -------------------------------------------------------------------------------------------- */

static void copy_segments(const vu_segment *segment, uint64_t offset, uint8_t *bytes, uint64_t length, bool to_guest)
{
    for (; offset >= segment->length; segment++)
        offset -= segment->length;
    while (length) {
        uint64_t run = segment->length - offset;
        run = run < length ? run : length;
        memcpy(to_guest ? segment->host + offset : bytes, to_guest ? bytes : segment->host + offset, run);
        bytes += run;
        length -= run;
        offset = 0;
        segment++;
    }
}

static int64_t copy_guarded(vu_queue *queue, const vu_segment *segments, uint64_t offset, void *bytes, uint64_t length,
                            bool to_guest)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, queue->map))
        return VU_E_FAULT;
    copy_segments(segments, offset, bytes, length, to_guest);
    vu_guard_leave(&guard);
    return (int64_t)length;
}

static uint64_t bounded(uint64_t total, uint64_t offset, uint64_t length)
{
    uint64_t left = offset < total ? total - offset : 0;
    return length < left ? length : left;
}

int64_t vu_chain_read(vu_queue *queue, vu_chain *chain, uint64_t offset, void *to, uint64_t length)
{
    length = bounded(chain->readable, offset, length);
    return length ? copy_guarded(queue, chain->segments, offset, to, length, false) : 0;
}

int64_t vu_chain_write(vu_queue *queue, vu_chain *chain, uint64_t offset, const void *from, uint64_t length)
{
    length = bounded(chain->writable, offset, length);
    if (!length)
        return 0;
    /* Before the copy: when a page is lost halfway, what was written so far is dirty all the same. */
    if (offset + length > chain->written)
        chain->written = offset + length;
    int64_t count = copy_guarded(queue, chain->segments + chain->readable_count, offset, (void *)from, length, true);
    if (count > 0 && offset + length > chain->filled)
        chain->filled = offset + length;
    return count;
}

/* A page that is lost ends it; who reads the chain itself is told. */
static void peek_guarded(vu_queue *queue, vu_chain *const *chains, uint32_t count, struct vu_peek *peeks)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, queue->map))
        return;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t length = bounded(chains[i]->readable, 0, VU_PEEK);
        if (length)
            copy_segments(chains[i]->segments, 0, peeks[i].bytes, length, false);
        peeks[i].length = length;
    }
    vu_guard_leave(&guard);
}

void vu_chain_peek(vu_queue *queue, vu_chain *const *chains, uint32_t count, struct vu_peek *peeks)
{
    for (uint32_t i = 0; i < count; i++) {
        peeks[i].readable = chains[i]->readable;
        peeks[i].writable = chains[i]->writable;
        peeks[i].length = 0;
    }
    if (!queue->touch)
        peek_guarded(queue, chains, count, peeks);
}

int vu_chain_log(vu_queue *queue, const vu_chain *chain, uint64_t length)
{
    uint64_t left = length > chain->written ? length : chain->written;
    for (const vu_segment *segment = chain->segments + chain->readable_count; left; segment++) {
        uint64_t run = segment->length < left ? segment->length : left;
        int code = vu_log_set(queue->log, segment->guest, run);
        if (code)
            return code;
        left -= run;
    }
    return 0;
}
