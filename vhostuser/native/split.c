/*
 * The split ring as the device sees it (virtio 1.2, 2.7).
 *
 * What belongs here: descriptors, indexes, event suppression, and the order of writes. What does not: where chains live
 * (chain.c), how memory is guarded (queue.c), which tables are accepted (table.c). Everything in guest memory is loaded
 * once into a local variable and judged there: the driver may write while we look.
 */
#include <stdlib.h>
#include <string.h>

#include "queue.h"

/* In the byte order of the ring. split_swapped.c compiles this file once more, for the other one. */
#ifndef VU_SPLIT
#define VU_SPLIT vu_split
#define ORDER16(value) (value)
#define ORDER32(value) (value)
#define ORDER64(value) (value)
#endif

static inline uint16_t load16(const uint16_t *at)
{
    return ORDER16(vu_load16(at));
}

static inline uint16_t load16_acquire(const uint16_t *at)
{
    return ORDER16(vu_load16_acquire(at));
}

static uint16_t *used_event(const vu_queue *queue)
{
    return &queue->avail->ring[queue->size];
}

static uint16_t *avail_event(const vu_queue *queue)
{
    return (uint16_t *)&queue->used->ring[queue->size];
}

/* ---- start --------------------------------------------------------------------------------------------- */

static int setup(vu_queue *queue, const struct vu_ring *ring)
{
    if (ring->size & (ring->size - 1))
        return VU_E_SIZE;
    atomic_init(&queue->base, (uint16_t)ring->base);
    struct vu_part desc = {ring->desc, vu_desc_bytes(ring->size), 16, VU_ACCESS_READ};
    struct vu_part avail = {ring->avail, vu_avail_bytes(ring->size), 2, VU_ACCESS_READ};
    struct vu_part used = {ring->used, vu_used_bytes(ring->size), 4, VU_ACCESS_BOTH};
    int code = vu_queue_place(queue, &desc, &queue->desc);
    if (!code)
        code = vu_queue_place(queue, &avail, &queue->avail);
    if (!code)
        code = vu_queue_place(queue, &used, &queue->used);
    /* QEMU gives an I/O virtual address for the log too, the text says a guest address: where we write says itself. */
    if (!code && queue->translator)
        code = vu_map_host_to_guest(queue->map, queue->used, &queue->log_addr);
    if (!code && ring->flags & VU_RING_LOG_USED && queue->log)
        code = vu_log_check(queue->log, queue->log_addr, vu_used_bytes(ring->size));
    return code;
}

/* The used index is the ring's: a guest that has reset the device begins again. With chains left in flight by a process
 * before us, the available index follows from it and not from the base, which the front-end can only guess then. */
static int start(vu_queue *queue)
{
    queue->used_index = queue->signalled = load16_acquire(&queue->used->idx);
    if (queue->inflight.split) {
        int code = vu_inflight_recover(&queue->inflight, queue->size, queue->used_index, queue->resubmit,
                                       &queue->resubmit_count);
        if (code)
            return code;
        if (queue->resubmit_count)
            atomic_store(&queue->base, (uint16_t)(queue->used_index + queue->resubmit_count));
    }
    queue->started = true;
    return 0;
}

/* ---- one chain ----------------------------------------------------------------------------------------- */

static inline struct vu_desc load_desc(const void *table, uint32_t index)
{
    uint64_t words[2];
    vu_table_load(table, index, words);
    return (struct vu_desc){ORDER64(words[0]), ORDER32((uint32_t)words[1]), ORDER16((uint16_t)(words[1] >> 32)),
                            ORDER16((uint16_t)(words[1] >> 48))};
}

static int parse(vu_queue *queue, struct vu_slot *slot, uint16_t head)
{
    struct vu_table table = {queue->desc, queue->size, false};
    uint32_t index = head, seen = 0;
    vu_slot_begin(slot, head);
    for (;;) {
        struct vu_desc desc = load_desc(table.at, index);
        if (!table.indirect)
            slot->chain.descriptors++;
        if (++seen > table.count)
            return VU_E_LOOP;
        if (desc.flags & VU_DESC_INDIRECT) {
            int code = vu_table_enter(queue, &desc, &table);
            if (code)
                return code;
            index = seen = 0;
            continue;
        }
        int code = vu_slot_add(queue, slot, &desc);
        if (code || !(desc.flags & VU_DESC_NEXT))
            return code;
        index = desc.next;
        if (index >= table.count)
            return VU_E_HEAD;
    }
}

