/*
 * The in-flight region of packed rings (vhost-user specification, "Inflight I/O tracking").
 *
 * What belongs here: its layout and its order of writes. What does not: the mapping, which queue has which part
 * (inflight.c). A chain keeps its descriptors here, since the driver overwrites the ring's; entries that no chain has are
 * in a list. Each change is made beside what counts, in free_head and used_idx, and counts when the old_ fields follow.
 */
#include <stdlib.h>

#include "queue.h"

struct entry {
    uint8_t inflight, padding;
    uint16_t next;
    uint16_t last, num; /* of a chain's first entry: its last one, how many it has */
    uint64_t counter;
    uint16_t id, flags;
    uint32_t len;
    uint64_t addr;
};

struct vu_inflight_packed {
    uint64_t features;
    uint16_t version; /* 0: nobody has used it yet */
    uint16_t desc_num;
    uint16_t free_head, old_free_head;
    uint16_t used_idx, old_used_idx;
    uint8_t used_wrap_counter, old_used_wrap_counter;
    uint8_t padding[10];
    struct entry entries[];
};

_Static_assert(sizeof(struct entry) == 32 && sizeof(struct vu_inflight_packed) == 32, "layout of the specification");

uint64_t vu_inflight_packed_bytes(uint32_t size)
{
    return sizeof(struct vu_inflight_packed) + size * sizeof(struct entry);
}

static uint8_t load8(const uint8_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static void store8(uint8_t *at, uint8_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

/* ---- recovery ------------------------------------------------------------------------------------------ */

static void begin(struct vu_inflight_queue *queue, uint32_t size, struct vu_place used)
{
    struct vu_inflight_packed *region = queue->packed;
    for (uint32_t i = 0; i < size; i++) {
        queue->next[i] = (uint16_t)(i + 1);
        vu_store16(&region->entries[i].next, (uint16_t)(i + 1));
        store8(&region->entries[i].inflight, 0);
    }
    queue->free_head = 0;
    vu_store16(&region->free_head, 0);
    vu_inflight_packed_move(queue, used);
    vu_inflight_packed_seal(queue, used);
    vu_store16_release(&region->desc_num, (uint16_t)size);
    vu_store16_release(&region->version, VU_INFLIGHT_VERSION);
}

static bool any_inflight(const struct vu_inflight_packed *region, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++)
        if (load8(&region->entries[i].inflight))
            return true;
    return false;
}

static bool same(struct vu_place a, struct vu_place b)
{
    return a.index == b.index && a.wrap == b.wrap;
}

/* Goes on from where the last batch that the driver can have seen ended. Whether it saw the one that was under way, the
 * flags of the first descriptor tell, which are written last; but not once the wrap counter is sealed and the index is not:
 * the driver may have offered that place anew. Only in a batch over the ring's end does this look like a step back. */
static int settle(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                  struct vu_packed_found *found)
{
    const struct vu_inflight_packed *region = queue->packed;
    struct vu_place now = {vu_load16(&region->used_idx), load8(&region->used_wrap_counter) & 1};
    struct vu_place old = {vu_load16(&region->old_used_idx), load8(&region->old_used_wrap_counter) & 1};
    if (now.index >= size || old.index >= size)
        return VU_E_INFLIGHT;
    uint16_t available = old.wrap ? VU_PACKED_AVAIL : VU_PACKED_USED;
    uint16_t flags = vu_load16_acquire(&ring[old.index].flags) & (VU_PACKED_AVAIL | VU_PACKED_USED);
    bool half_sealed = now.wrap == old.wrap && now.index < old.index;
    bool seen = half_sealed || (!same(now, old) && flags != available);
    queue->free_head = vu_load16(seen ? &region->free_head : &region->old_free_head);
    found->used = seen ? now : old;
    return !seen && vu_place_distance(old, now, size) > size ? VU_E_INFLIGHT : 0;
}

/* The index first, unlike a move: a step back in the same turn would be taken for half a seal. */
static void withdraw(struct vu_inflight_queue *queue, struct vu_place used)
{
    vu_store16_release(&queue->packed->used_idx, used.index);
    store8(&queue->packed->used_wrap_counter, used.wrap);
}

/* Marks `count` entries of a list, `size` for as many as it has: the last one, or -1 if it leaves the region, runs into
 * one that is marked already, or is too short. */
static int mark(const struct vu_inflight_queue *queue, uint32_t size, uint32_t entry, uint32_t count, bool *marked)
{
    int last = -1;
    for (uint32_t i = 0; i < count; i++, entry = queue->next[entry]) {
        if (entry >= size)
            return count == size && entry == size ? (int)size : -1;
        if (marked[entry])
            return -1;
        marked[entry] = true;
        last = (int)entry;
    }
    return last;
}

/* Lists the chains in flight: their entries and those of the free list are all that there are, each once. */
static int list(struct vu_inflight_queue *queue, uint32_t size, bool *marked, struct vu_taken *taken, uint32_t *count,
                uint32_t *held)
{
    const struct vu_inflight_packed *region = queue->packed;
    if (mark(queue, size, queue->free_head, size, marked) < 0)
        return VU_E_INFLIGHT;
    for (uint32_t i = 0; i < size; i++)
        if (marked[i])
            store8(&queue->packed->entries[i].inflight, 0);
    for (uint32_t i = 0; i < size; i++) {
        const struct entry *entry = &region->entries[i];
        if (!load8(&entry->inflight))
            continue;
        uint16_t num = vu_load16(&entry->num);
        if (!num || num > size - *held || mark(queue, size, i, num, marked) != vu_load16(&entry->last))
            return VU_E_INFLIGHT;
        taken[(*count)++] = (struct vu_taken){__atomic_load_n(&entry->counter, __ATOMIC_RELAXED), (uint16_t)i, num};
        *held += num;
    }
    for (uint32_t i = 0; i < size; i++)
        if (!marked[i])
            return VU_E_INFLIGHT;
    return 0;
}

static int recover(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                   struct vu_taken *taken, struct vu_packed_found *found, uint32_t *count)
{
    for (uint32_t i = 0; i < size; i++)
        queue->next[i] = vu_load16(&queue->packed->entries[i].next);
    int code = settle(queue, ring, size, found);
    bool *marked = code ? NULL : calloc(size, sizeof *marked);
    if (!marked)
        return code ? code : VU_E_NOMEM;
    found->held = 0;
    code = list(queue, size, marked, taken, count, &found->held);
    free(marked);
    if (code)
        return code;
    vu_inflight_sort(taken, *count);
    queue->counter = *count ? taken[*count - 1].counter + 1 : 0;
    vu_store16(&queue->packed->free_head, queue->free_head);
    withdraw(queue, found->used);
    vu_inflight_packed_seal(queue, found->used);
    return 0;
}

int vu_inflight_packed_recover(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                               struct vu_taken *taken, struct vu_packed_found *found, uint32_t *count)
{
    struct vu_inflight_packed *region = queue->packed;
    uint16_t version = vu_load16(&region->version);
    *count = 0;
    if (version > VU_INFLIGHT_VERSION)
        return VU_E_INFLIGHT;
    if (version && vu_load16(&region->desc_num) == size)
        return recover(queue, ring, size, taken, found, count);
    if (version && any_inflight(region, size))
        return VU_E_INFLIGHT;
    begin(queue, size, found->used);
    return 0;
}

uint16_t vu_inflight_packed_load(const struct vu_inflight_queue *queue, uint16_t at, uint64_t words[2])
{
    const struct entry *entry = &queue->packed->entries[at];
    uint64_t id = vu_load16(&entry->id), flags = vu_load16(&entry->flags);
    words[0] = __atomic_load_n(&entry->addr, __ATOMIC_RELAXED);
    words[1] = __atomic_load_n(&entry->len, __ATOMIC_RELAXED) | id << 32 | flags << 48;
    return queue->next[at];
}

/* ---- while the ring runs ------------------------------------------------------------------------------- */

static void save(struct entry *entry, const uint64_t words[2])
{
    __atomic_store_n(&entry->addr, words[0], __ATOMIC_RELAXED);
    __atomic_store_n(&entry->len, (uint32_t)words[1], __ATOMIC_RELAXED);
    vu_store16(&entry->id, (uint16_t)(words[1] >> 32));
    vu_store16(&entry->flags, (uint16_t)(words[1] >> 48));
}

void vu_inflight_packed_take(struct vu_inflight_queue *queue, const struct vu_packed_desc *ring, uint32_t size,
                             uint16_t first, uint16_t count, struct vu_slot *slot)
{
    struct vu_inflight_packed *region = queue->packed;
    struct entry *head = &region->entries[queue->free_head];
    uint16_t entry = slot->entry = queue->free_head;
    vu_store16(&head->num, count);
    __atomic_store_n(&head->counter, queue->counter++, __ATOMIC_RELAXED);
    store8(&head->inflight, 1);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t words[2];
        vu_table_load(ring, (first + i) % size, words);
        save(&region->entries[entry], words);
        slot->last = entry;
        entry = queue->next[entry];
    }
    vu_store16(&head->last, slot->last);
    queue->free_head = entry;
    vu_store16_release(&region->free_head, entry);
    vu_store16_release(&region->old_free_head, entry);
}

