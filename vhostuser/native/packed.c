/*
 * The packed ring as the device sees it (virtio 1.2, 2.8).
 *
 * What belongs here: descriptors, places and wrap counters, event suppression, and the order of writes. What does not:
 * where chains live (chain.c), how memory is guarded (queue.c), which tables are accepted (table.c). Every descriptor is
 * loaded once into local variables and judged there: the driver may write while we look.
 */
#include <stdlib.h>

#include "queue.h"

/* What the second word of a descriptor holds. */
static uint16_t flags_of(uint64_t word)
{
    return (uint16_t)(word >> 48);
}

static struct vu_desc describe(const uint64_t words[2])
{
    return (struct vu_desc){words[0], (uint32_t)words[1], flags_of(words[1]), 0};
}

/* ---- start --------------------------------------------------------------------------------------------- */

static void keep_base(vu_queue *queue)
{
    uint32_t base = vu_place_word(queue->packed.next_avail) | (uint32_t)vu_place_word(queue->packed.next_used) << 16;
    atomic_store_explicit(&queue->base, base, memory_order_relaxed);
}

/* DPDK, and QEMU before 6, give and take the 16 bits of the next available place alone. Where the upper half is zero
 * nothing is taken to be in flight: what was could not come back without an in-flight region, which knows better. */
static int take_base(vu_queue *queue, uint32_t base)
{
    struct vu_place avail = vu_place_of((uint16_t)base);
    struct vu_place used = base >> 16 ? vu_place_of((uint16_t)(base >> 16)) : avail;
    if (avail.index >= queue->size || used.index >= queue->size)
        return VU_E_INDEX;
    queue->packed.held = vu_place_distance(used, avail, queue->size);
    if (queue->packed.held > queue->size)
        return VU_E_INDEX;
    queue->packed.next_avail = avail;
    queue->packed.next_used = used;
    keep_base(queue);
    return 0;
}

/* The dirty log wants guest addresses of what we write. Those of the ring itself are known from the map; the one that
 * SET_VRING_ADDR gives is of no use, since QEMU gives that of the device area for both. */
static int check_log(vu_queue *queue, const struct vu_ring *ring)
{
    int code = vu_map_host_to_guest(queue->map, queue->packed.ring, &queue->packed.ring_guest);
    if (!code)
        code = vu_map_host_to_guest(queue->map, queue->packed.device, &queue->packed.device_guest);
    if (!code)
        code = vu_log_check(queue->log, queue->packed.ring_guest, vu_desc_bytes(ring->size));
    return code ? code : vu_log_check(queue->log, queue->packed.device_guest, sizeof *queue->packed.device);
}

static int setup(vu_queue *queue, const struct vu_ring *ring)
{
    struct vu_part descriptors = {ring->desc, vu_desc_bytes(ring->size), 16, VU_ACCESS_BOTH};
    struct vu_part driver = {ring->avail, sizeof *queue->packed.driver, 4, VU_ACCESS_READ};
    struct vu_part device = {ring->used, sizeof *queue->packed.device, 4, VU_ACCESS_BOTH};
    int code = take_base(queue, ring->base);
    if (!code)
        code = vu_queue_place(queue, &descriptors, &queue->packed.ring);
    if (!code)
        code = vu_queue_place(queue, &driver, &queue->packed.driver);
    if (!code)
        code = vu_queue_place(queue, &device, &queue->packed.device);
    if (!code && ring->flags & VU_RING_LOG_USED && queue->log)
        code = check_log(queue, ring);
    if (code)
        return code;
    queue->packed.free = calloc(ring->size, sizeof *queue->packed.free);
    if (!queue->packed.free)
        return VU_E_NOMEM;
    for (uint32_t i = 0; i < ring->size; i++)
        queue->packed.free[i] = (uint16_t)(ring->size - 1 - i);
    queue->packed.free_count = ring->size;
    return 0;
}

/* After the write, never before: the reader clears a bit and then copies the page. */
static int log_ring(vu_queue *queue, uint16_t index)
{
    if (!queue->log || !(queue->flags & VU_RING_LOG_USED))
        return 0;
    return vu_log_set(queue->log, queue->packed.ring_guest + vu_desc_bytes(index), sizeof *queue->packed.ring);
}

/* Of a batch that a process before us was about to return, places behind the first may say that they are used, which the
 * driver must not see when it gets there. All that lie among those in flight are ours to write, and nobody reads them for
 * what they were: the region has the chains. Done again as often as a start is cut off. */
