/*
 * The driver side of a ring, whatever its format, for front-ends, tests and measurements.
 *
 * What belongs here: where the parts lie, which chains are out, the check of what a device returns, waiting. What does not:
 * how a chain is written and returned (driver_split.c, driver_packed.c), which buffers to offer, and rings that no driver
 * would write (driverqueue.RawRing). The device is a peer like any other: everything it writes is loaded once and judged.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

#define PART_ALIGN 64 /* the parts do not share a cache line */

static uint64_t align(uint64_t value)
{
    return (value + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;
}

static uint64_t table_bytes(uint32_t size)
{
    return size * vu_desc_bytes(VU_DRIVER_TABLE);
}

static const struct vu_driver_format *format_of(uint32_t flags)
{
    return flags & VU_DRIVER_PACKED ? &vu_driver_packed : &vu_driver_split;
}

/* One part behind the other. A sum that wraps lies outside of every map. */
static struct vu_driver_parts row(uint64_t at, uint32_t size, const struct vu_driver_format *format)
{
    struct vu_driver_parts parts = {.desc = at};
    parts.avail = parts.desc + align(vu_desc_bytes(size));
    parts.used = parts.avail + align(format->avail_bytes(size));
    parts.tables = parts.used + align(format->used_bytes(size));
    return parts;
}

uint64_t vu_driver_bytes(uint32_t size, uint32_t flags)
{
    return row(0, size, format_of(flags)).tables + (flags & VU_DRIVER_INDIRECT ? table_bytes(size) : 0);
}

/* ---- life ---------------------------------------------------------------------------------------------- */

static int find(vu_map *map, uint64_t guest, uint64_t bytes, uint64_t alignment, void **host)
{
    *host = bytes > UINT64_MAX - guest ? NULL : vu_map_guest(map, guest, bytes);
    return !*host ? VU_E_RANGE : guest % alignment || (uintptr_t)*host % alignment ? VU_E_ALIGN : 0;
}

/* The parts as pointers into `map`; the driver is changed only if all are there. */
static int resolve(vu_driver *driver, vu_map *map)
{
    const struct vu_driver_format *format = driver->format;
    uint32_t size = driver->size;
    void *parts[3], *tables = NULL;
    int code = find(map, driver->at.desc, vu_desc_bytes(size), 16, &parts[0]);
    if (!code)
        code = find(map, driver->at.avail, format->avail_bytes(size), format->avail_align, &parts[1]);
    if (!code)
        code = find(map, driver->at.used, format->used_bytes(size), format->used_align, &parts[2]);
    if (!code && driver->flags & VU_DRIVER_INDIRECT)
        code = find(map, driver->at.tables, table_bytes(size), 16, &tables);
    if (code)
        return code;
    memcpy(driver->parts, parts, sizeof parts);
    driver->tables = tables;
    return 0;
}

static int clear(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    memset(driver->parts[0], 0, vu_desc_bytes(driver->size));
    memset(driver->parts[1], 0, driver->format->avail_bytes(driver->size));
    memset(driver->parts[2], 0, driver->format->used_bytes(driver->size));
    vu_guard_leave(&guard);
    return 0;
}

static bool is_size(uint32_t size, uint32_t flags)
{
    return size && size <= VU_RING_SIZE_MAX && (flags & VU_DRIVER_PACKED || !(size & (size - 1)));
}

vu_driver *vu_driver_place(vu_map *map, const struct vu_driver_parts *parts, uint32_t size, uint32_t flags, int *error)
{
    if (!is_size(size, flags)) {
        *error = VU_E_SIZE;
        return NULL;
    }
    vu_driver *driver = calloc(1, sizeof *driver + size * sizeof *driver->offers);
    if (!driver) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    vu_map_get(driver->map = map);
    driver->format = format_of(flags);
    driver->size = driver->free_count = size;
    driver->flags = flags;
    driver->at = *parts;
    if (flags & VU_DRIVER_PACKED)
        driver->packed.added.wrap = driver->packed.published.wrap = driver->packed.taken.wrap = true;
    for (uint32_t i = 0; i < size; i++)
        driver->offers[i].next = (uint16_t)((i + 1) % size);
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
    struct vu_driver_parts parts = row(at, size, format_of(flags));
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

uint32_t vu_driver_base(const vu_driver *driver)
{
    return driver->format->base(driver);
}

/* ---- offering ------------------------------------------------------------------------------------------ */

int vu_driver_add(vu_driver *driver, const vu_buffer *buffers, uint32_t count)
{
    uint32_t wanted = driver->tables ? 1 : count;
    if (!count || wanted > driver->free_count || (driver->tables && count > VU_DRIVER_TABLE))
        return VU_E_SIZE;
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    uint32_t descriptors = driver->format->write(driver, buffers, count);
    vu_guard_leave(&guard);
    uint16_t id = driver->free_head;
    struct vu_offer *offer = &driver->offers[id];
    driver->format->added(driver, id, descriptors);
    driver->free_count -= descriptors;
    offer->descriptors = (uint16_t)descriptors;
    offer->writable = 0;
    for (uint32_t i = 0; i < count; i++)
        offer->writable += buffers[i].writable ? buffers[i].length : 0;
    return id;
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
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    bool kick = driver->format->publish(driver);
    vu_guard_leave(&guard);
    return kick;
}

/* ---- taking back --------------------------------------------------------------------------------------- */

static int look(vu_driver *driver, vu_returned *entry)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    int found = driver->format->look(driver, entry);
    vu_guard_leave(&guard);
    return found;
}

/* Puts the ids of a chain in front of the free list. */
static void free_ids(vu_driver *driver, uint16_t id, uint32_t descriptors)
{
    /* Split: the chain is still linked by `next` as it was taken off the free list. */
    uint16_t last = id;
    for (uint32_t i = 1; i < descriptors && !(driver->flags & VU_DRIVER_PACKED); i++)
        last = driver->offers[last].next;
    driver->offers[last].next = driver->free_head;
    driver->free_head = id;
}

/* The ids are a circle: the list goes on where it is, and descriptors are used in the order of the ring (2.7.9). */
static void free_oldest(vu_driver *driver, uint16_t id, uint32_t descriptors)
{
    for (uint32_t i = driver->flags & VU_DRIVER_PACKED ? 1 : descriptors; i; i--)
        id = driver->offers[id].next;
    driver->order.oldest = id;
}

static bool is_out(const vu_driver *driver, uint32_t id)
{
    return id < driver->size && driver->offers[id].descriptors;
}

static int reclaim(vu_driver *driver, uint32_t id, uint32_t length)
{
    if (!is_out(driver, id))
        return VU_E_HEAD;
    struct vu_offer *offer = &driver->offers[id];
    if (length > offer->writable)
        return VU_E_SIZE;
    uint32_t descriptors = offer->descriptors;
    (driver->flags & VU_DRIVER_IN_ORDER ? free_oldest : free_ids)(driver, (uint16_t)id, descriptors);
    driver->free_count += descriptors;
    offer->descriptors = 0;
    driver->format->taken(driver, descriptors);
    return 1;
}

/* 2.7.9, 2.8.10: one entry with the id of the last chain stands for those before it too. */
static int take_in_order(vu_driver *driver, vu_returned *returned)
{
    vu_returned *entry = &driver->order.entry;
    int code = driver->order.open ? 1 : look(driver, entry);
    if (code <= 0)
        return code;
    if (!is_out(driver, entry->head) || !is_out(driver, driver->order.oldest))
        return VU_E_HEAD;
    returned->head = driver->order.oldest;
    driver->order.open = returned->head != entry->head;
    returned->length = driver->order.open ? (uint32_t)driver->offers[returned->head].writable : entry->length;
    return reclaim(driver, returned->head, returned->length);
}

static int take(vu_driver *driver, vu_returned *returned)
{
    if (driver->flags & VU_DRIVER_IN_ORDER)
        return take_in_order(driver, returned);
    int code = look(driver, returned);
    return code > 0 ? reclaim(driver, returned->head, returned->length) : code;
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

static int used_some(vu_driver *driver)
{
    vu_returned entry;
    if (driver->order.open)
        return 1;
    int found = look(driver, &entry);
    return found == VU_E_FAULT ? found : found != 0; /* nonsense is something to be told of, too */
}

int vu_driver_arm(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    driver->format->arm(driver);
    atomic_thread_fence(memory_order_seq_cst);
    vu_guard_leave(&guard);
    return used_some(driver);
}

int vu_driver_disarm(vu_driver *driver)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, driver->map))
        return VU_E_FAULT;
    driver->format->disarm(driver);
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
        struct iovec iov = {&count, sizeof count};
        int some = vu_driver_arm(driver);
        if (some || time >= end)
            return some;
        struct pollfd fd = {.fd = call, .events = POLLIN};
        struct timespec left = {(time_t)((end - time) / 1000000000), (long)((end - time) % 1000000000)};
        int ready = ppoll(&fd, 1, &left, NULL);
        if (ready < 0 && errno != EINTR)
            return VU_E_SYS;
        /* A back-end may make it a blocking one and read it itself, so poll's word is not enough. */
        if (ready > 0 && preadv2(call, &iov, 1, -1, RWF_NOWAIT) < 0 && errno != EAGAIN)
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