static int take(vu_queue *queue, uint16_t head, vu_chain **chain)
{
    atomic_store_explicit(&queue->broken_head, head, memory_order_relaxed);
    if (head >= queue->size || queue->slots[head].out)
        return VU_E_HEAD;
    struct vu_slot *slot = &queue->slots[head];
    int code;
    do {
        code = parse(queue, slot, head);
        code = code ? code : vu_slot_hold(queue, slot);
    } while (code == VU_E_STALE);
    *chain = &slot->chain;
    return code;
}

/* ---- pop ----------------------------------------------------------------------------------------------- */

/* Chains that a process before us had taken; the region counts them as taken already. */
static int pop_resubmitted(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    while (*done < max && queue->resubmit_next < queue->resubmit_count) {
        int code = take(queue, queue->resubmit[queue->resubmit_next].head, &chains[*done]);
        if (code)
            return code;
        queue->slots[queue->resubmit[queue->resubmit_next++].head].again = true;
        *done = *done + 1;
    }
    return 0;
}

/* In postcopy: brings the indirect tables of a batch in several at once, where parsing would wait for one by one. What
 * cannot be had is left to parsing, which says so. */
static void fetch_tables(vu_queue *queue, uint16_t next, uint32_t count)
{
    struct vu_span spans[VU_TABLE_FETCH];
    uint32_t found = 0;
    for (uint32_t i = 0; i < count && found < VU_TABLE_FETCH; i++) {
        uint16_t head = load16(&queue->avail->ring[(uint16_t)(next + i) & (queue->size - 1)]);
        if (head >= queue->size)
            return;
        struct vu_desc desc = load_desc(queue->desc, head);
        found += vu_table_span(queue, &desc, &spans[found]);
    }
    if (found)
        vu_touch_spans(queue->touch, queue->map, spans, found);
}

static int pop(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    if (queue->resubmit_next < queue->resubmit_count)
        return pop_resubmitted(queue, chains, max, done);
    uint16_t next = (uint16_t)atomic_load_explicit(&queue->base, memory_order_relaxed);
    /* Acquire: what the driver wrote before it moved the index is read after. */
    uint32_t ahead = (uint16_t)(load16_acquire(&queue->avail->idx) - next);
    atomic_store_explicit(&queue->broken_head, 0, memory_order_relaxed);
    if (ahead > queue->size)
        return VU_E_INDEX;
    uint32_t count = ahead < max ? ahead : max;
    if (queue->touch && queue->flags & VU_RING_INDIRECT)
        fetch_tables(queue, next, count);
    for (uint32_t i = 0; i < count; i++) {
        uint16_t head = load16(&queue->avail->ring[next & (queue->size - 1)]);
        int code = take(queue, head, &chains[i]);
        if (code)
            return code;
        if (queue->inflight.split)
            vu_inflight_take(&queue->inflight, head);
        atomic_store_explicit(&queue->base, ++next, memory_order_relaxed);
        *done = i + 1;
    }
    return 0;
}

/* What a process before us had taken stays taken: the region names it once more. */
static void unpop(vu_queue *queue, const struct vu_slot *slot)
{
    if (slot->again) {
        queue->resubmit_next--;
        return;
    }
    uint16_t next = (uint16_t)atomic_load_explicit(&queue->base, memory_order_relaxed);
    atomic_store_explicit(&queue->base, (uint16_t)(next - 1), memory_order_relaxed);
    if (queue->inflight.split)
        vu_inflight_finish(&queue->inflight, slot->chain.head);
}

/* ---- push ---------------------------------------------------------------------------------------------- */

/* After the write, never before: the reader clears a bit and then copies the page. */
static int log_used(vu_queue *queue, const void *at, uint64_t length)
{
    if (!queue->log || !(queue->flags & VU_RING_LOG_USED))
        return 0;
    return vu_log_set(queue->log, queue->log_addr + (uint64_t)((const uint8_t *)at - (const uint8_t *)queue->used), length);
}