static int take_back(vu_queue *queue, struct vu_place place, uint32_t count)
{
    int code = 0;
    for (uint32_t i = 1; i < count && !code; i++) {
        place = vu_place_after(place, 1, queue->size);
        vu_store16(&queue->packed.ring[place.index].flags, place.wrap ? VU_PACKED_AVAIL : VU_PACKED_USED);
        code = log_ring(queue, place.index);
    }
    return code;
}

/* Nothing in the ring tells where it goes on. The in-flight region does, and is right where the base is not: a front-end
 * whose back-end died can only give the base of the last start. */
static int start(vu_queue *queue)
{
    if (queue->inflight.packed) {
        struct vu_packed_found found = {queue->packed.next_used, queue->packed.held};
        int code = vu_inflight_packed_recover(&queue->inflight, queue->packed.ring, queue->size, queue->resubmit, &found,
                                              &queue->resubmit_count);
        if (!code)
            code = take_back(queue, found.used, found.held);
        if (code)
            return code;
        queue->packed.held = found.held;
        queue->packed.next_used = found.used;
        queue->packed.next_avail = vu_place_after(found.used, found.held, queue->size);
        keep_base(queue);
    }
    queue->started = true;
    return 0;
}

/* ---- one chain ----------------------------------------------------------------------------------------- */

static int parse_table(vu_queue *queue, struct vu_slot *slot, const struct vu_desc *desc)
{
    struct vu_table table = {queue->packed.ring, queue->size, false};
    int code = vu_table_enter(queue, desc, &table);
    for (uint32_t i = 0; !code && i < table.count; i++) {
        uint64_t words[2];
        vu_table_load(table.at, i, words);
        struct vu_desc inner = describe(words);
        /* DPDK's driver marks the header in front of a frame in several pieces as one to be written (seen in 22.11). */
        if (queue->only_reads)
            inner.flags &= (uint16_t)~VU_DESC_WRITE;
        /* Of the flags only WRITE counts here (2.8.7): a table is as long as its length says. */
        code = inner.flags & VU_DESC_INDIRECT ? VU_E_INDIRECT : vu_slot_add(queue, slot, &inner);
    }
    return code;
}

static inline int parse_one(vu_queue *queue, struct vu_slot *slot, const uint64_t words[2])
{
    struct vu_desc desc = describe(words);
    return desc.flags & VU_DESC_INDIRECT ? parse_table(queue, slot, &desc) : vu_slot_add(queue, slot, &desc);
}

/* The chain is there, with its last descriptor, whose buffer id is the chain's. */
static void parsed(struct vu_slot *slot, const uint64_t last[2], uint32_t descriptors)
{
    slot->chain.head = (uint16_t)(last[1] >> 32);
    slot->chain.descriptors = (uint16_t)descriptors;
}

static bool is_available(const vu_queue *queue, struct vu_place place)
{
    uint16_t flags = vu_load16_acquire(&queue->packed.ring[place.index].flags);
    return !!(flags & VU_PACKED_AVAIL) == place.wrap && !!(flags & VU_PACKED_USED) != place.wrap;
}

/* Parses the chain that begins at the next available place, which was seen to be available. */
static int parse(vu_queue *queue, struct vu_slot *slot)
{
    uint32_t index = queue->packed.next_avail.index, free = queue->size - queue->packed.held, count = 0;
    uint64_t words[2];
    vu_slot_begin(slot, 0);
    do {
        if (count++ == free)
            return VU_E_LOOP;
        vu_table_load(queue->packed.ring, index, words);
        int code = parse_one(queue, slot, words);
        if (code)
            return code;
        if (++index == queue->size)
            index = 0;
    } while (flags_of(words[1]) & VU_DESC_NEXT);
    parsed(slot, words, count);
    return 0;
}

static struct vu_slot *free_slot(const vu_queue *queue)
{
    return &queue->slots[queue->packed.free[queue->packed.free_count - 1]];
}

static void hold(vu_queue *queue, struct vu_slot *slot, vu_chain **chain)
{
    queue->packed.free_count--;
    *chain = &slot->chain;
}

/* ---- pop ----------------------------------------------------------------------------------------------- */

/* Chains that a process before us had taken: the region has their descriptors, the ring may have others by now. */
static int parse_saved(vu_queue *queue, struct vu_slot *slot, const struct vu_taken *taken)
{
    uint16_t entry = slot->entry = taken->head;
    uint64_t words[2] = {0, 0};
    vu_slot_begin(slot, 0);
    for (uint16_t i = 0; i < taken->num; i++) {
        slot->last = entry;
        entry = vu_inflight_packed_load(&queue->inflight, entry, words);
        /* As in the ring: nothing follows a table, or a chain could have as many as it has entries. */
        if (flags_of(words[1]) & VU_DESC_INDIRECT && i + 1 < taken->num)
            return VU_E_INDIRECT;
        int code = parse_one(queue, slot, words);
        if (code)
            return code;
    }
    parsed(slot, words, taken->num);
    return 0;
}

