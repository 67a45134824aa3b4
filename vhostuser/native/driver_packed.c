/*
 * The packed ring as a driver writes it (virtio 1.2, 2.8).
 *
 * What belongs here: descriptors, places, event suppression, and the order of writes. What does not: accounts (driver.c).
 */
#include "driver.h"

static uint64_t event_bytes(uint32_t size)
{
    (void)size;
    return sizeof(struct vu_packed_event);
}

/* The flags of an available descriptor (2.8.1). */
static uint16_t available(struct vu_place place, uint32_t more)
{
    return (uint16_t)((place.wrap ? VU_PACKED_AVAIL : VU_PACKED_USED) | more);
}

static uint16_t kind(const vu_buffer *buffer)
{
    return buffer->writable ? VU_DESC_WRITE : 0;
}

/* The flags last: a device may look at a descriptor as soon as those before it are there. Those of the first one that was
 * not published are kept, which hides all that follow. */
static void store(vu_driver *driver, struct vu_place place, uint64_t guest, uint32_t length, uint16_t flags)
{
    struct vu_packed_desc *desc = &driver->ring[place.index];
    desc->addr = guest;
    desc->len = length;
    desc->id = driver->free_head;
    if (place.index == driver->packed.published.index && place.wrap == driver->packed.published.wrap)
        driver->packed.first_flags = flags;
    else
        vu_store16_release(&desc->flags, flags);
}

static uint32_t write_direct(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct vu_place place = vu_place_after(driver->packed.added, i, driver->size);
        uint32_t more = kind(&buffers[i]) | (i + 1 < count ? VU_DESC_NEXT : 0);
        store(driver, place, buffers[i].guest, buffers[i].length, available(place, more));
    }
    return count;
}

static uint32_t write_indirect(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint16_t id = driver->free_head;
    struct vu_packed_desc *table = (struct vu_packed_desc *)driver->tables + (uint64_t)id * VU_DRIVER_TABLE;
    for (uint32_t i = 0; i < count; i++)
        table[i] = (struct vu_packed_desc){buffers[i].guest, buffers[i].length, 0, kind(&buffers[i])};
    struct vu_place place = driver->packed.added;
    store(driver, place, vu_driver_table(driver, id), (uint32_t)vu_desc_bytes(count), available(place, VU_DESC_INDIRECT));
    return 1;
}

static uint32_t write_chain(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    return driver->tables ? write_indirect(driver, buffers, count) : write_direct(driver, buffers, count);
}

static void added(vu_driver *driver, uint16_t id, uint32_t descriptors)
{
    driver->free_head = driver->offers[id].next;
    driver->packed.added = vu_place_after(driver->packed.added, descriptors, driver->size);
}

static bool publish(vu_driver *driver)
{
    struct vu_place before = driver->packed.published, now = driver->packed.added;
    uint32_t moved = vu_place_distance(before, now, driver->size);
    if (!moved)
        return false;
    vu_store16_release(&driver->ring[before.index].flags, driver->packed.first_flags);
    driver->packed.published = now;
    /* Pairs with the fence of the device's arm: our flags are out before we look whether it sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t flags = vu_load16_acquire(&driver->device->flags);
    if (flags != VU_EVENT_DESC || !(driver->flags & VU_DRIVER_EVENT_IDX))
        return flags != VU_EVENT_DISABLE;
    uint32_t behind = vu_place_distance(vu_place_of(vu_load16(&driver->device->at)), now, driver->size);
    return behind && behind <= moved;
}

/* The length counts only if the device says that it has written (2.8.4). */
static int look(const vu_driver *driver, vu_returned *entry)
{
    struct vu_place place = driver->packed.taken;
    const struct vu_packed_desc *desc = &driver->ring[place.index];
    uint16_t flags = vu_load16_acquire(&desc->flags);
    entry->head = vu_load16(&desc->id);
    entry->length = flags & VU_DESC_WRITE ? __atomic_load_n(&desc->len, __ATOMIC_RELAXED) : 0;
    return !!(flags & VU_PACKED_AVAIL) == place.wrap && !!(flags & VU_PACKED_USED) == place.wrap;
}

static void taken(vu_driver *driver, uint32_t descriptors)
{
    driver->packed.taken = vu_place_after(driver->packed.taken, descriptors, driver->size);
}

static void arm(vu_driver *driver)
{
    bool event_idx = driver->flags & VU_DRIVER_EVENT_IDX;
    if (event_idx)
        vu_store16(&driver->driver->at, vu_place_word(driver->packed.taken));
    vu_store16_release(&driver->driver->flags, event_idx ? VU_EVENT_DESC : VU_EVENT_ENABLE);
}

static void disarm(vu_driver *driver)
{
    vu_store16(&driver->driver->flags, VU_EVENT_DISABLE);
}

static uint32_t base(const vu_driver *driver)
{
    return vu_place_word(driver->packed.published) | (uint32_t)vu_place_word(driver->packed.taken) << 16;
}

const struct vu_driver_format vu_driver_packed = {
    .avail_bytes = event_bytes, .used_bytes = event_bytes, .avail_align = 4, .used_align = 4, .write = write_chain,
    .added = added, .publish = publish, .look = look, .taken = taken, .arm = arm, .disarm = disarm, .base = base,
};