static int write_entry(vu_queue *queue, const vu_chain *chain, uint32_t length, uint16_t index)
{
    int code = queue->log ? vu_chain_log(queue, chain, length) : 0;
    if (code)
        return code;
    if (queue->inflight.split)
        vu_inflight_link(&queue->inflight, chain->head);
    struct vu_used_entry *entry = &queue->used->ring[index & (queue->size - 1)];
    __atomic_store_n(&entry->id, ORDER32((uint32_t)chain->head), __ATOMIC_RELAXED);
    __atomic_store_n(&entry->len, ORDER32(length), __ATOMIC_RELAXED);
    return log_used(queue, entry, sizeof *entry);
}

static int push(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        int code = write_entry(queue, chains[i], vu_chain_told(chains[i], lengths, i), (uint16_t)(queue->used_index + i));
        if (code && !atomic_load_explicit(&queue->broken, memory_order_relaxed))
            atomic_store_explicit(&queue->broken_head, chains[i]->head, memory_order_relaxed);
        if (code)
            return code;
    }
    queue->used_index = (uint16_t)(queue->used_index + count);
    /* Release: data, entries and log first. */
    vu_store16_release(&queue->used->idx, ORDER16(queue->used_index));
    int code = log_used(queue, &queue->used->idx, sizeof queue->used->idx);
    if (queue->inflight.split) {
        for (uint32_t i = 0; i < count; i++)
            vu_inflight_finish(&queue->inflight, chains[i]->head);
        vu_inflight_seal(&queue->inflight, queue->used_index);
    }
    return code;
}

/* ---- notifications --------------------------------------------------------------------------------------- */

/* NOTIFY_ON_EMPTY (virtio 1.3, 6.4): nothing is available and nothing out. */
static bool ran_empty(vu_queue *queue)
{
    uint16_t next = (uint16_t)atomic_load_explicit(&queue->base, memory_order_relaxed);
    return !vu_queue_out(queue) && load16(&queue->avail->idx) == next;
}

/* The full fences below pair with the driver's: each side writes its index, then reads what the other asked for. Without
 * them both may read the old value, and sleep. */
static bool wants_call(vu_queue *queue)
{
    if (queue->signalled == queue->used_index)
        return false;
    uint16_t before = queue->signalled;
    queue->signalled = queue->used_index;
    atomic_thread_fence(memory_order_seq_cst);
    if (queue->flags & VU_RING_NOTIFY_ON_EMPTY && ran_empty(queue))
        return true;
    if (queue->flags & VU_RING_EVENT_IDX)
        return vu_passed(load16(used_event(queue)), queue->used_index, before);
    return !(load16(&queue->avail->flags) & VU_AVAIL_NO_INTERRUPT);
}

static int arm(vu_queue *queue)
{
    uint16_t next = (uint16_t)atomic_load_explicit(&queue->base, memory_order_relaxed);
    uint16_t *at = queue->flags & VU_RING_EVENT_IDX ? avail_event(queue) : &queue->used->flags;
    vu_store16(at, queue->flags & VU_RING_EVENT_IDX ? ORDER16(next) : 0);
    int code = log_used(queue, at, sizeof *at);
    if (code)
        return code;
    atomic_thread_fence(memory_order_seq_cst);
    return queue->resubmit_next < queue->resubmit_count || load16(&queue->avail->idx) != next;
}

/* With the event index there is nothing to say: the driver kicks when it passes the index that arm left, which is behind
 * us as soon as we have popped. */
static int disarm(vu_queue *queue)
{
    if (queue->flags & VU_RING_EVENT_IDX)
        return 0;
    vu_store16(&queue->used->flags, ORDER16(VU_USED_NO_NOTIFY));
    return log_used(queue, &queue->used->flags, sizeof queue->used->flags);
}

static void spans(const vu_queue *queue, struct vu_span found[3])
{
    found[0] = (struct vu_span){(uintptr_t)queue->desc, vu_desc_bytes(queue->size)};
    found[1] = (struct vu_span){(uintptr_t)queue->avail, vu_avail_bytes(queue->size)};
    found[2] = (struct vu_span){(uintptr_t)queue->used, vu_used_bytes(queue->size)};
}

const struct vu_format VU_SPLIT = {setup, start, pop, unpop, push, wants_call, arm, disarm, spans};