static int pop_resubmitted(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    atomic_store_explicit(&queue->broken_head, 0, memory_order_relaxed);
    while (*done < max && queue->resubmit_next < queue->resubmit_count) {
        struct vu_slot *slot = free_slot(queue);
        int code;
        do {
            code = parse_saved(queue, slot, &queue->resubmit[queue->resubmit_next]);
            code = code ? code : vu_slot_hold(queue, slot);
        } while (code == VU_E_STALE);
        if (code)
            return code;
        hold(queue, slot, &chains[*done]);
        slot->again = true;
        queue->resubmit_next++;
        *done = *done + 1;
    }
    return 0;
}

/* In postcopy: brings the indirect tables of a batch in several at once, where parsing would wait for one by one. What
 * cannot be had is left to parsing, which says so. */
static void fetch_tables(vu_queue *queue, uint32_t max)
{
    struct vu_span spans[VU_TABLE_FETCH];
    struct vu_place place = queue->packed.next_avail;
    uint32_t found = 0;
    for (uint32_t i = 0; i < max && i < queue->size && found < VU_TABLE_FETCH && is_available(queue, place); i++) {
        uint64_t words[2];
        vu_table_load(queue->packed.ring, place.index, words);
        struct vu_desc desc = describe(words);
        found += vu_table_span(queue, &desc, &spans[found]);
        place = vu_place_after(place, 1, queue->size);
    }
    if (found)
        vu_touch_spans(queue->touch, queue->map, spans, found);
}

static int take(vu_queue *queue, vu_chain **chain)
{
    struct vu_place at = queue->packed.next_avail;
    atomic_store_explicit(&queue->broken_head, at.index, memory_order_relaxed);
    struct vu_slot *slot = free_slot(queue);
    int code;
    do {
        code = parse(queue, slot);
        code = code ? code : vu_slot_hold(queue, slot);
    } while (code == VU_E_STALE);
    if (code)
        return code;
    if (queue->inflight.packed)
        vu_inflight_packed_take(&queue->inflight, queue->packed.ring, queue->size, at.index, slot->chain.descriptors, slot);
    queue->packed.held += slot->chain.descriptors;
    queue->packed.next_avail = vu_place_after(at, slot->chain.descriptors, queue->size);
    keep_base(queue);
    hold(queue, slot, chain);
    return 0;
}

static int pop(vu_queue *queue, vu_chain **chains, uint32_t max, volatile uint32_t *done)
{
    if (queue->resubmit_next < queue->resubmit_count)
        return pop_resubmitted(queue, chains, max, done);
    if (queue->touch && queue->flags & VU_RING_INDIRECT)
        fetch_tables(queue, max);
    /* With every place held nothing new can be there, and the place that comes next is one that we have yet to return. */
    while (*done < max && queue->packed.held < queue->size && is_available(queue, queue->packed.next_avail)) {
        int code = take(queue, &chains[*done]);
        if (code)
            return code;
        *done = *done + 1;
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
    queue->packed.held -= slot->chain.descriptors;
    queue->packed.next_avail = vu_place_before(queue->packed.next_avail, slot->chain.descriptors, queue->size);
    keep_base(queue);
    if (queue->inflight.packed)
        vu_inflight_packed_untake(&queue->inflight, slot);
}

/* ---- push ---------------------------------------------------------------------------------------------- */

/* The flags of a used descriptor (2.8.1): WRITE says that something was written (2.8.4). */
static uint16_t used_flags(struct vu_place place, uint32_t length)
{
    return (uint16_t)((place.wrap ? VU_PACKED_AVAIL | VU_PACKED_USED : 0) | (length ? VU_DESC_WRITE : 0));
}

/* Release: data, entries and what the in-flight region needs to know first. */
static int show(vu_queue *queue, uint32_t length, struct vu_place place)
{
    vu_store16_release(&queue->packed.ring[place.index].flags, used_flags(place, length));
    return log_ring(queue, place.index);
}

/* All of a used descriptor but the flags. */
static int write_entry(vu_queue *queue, const vu_chain *chain, uint32_t length, struct vu_place place)
{
    int code = queue->log ? vu_chain_log(queue, chain, length) : 0;
    if (code)
        return code;
    if (queue->inflight.packed)
        vu_inflight_packed_link(&queue->inflight, (const struct vu_slot *)chain);
    struct vu_packed_desc *desc = &queue->packed.ring[place.index];
    __atomic_store_n(&desc->len, length, __ATOMIC_RELAXED);
    vu_store16(&desc->id, chain->head);
    return 0;
}

/* The flags too but those of the first, which hide the others: the driver looks at a batch when it sees them. */
static int write_entries(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count,
                         struct vu_place *end)
{
    struct vu_place place = queue->packed.next_used;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = vu_chain_told(chains[i], lengths, i);
        int code = write_entry(queue, chains[i], length, place);
        if (!code && i)
            code = show(queue, length, place);
        if (code && !atomic_load_explicit(&queue->broken, memory_order_relaxed))
            atomic_store_explicit(&queue->broken_head, place.index, memory_order_relaxed);
        if (code)
            return code;
        place = vu_place_after(place, chains[i]->descriptors, queue->size);
    }
    *end = place;
    return 0;
}

