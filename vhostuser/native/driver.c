/*
 * The driver side of a split ring (virtio 1.2, 2.7), for front-ends, tests and measurements.
 *
 * What belongs here: what a guest's virtio driver does with a ring, and the check of what a device returns. What does not:
 * which buffers to offer. The device is a peer like any other: everything it writes is loaded once and judged.
 */
#include <stdlib.h>
#include <string.h>

#include "queue.h"

#define PART_ALIGN 64 /* the parts do not share a cache line */

struct vu_driver {
    vu_map *map;
    uint32_t size, flags, mask;
    uint64_t at;
    struct vu_desc *desc;
    struct vu_avail *avail;
    struct vu_used *used;
    struct vu_desc *tables; /* [size][VU_DRIVER_TABLE], NULL without VU_DRIVER_INDIRECT */
    uint32_t free_count;    /* descriptors */
    uint16_t free_head;
    uint16_t added;     /* available index with what was added */
    uint16_t published; /* the index that the device sees */
    uint16_t taken;     /* used index up to which we have looked */
    struct offer {
        uint16_t next;        /* of the free list, or of the chain */
        uint16_t descriptors; /* of the chain that starts here; 0: none does */
        uint64_t writable;    /* bytes */
    } offers[];
};

static uint64_t align(uint64_t value)
{
    return (value + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;
}

static uint64_t avail_offset(uint32_t size)
{
    return align(vu_desc_bytes(size));
}

static uint64_t used_offset(uint32_t size)
{
    return avail_offset(size) + align(vu_avail_bytes(size));
}

static uint64_t tables_offset(uint32_t size)
{
    return used_offset(size) + align(vu_used_bytes(size));
}

uint64_t vu_driver_bytes(uint32_t size, uint32_t flags)
{
    uint64_t tables = flags & VU_DRIVER_INDIRECT ? size * vu_desc_bytes(VU_DRIVER_TABLE) : 0;
    return tables_offset(size) + tables;
}

static uint16_t *used_event(const vu_driver *driver)
{
    return &driver->avail->ring[driver->size];
}

static uint16_t *avail_event(const vu_driver *driver)
{
    return (uint16_t *)&driver->used->ring[driver->size];
}

/* ---- life ---------------------------------------------------------------------------------------------- */

static int clear(vu_driver *driver, uint8_t *host)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    memset(host, 0, tables_offset(driver->size));
    vu_guard_leave(&guard);
    return 0;
}

static int lay_out(vu_driver *driver)
{
    uint8_t *host = vu_map_guest(driver->map, driver->at, vu_driver_bytes(driver->size, driver->flags));
    if (!host)
        return VU_E_RANGE;
    if (driver->at % PART_ALIGN || (uintptr_t)host % PART_ALIGN)
        return VU_E_ALIGN;
    driver->desc = (struct vu_desc *)host;
    driver->avail = (struct vu_avail *)(host + avail_offset(driver->size));
    driver->used = (struct vu_used *)(host + used_offset(driver->size));
    if (driver->flags & VU_DRIVER_INDIRECT)
        driver->tables = (struct vu_desc *)(host + tables_offset(driver->size));
    for (uint32_t i = 0; i < driver->size; i++)
        driver->offers[i].next = (uint16_t)(i + 1);
    driver->free_count = driver->size;
    return clear(driver, host);
}

vu_driver *vu_driver_new(vu_map *map, uint64_t at, uint32_t size, uint32_t flags, int *error)
{
    if (!size || size > VU_SPLIT_SIZE_MAX || size & (size - 1)) {
        *error = VU_E_SIZE;
        return NULL;
    }
    vu_driver *driver = calloc(1, sizeof *driver + size * sizeof *driver->offers);
    if (!driver) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    vu_map_get(driver->map = map);
    driver->size = size;
    driver->mask = size - 1;
    driver->flags = flags;
    driver->at = at;
    *error = lay_out(driver);
    if (!*error)
        return driver;
    vu_driver_free(driver);
    return NULL;
}

void vu_driver_free(vu_driver *driver)
{
    if (!driver)
        return;
    vu_map_put(driver->map);
    free(driver);
}

uint64_t vu_driver_desc(const vu_driver *driver)
{
    return driver->at;
}

uint64_t vu_driver_avail(const vu_driver *driver)
{
    return driver->at + avail_offset(driver->size);
}

uint64_t vu_driver_used(const vu_driver *driver)
{
    return driver->at + used_offset(driver->size);
}

/* ---- offering ------------------------------------------------------------------------------------------ */

static struct vu_desc describe(const vu_buffer *buffer, bool last, uint16_t next)
{
    uint16_t flags = (uint16_t)((last ? 0 : VU_DESC_NEXT) | (buffer->writable ? VU_DESC_WRITE : 0));
    return (struct vu_desc){buffer->guest, buffer->length, flags, last ? 0 : next};
}

