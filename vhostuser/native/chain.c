/*
 * Chains: where they live from pop to push, what they are made of, copies in and out of them.
 *
 * What belongs here: slots and their segments, translation of a descriptor into them, copies, the dirty log of what was
 * written. What does not: the ring (queue.c, split.c, packed.c).
 */
#include <stdlib.h>
#include <string.h>

#include "queue.h"

/* What one queue may keep in segment arrays outside of its slots, in segments (24 MiB). A block device with 1024 requests
 * of 254 segments needs a quarter of that; only a guest that wants our memory gets there. */
#define LARGE_LIMIT (1u << 20)
/* Arrays up to this size stay with their slot for the next chain; longer ones are freed. */
#define KEPT_CAPACITY 64
/* Virtio 1.2, 2.7.5.2: a chain has at most 2^32 bytes in all. */
#define CHAIN_BYTES_MAX (UINT64_C(1) << 32)

/* ---- the pool ------------------------------------------------------------------------------------------ */

vu_segment *vu_slot_outgrow(vu_queue *queue, struct vu_slot *slot)
{
    vu_chain *chain = &slot->chain;
    uint32_t capacity = slot->capacity * 2;
    if (queue->large + capacity > LARGE_LIMIT)
        return NULL;
    uint64_t *iovas = slot->iovas ? realloc(slot->iovas, capacity * sizeof *iovas) : NULL;
    if (slot->iovas && !iovas)
        return NULL;
    slot->iovas = iovas;
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

/* As vu_map_run. Nearly always the next buffer is in the same region. Behind an IOMMU nothing ever is. */
static inline uint8_t *find_run(vu_queue *queue, uint64_t guest, uint64_t length, uint64_t *run)
{
    struct vu_window *near = &queue->near;
    if (guest - near->guest >= near->length && (queue->translator || !vu_map_window(queue->map, guest, near)))
        return NULL;
    *run = vu_least(length, near->length - (guest - near->guest));
    return near->host + (guest - near->guest);
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
        uint8_t *host = find_run(queue, guest, left, &run);
        if (!host)
            return queue->translator ? vu_translate_buffer(queue, slot, guest, left, writable) : VU_E_RANGE;
        uint32_t at = chain->readable_count + chain->writable_count;
        if (at == slot->capacity && !vu_slot_outgrow(queue, slot))
            return VU_E_NOMEM;
        chain->segments[at] = (vu_segment){host, run, guest};
        (*(writable ? &chain->writable_count : &chain->readable_count))++;
    }
    return 0;
}

void vu_chain_release(vu_queue *queue, vu_chain *chain)
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
        free(slot->iovas);
        slot->iovas = NULL;
        queue->large -= slot->capacity;
        slot->capacity = 0;
    }
}

struct vu_ahead_link *vu_chain_link(struct vu_chain *chain)
{
    return &((struct vu_slot *)chain)->link;
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
