/*
 * The device side of a queue, whatever the format of its ring: its life, its counters, the guard around every touch, calls.
 *
 * What belongs here: what every format needs. What does not: descriptors and indexes (split.c, packed.c), chains (chain.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"

/* ---- life ---------------------------------------------------------------------------------------------- */

static int open_queue(vu_queue *queue, const struct vu_ring *ring, vu_inflight *inflight, vu_iotlb *iotlb)
{
    if (!ring->size || ring->size > VU_RING_SIZE_MAX)
        return VU_E_SIZE;
    int code = iotlb ? vu_translator_open(queue, iotlb, ring->index) : 0;
    if (!code)
        code = queue->format->setup(queue, ring);
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

vu_queue *vu_queue_new(vu_map *map, const struct vu_ring *ring, vu_log *log, vu_inflight *inflight, vu_iotlb *iotlb,
                       int *error)
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
    queue->format = ring->flags & VU_RING_PACKED    ? &vu_packed
                    : ring->flags & VU_RING_SWAPPED ? &vu_split_swapped
                                                    : &vu_split;
    queue->log_addr = ring->log_addr;
    atomic_init(&queue->call, -1);
    *error = open_queue(queue, ring, inflight, iotlb);
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
    vu_translator_close(queue);
    for (uint32_t i = 0; queue->slots && i < queue->size; i++) {
        if (queue->slots[i].capacity > VU_SLOT_SEGMENTS)
            free(queue->slots[i].chain.segments);
        free(queue->slots[i].iovas);
    }
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

static int find_part(vu_queue *queue, const struct vu_part *part, uint8_t **host)
{
    if (queue->translator)
        return vu_translate_part(queue, part->address, part->bytes, part->access, host);
    *host = queue->flags & VU_RING_GUEST_ADDR ? vu_map_guest(queue->map, part->address, part->bytes)
                                              : vu_map_user(queue->map, part->address, part->bytes);
    return *host ? 0 : VU_E_RANGE;
}

int vu_queue_place(vu_queue *queue, const struct vu_part *part, void *host)
{
    uint8_t *at;
    if (part->address % part->alignment)
        return VU_E_ALIGN;
    if (part->bytes > UINT64_MAX - part->address)
        return VU_E_OVERFLOW;
    int code = find_part(queue, part, &at);
    if (code)
        return code;
    memcpy(host, &at, sizeof at);
    /* A region's offset in its page can make our address less aligned than the front-end's. */
    return (uintptr_t)at % part->alignment ? VU_E_ALIGN : 0;
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

int vu_queue_leave(vu_queue *queue)
{
    atomic_store(&queue->leaves, queue->region != NULL);
    return queue->region != NULL;
}

bool vu_queue_leaves(const vu_queue *queue)
{
    return atomic_load(&queue->leaves);
}

const vu_map *vu_queue_map(const vu_queue *queue)
{
    return queue->map;
}

uint32_t vu_queue_size(const vu_queue *queue)
{
    return queue->size;
}

void vu_queue_only_reads(vu_queue *queue)
{
    queue->only_reads = true;
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
    uint64_t now = vu_clock_ns(), readable = 0, written = 0, served = 0, ns = 0, popped = now;
    unsigned bucket = vu_bucket(ns);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t since = atomic_load_explicit(&((struct vu_slot *)chains[i])->since, memory_order_relaxed);
        if (since != popped) { /* those of one batch were popped together */
            popped = since;
            ns = now - since;
            bucket = vu_bucket(ns);
        }
        readable += chains[i]->readable;
        written += vu_chain_told(chains[i], lengths, i);
        served += ns;
        vu_add(VU_QUEUE_COUNTER(queue, histogram) + bucket, 1);
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
    if (queue->log)
        vu_log_tell(queue->log);
    if (code == VU_E_MISSING) /* nothing is wrong: what comes next waits */
        return 0;
    return code < 0 ? break_queue(queue, phase, code) : code;
}

static int pop_guarded(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    struct vu_guard guard;
    if (queue->translator && vu_translator_waits(queue))
        return 0;
    ENTER(queue, guard, TAKING);
    int code = queue->started ? 0 : queue->format->start(queue);
    if (queue->translator)
        vu_translator_begin(queue);
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

static void release_all(vu_queue *queue, vu_chain *const *chains, uint32_t count)
{
    if (queue->translator)
        vu_translator_lock(queue);
    for (uint32_t i = 0; i < count; i++)
        vu_chain_release(queue, chains[i]);
    if (queue->translator)
        vu_translator_unlock(queue);
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
    release_all(queue, chains, count);
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
    release_all(queue, chains, count);
    return code;
}

int vu_queue_arm(vu_queue *queue)
{
    struct vu_guard guard;
    ENTER(queue, guard, TAKING);
    int code = queue->started ? 0 : queue->format->start(queue);
    code = code ? code : queue->format->arm(queue);
    /* What is there already cannot be had before it is translated, which wakes the thread. */
    return leave(queue, &guard, TAKING, code > 0 && queue->translator && vu_translator_waits(queue) ? 0 : code);
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