static void settle(vu_queue *queue, vu_chain *const *chains, uint32_t count, struct vu_place end)
{
    uint32_t places = vu_place_distance(queue->packed.next_used, end, queue->size);
    queue->packed.held -= places;
    uint32_t moved = queue->packed.moved + places;
    queue->packed.moved = moved < queue->size ? moved : queue->size;
    if (queue->inflight.packed) {
        for (uint32_t i = 0; i < count; i++)
            vu_inflight_packed_finish(&queue->inflight, (const struct vu_slot *)chains[i]);
        vu_inflight_packed_seal(&queue->inflight, end);
    }
    queue->packed.next_used = end;
    keep_base(queue);
}

static int push(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count)
{
    struct vu_place first = queue->packed.next_used, end;
    int code = write_entries(queue, chains, lengths, count, &end);
    if (code)
        return code;
    if (queue->inflight.packed)
        vu_inflight_packed_move(&queue->inflight, end);
    code = show(queue, vu_chain_told(chains[0], lengths, 0), first);
    if (!code)
        settle(queue, chains, count, end);
    return code;
}

/* ---- notifications --------------------------------------------------------------------------------------- */

/* Whether what was returned since the last signal passes the place that the driver asked for (2.8.10). */
static bool passed(const vu_queue *queue, uint32_t moved)
{
    struct vu_place event = vu_place_of(vu_load16(&queue->packed.driver->at));
    uint32_t behind = vu_place_distance(event, queue->packed.next_used, queue->size);
    return behind && behind <= moved;
}

/* The full fences below pair with the driver's: each side writes where it is, then reads what the other asked for.
 * Without them both may read the old value, and sleep. */
static bool wants_call(vu_queue *queue)
{
    uint32_t moved = queue->packed.moved;
    if (!moved)
        return false;
    queue->packed.moved = 0;
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t flags = vu_load16_acquire(&queue->packed.driver->flags);
    if (flags == VU_EVENT_DESC && queue->flags & VU_RING_EVENT_IDX)
        return passed(queue, moved);
    return flags != VU_EVENT_DISABLE;
}

static int log_device(vu_queue *queue)
{
    if (!queue->log || !(queue->flags & VU_RING_LOG_USED))
        return 0;
    return vu_log_set(queue->log, queue->packed.device_guest, sizeof *queue->packed.device);
}

static int arm(vu_queue *queue)
{
    bool event_idx = queue->flags & VU_RING_EVENT_IDX;
    if (event_idx)
        vu_store16(&queue->packed.device->at, vu_place_word(queue->packed.next_avail));
    vu_store16_release(&queue->packed.device->flags, event_idx ? VU_EVENT_DESC : VU_EVENT_ENABLE);
    int code = log_device(queue);
    if (code)
        return code;
    atomic_thread_fence(memory_order_seq_cst);
    bool more = queue->packed.held < queue->size && is_available(queue, queue->packed.next_avail);
    return queue->resubmit_next < queue->resubmit_count || more;
}

static int disarm(vu_queue *queue)
{
    vu_store16(&queue->packed.device->flags, VU_EVENT_DISABLE);
    return log_device(queue);
}

static void spans(const vu_queue *queue, struct vu_span found[3])
{
    found[0] = (struct vu_span){(uintptr_t)queue->packed.ring, vu_desc_bytes(queue->size)};
    found[1] = (struct vu_span){(uintptr_t)queue->packed.driver, sizeof *queue->packed.driver};
    found[2] = (struct vu_span){(uintptr_t)queue->packed.device, sizeof *queue->packed.device};
}

const struct vu_format vu_packed = {setup, start, pop, unpop, push, wants_call, arm, disarm, spans};
