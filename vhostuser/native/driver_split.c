/*
 * The split ring as a driver writes it (virtio 1.2, 2.7).
 *
 * What belongs here: descriptors, indexes, event suppression, and the order of writes. What does not: accounts (driver.c).
 */
#include "driver.h"

static uint16_t *used_event(const vu_driver *driver)
{
    return &driver->avail->ring[driver->size];
}

static uint16_t *avail_event(const vu_driver *driver)
{
    return (uint16_t *)&driver->used->ring[driver->size];
}

static struct vu_desc describe(const vu_buffer *buffer, bool last, uint16_t next)
{
    uint16_t flags = (uint16_t)((last ? 0 : VU_DESC_NEXT) | (buffer->writable ? VU_DESC_WRITE : 0));
    return (struct vu_desc){buffer->guest, buffer->length, flags, last ? 0 : next};
}

static uint32_t write_direct(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint16_t index = driver->free_head;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t next = driver->offers[index].next;
        driver->desc[index] = describe(&buffers[i], i + 1 == count, next);
        index = next;
    }
    return count;
}

static uint32_t write_indirect(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint16_t head = driver->free_head;
    struct vu_desc *table = driver->tables + (uint64_t)head * VU_DRIVER_TABLE;
    for (uint32_t i = 0; i < count; i++)
        table[i] = describe(&buffers[i], i + 1 == count, (uint16_t)(i + 1));
    driver->desc[head] =
        (struct vu_desc){vu_driver_table(driver, head), (uint32_t)vu_desc_bytes(count), VU_DESC_INDIRECT, 0};
    return 1;
}

static uint32_t write_chain(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    vu_store16(&driver->avail->ring[driver->split.added & (driver->size - 1)], driver->free_head);
    return driver->tables ? write_indirect(driver, buffers, count) : write_direct(driver, buffers, count);
}

/* Descriptors are ids: as many leave the free list. */
static void added(vu_driver *driver, uint16_t id, uint32_t descriptors)
{
    for (uint32_t i = 0; i < descriptors; i++)
        id = driver->offers[id].next;
    driver->free_head = id;
    driver->split.added++;
}

static bool publish(vu_driver *driver)
{
    uint16_t before = driver->split.published;
    if (before == driver->split.added)
        return false;
    vu_store16_release(&driver->avail->idx, driver->split.added);
    driver->split.published = driver->split.added;
    /* Pairs with the fence of the device's arm: our index is out before we look whether it sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    if (driver->flags & VU_DRIVER_EVENT_IDX)
        return vu_passed(vu_load16(avail_event(driver)), driver->split.added, before);
    return !(vu_load16(&driver->used->flags) & VU_USED_NO_NOTIFY);
}

static int look(const vu_driver *driver, vu_returned *entry)
{
    uint16_t taken = driver->split.taken;
    uint16_t ahead = (uint16_t)(vu_load16_acquire(&driver->used->idx) - taken);
    const struct vu_used_entry *used = &driver->used->ring[taken & (driver->size - 1)];
    entry->head = __atomic_load_n(&used->id, __ATOMIC_RELAXED);
    entry->length = __atomic_load_n(&used->len, __ATOMIC_RELAXED);
    return ahead > driver->size ? VU_E_INDEX : ahead > 0;
}

static void taken(vu_driver *driver, uint32_t descriptors)
{
    (void)descriptors;
    driver->split.taken++;
}

static void arm(vu_driver *driver)
{
    if (driver->flags & VU_DRIVER_EVENT_IDX)
        vu_store16(used_event(driver), driver->split.taken);
    else
        vu_store16(&driver->avail->flags, 0);
}

/* With the event index: an event just behind what we took, which the device passes again only after a whole turn. */
static void disarm(vu_driver *driver)
{
    if (driver->flags & VU_DRIVER_EVENT_IDX)
        vu_store16(used_event(driver), (uint16_t)(driver->split.taken - 1));
    else
        vu_store16(&driver->avail->flags, VU_AVAIL_NO_INTERRUPT);
}

static uint32_t base(const vu_driver *driver)
{
    return driver->split.published;
}

const struct vu_driver_format vu_driver_split = {
    .avail_bytes = vu_avail_bytes, .used_bytes = vu_used_bytes, .avail_align = 2, .used_align = 4, .write = write_chain,
    .added = added, .publish = publish, .look = look, .taken = taken, .arm = arm, .disarm = disarm, .base = base,
};
