/*
 * A guest's memory and the judgement of popped chains, for the programs about rings in this directory.
 */
#ifndef VHOSTUSER_TEST_GUEST_H
#define VHOSTUSER_TEST_GUEST_H

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "core.h"

#define NEAR_SIZE (UINT64_C(1) << 20)
#define NEXT_SIZE (UINT64_C(1) << 16)
#define FAR_GUEST (UINT64_C(1) << 32)
#define FAR_SIZE (UINT64_C(1) << 20)
#define LOG_SIZE (UINT64_C(1) << 18)
#define USER (UINT64_C(1) << 46)

static inline int file_of(uint64_t size)
{
    int fd = memfd_create("rings", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

/* ---- a guest ------------------------------------------------------------------------------------------- */

struct guest {
    int fds[3];
    vu_map *map;
};

static const struct { uint64_t guest, size; } layout[3] = {{0, NEAR_SIZE}, {NEAR_SIZE, NEXT_SIZE}, {FAR_GUEST, FAR_SIZE}};

static inline void open_guest(struct guest *guest)
{
    vu_region *regions[3];
    int error;
    for (int i = 0; i < 3; i++) {
        guest->fds[i] = file_of(layout[i].size);
        regions[i] = vu_region_map(guest->fds[i], layout[i].guest, layout[i].size, USER + layout[i].guest, 0, 0, &error);
        CHECK(regions[i]);
    }
    guest->map = vu_map_new(regions, 3, &error);
    CHECK(guest->map);
    for (int i = 0; i < 3; i++)
        vu_region_put(regions[i]);
}

static inline void close_guest(struct guest *guest)
{
    vu_map_put(guest->map);
    for (int i = 0; i < 3; i++)
        close(guest->fds[i]);
}

static inline void put(struct guest *guest, uint64_t at, const void *bytes, uint64_t length)
{
    CHECK(vu_map_write(guest->map, at, bytes, length) == (int64_t)length);
}

/* ---- what every popped chain must be ---------------------------------------------------------------------- */

static inline void judge(struct guest *guest, vu_queue *queue, vu_chain *chain)
{
    uint64_t readable = 0, writable = 0;
    for (uint32_t i = 0; i < chain->readable_count + chain->writable_count; i++) {
        const vu_segment *segment = &chain->segments[i];
        CHECK(segment->length && vu_map_guest(guest->map, segment->guest, segment->length) == segment->host);
        *(i < chain->readable_count ? &readable : &writable) += segment->length;
    }
    CHECK(readable == chain->readable && writable == chain->writable);
    static uint8_t bytes[8192];
    uint64_t offset = below(readable + 2), length = below(sizeof bytes);
    int64_t got = vu_chain_read(queue, chain, offset, bytes, length);
    CHECK(got == VU_E_FAULT || (got >= 0 && (uint64_t)got <= length));
    got = vu_chain_write(queue, chain, below(writable + 2), bytes, length);
    CHECK(got == VU_E_FAULT || (got >= 0 && (uint64_t)got <= length && chain->written <= writable));
    struct vu_peek peek;
    vu_chain_peek(queue, &chain, 1, &peek);
    CHECK(peek.length <= readable);
}

static inline uint64_t odd_address(void)
{
    static const uint64_t places[] = {0,         1,         NEAR_SIZE - 8,         NEAR_SIZE, NEAR_SIZE + NEXT_SIZE - 1,
                                      FAR_GUEST, UINT64_MAX, FAR_GUEST + FAR_SIZE - 4, 1 << 30};
    return below(8) ? below(NEAR_SIZE) : places[below(sizeof places / sizeof *places)];
}

static inline void serve(struct guest *guest, vu_queue *queue)
{
    vu_chain *out[64];
    uint32_t lengths[64], count = 0;
    for (int step = 0; step < 12; step++) {
        int popped = vu_queue_pop(queue, out + count, (uint32_t)below(64 - count));
        for (int i = 0; i < popped; i++)
            judge(guest, queue, out[count + (uint32_t)i]);
        count += popped > 0 ? (uint32_t)popped : 0;
        uint32_t done = count ? (uint32_t)below(count + 1) : 0;
        for (uint32_t i = 0; i < done; i++)
            lengths[i] = (uint32_t)any();
        vu_queue_push(queue, out, lengths, done);
        memmove(out, out + done, (count - done) * sizeof *out);
        count -= done;
        vu_queue_signal(queue);
        below(2) ? vu_queue_arm(queue) : vu_queue_disarm(queue);
        CHECK(vu_queue_out(queue) == count);
        if (count == 64)
            break;
    }
}

/* Serves a ring of these parts with any features, log and in-flight region, the last written by `write_inflight`; one time
 * in sixteen with a part where it does not belong. */
static inline void serve_any(struct guest *guest, struct vu_ring ring, uint16_t place,
                             void (*write_inflight)(int fd, uint32_t size, uint16_t place))
{
    int packed = (ring.flags & VU_RING_PACKED) != 0, error;
    uint64_t size = vu_inflight_size(2, 256, packed);
    int log_fd = file_of(LOG_SIZE), inflight_fd = file_of(size), call = eventfd(0, EFD_NONBLOCK);
    vu_log *log = vu_log_map(log_fd, LOG_SIZE, 0, &error);
    write_inflight(inflight_fd, ring.size, place);
    vu_inflight *inflight = vu_inflight_map(inflight_fd, size, 0, 2, 256, packed, &error);
    CHECK(log && inflight);
    ring.flags |= (uint32_t)(any() & (VU_RING_EVENT_IDX | VU_RING_INDIRECT | VU_RING_LOG_USED)) | VU_RING_GUEST_ADDR;
    ring.index = (uint32_t)below(2);
    if (!below(16))
        *(&ring.desc + below(3)) = odd_address();
    vu_queue *queue = vu_queue_new(guest->map, &ring, below(2) ? log : NULL, below(4) ? NULL : inflight, NULL, &error);
    if (queue) {
        vu_queue_set_call(queue, call);
        serve(guest, queue);
    }
    vu_queue_free(queue);
    vu_log_put(log);
    vu_inflight_put(inflight);
    close(call);
    close(log_fd);
    close(inflight_fd);
}

/* ---- a device that lies to a driver ----------------------------------------------------------------------- */

static inline uint32_t offer_all(vu_driver *driver, uint32_t room, bool *held)
{
    vu_buffer buffers[64];
    uint16_t heads[64];
    uint32_t counts[64];
    for (uint32_t i = 0; i < 64; i++)
        buffers[i] = (vu_buffer){any(), (uint32_t)any(), (uint32_t)below(2)}, counts[i] = 1;
    int added = vu_driver_add_many(driver, buffers, counts, 64, heads);
    CHECK(added == (room ? (int)room : VU_E_SIZE));
    for (uint32_t i = 0; i < room; i++) {
        CHECK(!held[heads[i]]);
        held[heads[i]] = true;
    }
    return room;
}

/* Whatever the device says (`lie`), the driver hands out only what it has offered, each once. Rings of up to 64. */
static inline void lie_to(struct guest *guest, const struct vu_driver_parts *parts, uint32_t size, uint32_t flags,
                          void (*lie)(struct guest *guest, const struct vu_driver_parts *parts, uint32_t size))
{
    uint32_t out = 0;
    bool held[64] = {false};
    int error;
    vu_driver *driver = vu_driver_place(guest->map, parts, size, flags, &error);
    CHECK(driver);
    for (int turn = 0; turn < 8; turn++) {
        out += offer_all(driver, size - out, held);
        CHECK(vu_driver_publish(driver) >= 0);
        lie(guest, parts, size);
        vu_returned returned[64];
        int taken = vu_driver_take_many(driver, returned, 64);
        for (int i = 0; i < taken; i++, out--) {
            CHECK(returned[i].head < size && held[returned[i].head]);
            held[returned[i].head] = false;
        }
    }
    vu_driver_free(driver);
}

/* A device's end of the driver's ring. */
static inline vu_queue *queue_of(struct guest *guest, vu_driver *driver, uint32_t size, uint32_t flags)
{
    int error;
    struct vu_ring ring = {
        .size = size,
        .flags = VU_RING_GUEST_ADDR | VU_RING_INDIRECT | (flags & VU_DRIVER_EVENT_IDX ? VU_RING_EVENT_IDX : 0) |
                 (flags & VU_DRIVER_PACKED ? VU_RING_PACKED : 0),
        .desc = vu_driver_desc(driver), .avail = vu_driver_avail(driver), .used = vu_driver_used(driver),
        .base = flags & VU_DRIVER_PACKED ? 0x80008000 : 0,
    };
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, NULL, &error);
    CHECK(queue);
    return queue;
}

#endif
