/*
 * The driver side of a split ring (virtio 1.2, 2.7), for front-ends, tests and measurements.
 *
 * What belongs here: what a guest's virtio driver does with a ring, and the check of what a device returns. What does not:
 * which buffers to offer, and rings that no driver would write (driverqueue.RawRing). The device is a peer like any other:
 * everything it writes is loaded once and judged.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "queue.h"

#define PART_ALIGN 64 /* the parts do not share a cache line */

struct vu_driver {
    vu_map *map;
    uint32_t size, flags, mask;
    struct vu_driver_parts at;
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

static uint64_t table_bytes(uint32_t size)
{
    return size * vu_desc_bytes(VU_DRIVER_TABLE);
}

/* One part behind the other. A sum that wraps lies outside of every map. */
static struct vu_driver_parts row(uint64_t at, uint32_t size)
{
    struct vu_driver_parts parts = {.desc = at};
    parts.avail = parts.desc + align(vu_desc_bytes(size));
    parts.used = parts.avail + align(vu_avail_bytes(size));
    parts.tables = parts.used + align(vu_used_bytes(size));
    return parts;
}

uint64_t vu_driver_bytes(uint32_t size, uint32_t flags)
{
    return row(0, size).tables + (flags & VU_DRIVER_INDIRECT ? table_bytes(size) : 0);
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

static int find(vu_map *map, uint64_t guest, uint64_t bytes, uint64_t alignment, void *host)
{
    uint8_t *at = bytes > UINT64_MAX - guest ? NULL : vu_map_guest(map, guest, bytes);
    memcpy(host, &at, sizeof at);
    return !at ? VU_E_RANGE : guest % alignment || (uintptr_t)at % alignment ? VU_E_ALIGN : 0;
}

/* The parts as pointers into `map`; the driver is changed only if all are there. */
static int resolve(vu_driver *driver, vu_map *map)
{
    struct vu_desc *desc, *tables = NULL;
    struct vu_avail *avail;
    struct vu_used *used;
    int code = find(map, driver->at.desc, vu_desc_bytes(driver->size), 16, &desc);
    if (!code)
        code = find(map, driver->at.avail, vu_avail_bytes(driver->size), 2, &avail);
    if (!code)
        code = find(map, driver->at.used, vu_used_bytes(driver->size), 4, &used);
    if (!code && driver->flags & VU_DRIVER_INDIRECT)
        code = find(map, driver->at.tables, table_bytes(driver->size), 16, &tables);
    if (code)
        return code;
    driver->desc = desc;
    driver->avail = avail;
    driver->used = used;
    driver->tables = tables;
    return 0;
}

static int clear(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    memset(driver->desc, 0, vu_desc_bytes(driver->size));
    memset(driver->avail, 0, vu_avail_bytes(driver->size));
    memset(driver->used, 0, vu_used_bytes(driver->size));
    vu_guard_leave(&guard);
    return 0;
}

vu_driver *vu_driver_place(vu_map *map, const struct vu_driver_parts *parts, uint32_t size, uint32_t flags, int *error)
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
    driver->size = driver->free_count = size;
    driver->mask = size - 1;
    driver->flags = flags;
    driver->at = *parts;
    for (uint32_t i = 0; i < size; i++)
        driver->offers[i].next = (uint16_t)(i + 1);
    *error = resolve(driver, map);
    if (!*error)
        *error = clear(driver);
    if (!*error)
        return driver;
    vu_driver_free(driver);
    return NULL;
}

vu_driver *vu_driver_new(vu_map *map, uint64_t at, uint32_t size, uint32_t flags, int *error)
{
    struct vu_driver_parts parts = row(at, size);
    if (at % PART_ALIGN) {
        *error = VU_E_ALIGN;
        return NULL;
    }
    return vu_driver_place(map, &parts, size, flags, error);
}

int vu_driver_move(vu_driver *driver, vu_map *map)
{
    int code = resolve(driver, map);
    if (code)
        return code;
    vu_map_get(map);
    vu_map_put(driver->map);
    driver->map = map;
    return 0;
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
    return driver->at.desc;
}

uint64_t vu_driver_avail(const vu_driver *driver)
{
    return driver->at.avail;
}

uint64_t vu_driver_used(const vu_driver *driver)
{
    return driver->at.used;
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
    uint64_t guest = driver->at.tables + head * vu_desc_bytes(VU_DRIVER_TABLE);
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

int vu_driver_add_many(vu_driver *driver, const vu_buffer *buffers, const uint32_t *counts, uint32_t chains, uint16_t *heads)
{
    for (uint32_t i = 0; i < chains; buffers += counts[i++]) {
        int head = vu_driver_add(driver, buffers, counts[i]);
        if (head < 0)
            return i ? (int)i : head;
        heads[i] = (uint16_t)head;
    }
    return (int)chains;
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

/* Loads the next used entry: 1, 0 if there is none, or a code. */
static int look(vu_driver *driver, vu_returned *entry)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    uint16_t ahead = (uint16_t)(vu_load16_acquire(&driver->used->idx) - driver->taken);
    const struct vu_used_entry *used = &driver->used->ring[driver->taken & driver->mask];
    entry->head = __atomic_load_n(&used->id, __ATOMIC_RELAXED);
    entry->length = __atomic_load_n(&used->len, __ATOMIC_RELAXED);
    vu_guard_leave(&guard);
    return ahead > driver->size ? VU_E_INDEX : ahead > 0;
}

static int take(vu_driver *driver, vu_returned *returned)
{
    int code = look(driver, returned);
    if (code > 0)
        code = reclaim(driver, returned->head, returned->length);
    if (code > 0)
        driver->taken++;
    return code;
}

int vu_driver_take_many(vu_driver *driver, vu_returned *returned, uint32_t max)
{
    for (uint32_t i = 0; i < max; i++) {
        int code = take(driver, &returned[i]);
        if (code <= 0)
            return i ? (int)i : code;
    }
    return (int)max;
}

int vu_driver_take(vu_driver *driver, uint16_t *head, uint32_t *length)
{
    vu_returned returned;
    int code = take(driver, &returned);
    if (code > 0) {
        *head = (uint16_t)returned.head;
        *length = returned.length;
    }
    return code;
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

/* ---- waiting ------------------------------------------------------------------------------------------- */

#define LONGEST_NAP_NS 1000000

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static int used_some(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    bool some = vu_load16_acquire(&driver->used->idx) != driver->taken;
    vu_guard_leave(&guard);
    return some;
}

/* Looks until `end`, at once until `spin`, then after naps that grow. */
static int look_until(vu_driver *driver, uint64_t spin, uint64_t end)
{
    struct timespec nap = {.tv_nsec = 1000};
    for (;;) {
        uint64_t time = now();
        int some = used_some(driver);
        if (some || time >= end)
            return some;
        if (time < spin) {
            sched_yield(); /* the device may share our CPU */
            continue;
        }
        nanosleep(&nap, NULL);
        nap.tv_nsec = nap.tv_nsec < LONGEST_NAP_NS ? 2 * nap.tv_nsec : LONGEST_NAP_NS;
    }
}

static int sleep_until(vu_driver *driver, int call, uint64_t end)
{
    for (;;) {
        uint64_t count, time = now();
        int some = vu_driver_arm(driver);
        if (some || time >= end)
            return some;
        struct pollfd fd = {.fd = call, .events = POLLIN};
        struct timespec left = {(time_t)((end - time) / 1000000000), (long)((end - time) % 1000000000)};
        int ready = ppoll(&fd, 1, &left, NULL);
        if (ready < 0 && errno != EINTR)
            return VU_E_SYS;
        if (ready > 0 && read(call, &count, sizeof count) < 0 && errno != EAGAIN)
            return VU_E_SYS;
    }
}

int vu_driver_wait(vu_driver *driver, int call, uint64_t spin_ns, uint64_t timeout_ns)
{
    uint64_t start = now(), end = timeout_ns > UINT64_MAX - start ? UINT64_MAX : start + timeout_ns;
    uint64_t spin = spin_ns < end - start ? start + spin_ns : end;
    int some = look_until(driver, spin, call < 0 ? end : spin);
    return some || call < 0 ? some : sleep_until(driver, call, end);
}