/* Both write descriptors from the head of the free list on, and return what follows them there: they are taken off it when
 * all is written, for the memory may be gone halfway, and come back. */
static uint16_t write_direct(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint16_t index = driver->free_head;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t next = driver->offers[index].next;
        driver->desc[index] = describe(&buffers[i], i + 1 == count, next);
        index = next;
    }
    return index;
}

static uint16_t write_indirect(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint16_t head = driver->free_head;
    struct vu_desc *table = driver->tables + (uint64_t)head * VU_DRIVER_TABLE;
    for (uint32_t i = 0; i < count; i++)
        table[i] = describe(&buffers[i], i + 1 == count, (uint16_t)(i + 1));
    uint64_t guest = driver->at + tables_offset(driver->size) + head * vu_desc_bytes(VU_DRIVER_TABLE);
    driver->desc[head] = (struct vu_desc){guest, (uint32_t)vu_desc_bytes(count), VU_DESC_INDIRECT, 0};
    return driver->offers[head].next;
}

int vu_driver_add(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint32_t wanted = driver->tables ? 1 : count;
    if (!count || wanted > driver->free_count || (driver->tables && count > VU_DRIVER_TABLE))
        return VU_E_SIZE;
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    uint16_t head = driver->free_head;
    uint16_t rest = driver->tables ? write_indirect(driver, buffers, count) : write_direct(driver, buffers, count);
    vu_store16(&driver->avail->ring[driver->added & driver->mask], head);
    vu_guard_leave(&guard);
    driver->added++;
    driver->free_head = rest;
    driver->free_count -= wanted;
    struct offer *offer = &driver->offers[head];
    offer->descriptors = (uint16_t)wanted;
    offer->writable = 0;
    for (uint32_t i = 0; i < count; i++)
        offer->writable += buffers[i].writable ? buffers[i].length : 0;
    return head;
}

int vu_driver_publish(vu_driver *driver)
{
    uint16_t before = driver->published;
    if (before == driver->added)
        return 0;
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    vu_store16_release(&driver->avail->idx, driver->added);
    driver->published = driver->added;
    /* Pairs with the fence of the device's arm: our index is out before we look whether it sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    bool kick = driver->flags & VU_DRIVER_EVENT_IDX ? vu_passed(vu_load16(avail_event(driver)), driver->added, before)
                                                    : !(vu_load16(&driver->used->flags) & VU_USED_NO_NOTIFY);
    vu_guard_leave(&guard);
    return kick;
}

/* ---- taking back --------------------------------------------------------------------------------------- */

static int reclaim(vu_driver *driver, uint32_t id, uint32_t length)
{
    if (id >= driver->size || !driver->offers[id].descriptors)
        return VU_E_HEAD;
    struct offer *offer = &driver->offers[id];
    if (length > offer->writable)
        return VU_E_SIZE;
    /* The chain is still linked by `next` as it was taken off the free list. */
    uint16_t last = (uint16_t)id;
    for (uint32_t i = 1; i < offer->descriptors; i++)
        last = driver->offers[last].next;
    driver->offers[last].next = driver->free_head;
    driver->free_head = (uint16_t)id;
    driver->free_count += offer->descriptors;
    offer->descriptors = 0;
    return 1;
}

int vu_driver_take(vu_driver *driver, uint16_t *head, uint32_t *length)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    uint16_t ahead = (uint16_t)(vu_load16_acquire(&driver->used->idx) - driver->taken);
    const struct vu_used_entry *entry = &driver->used->ring[driver->taken & driver->mask];
    uint32_t id = __atomic_load_n(&entry->id, __ATOMIC_RELAXED);
    uint32_t written = __atomic_load_n(&entry->len, __ATOMIC_RELAXED);
    vu_guard_leave(&guard);
    if (!ahead)
        return 0;
    if (ahead > driver->size)
        return VU_E_INDEX;
    int code = reclaim(driver, id, written);
    if (code < 0)
        return code;
    driver->taken++;
    *head = (uint16_t)id;
    *length = written;
    return 1;
}

int vu_driver_arm(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    if (driver->flags & VU_DRIVER_EVENT_IDX)
        vu_store16(used_event(driver), driver->taken);
    else
        vu_store16(&driver->avail->flags, 0);
    atomic_thread_fence(memory_order_seq_cst);
    bool more = vu_load16_acquire(&driver->used->idx) != driver->taken;
    vu_guard_leave(&guard);
    return more;
}

int vu_driver_disarm(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    /* With the event index: an event just behind what we took, which the device passes again only after a whole turn. */
    if (driver->flags & VU_DRIVER_EVENT_IDX)
        vu_store16(used_event(driver), (uint16_t)(driver->taken - 1));
    else
        vu_store16(&driver->avail->flags, VU_AVAIL_NO_INTERRUPT);
    vu_guard_leave(&guard);
    return 0;
}