void vu_inflight_packed_link(struct vu_inflight_queue *queue, const struct vu_slot *slot)
{
    struct vu_inflight_packed *region = queue->packed;
    queue->next[slot->last] = queue->free_head;
    vu_store16(&region->entries[slot->last].next, queue->free_head);
    queue->free_head = slot->entry;
    vu_store16_release(&region->free_head, slot->entry);
}

void vu_inflight_packed_move(struct vu_inflight_queue *queue, struct vu_place used)
{
    store8(&queue->packed->used_wrap_counter, used.wrap);
    vu_store16_release(&queue->packed->used_idx, used.index);
}

void vu_inflight_packed_finish(struct vu_inflight_queue *queue, const struct vu_slot *slot)
{
    store8(&queue->packed->entries[slot->entry].inflight, 0);
}

/* In this order a crash in between leaves it either taken or free: recovery forgets what is in the list of free ones. */
void vu_inflight_packed_untake(struct vu_inflight_queue *queue, const struct vu_slot *slot)
{
    vu_inflight_packed_link(queue, slot);
    vu_store16_release(&queue->packed->old_free_head, slot->entry);
    vu_inflight_packed_finish(queue, slot);
}

/* The index last: as long as it differs, whoever recovers takes all three from what is new. */
void vu_inflight_packed_seal(struct vu_inflight_queue *queue, struct vu_place used)
{
    struct vu_inflight_packed *region = queue->packed;
    vu_store16_release(&region->old_free_head, queue->free_head);
    store8(&region->old_used_wrap_counter, used.wrap);
    vu_store16_release(&region->old_used_idx, used.index);
}
