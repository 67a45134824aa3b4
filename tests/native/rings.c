/*
 * Memory, split rings, the driver side and the in-flight region as a plain program, for the sanitizers.
 *
 *     rings SEED ROUNDS
 *
 * First fixed scenarios, then ROUNDS rounds of random bytes in rings, tables and regions. What is right is judged by the
 * tests in Python; here only what no input may do: touch memory that is not ours, overflow, leak, hang, or give back
 * chains that are not inside guest memory. Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
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

#include "core.h"

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

#define NEAR_SIZE (UINT64_C(1) << 20)
#define NEXT_SIZE (UINT64_C(1) << 16)
#define FAR_GUEST (UINT64_C(1) << 32)
#define FAR_SIZE (UINT64_C(1) << 20)
#define LOG_SIZE (UINT64_C(1) << 18)
#define USER (UINT64_C(1) << 46)

/* xorshift64*: the same sequence on every machine. */
static uint64_t state;

static uint64_t any(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * UINT64_C(2685821657736338717);
}

static uint64_t below(uint64_t limit)
{
    return any() % limit;
}

static int file_of(uint64_t size)
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

static void open_guest(struct guest *guest)
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

static void close_guest(struct guest *guest)
{
    vu_map_put(guest->map);
    for (int i = 0; i < 3; i++)
        close(guest->fds[i]);
}

static void put(struct guest *guest, uint64_t at, const void *bytes, uint64_t length)
{
    CHECK(vu_map_write(guest->map, at, bytes, length) == (int64_t)length);
}

/* ---- what every popped chain must be ---------------------------------------------------------------------- */

static void judge(struct guest *guest, vu_queue *queue, vu_chain *chain)
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

/* ---- random bytes ------------------------------------------------------------------------------------------- */

static uint64_t odd_address(void)
{
    static const uint64_t places[] = {0,         1,         NEAR_SIZE - 8,         NEAR_SIZE, NEAR_SIZE + NEXT_SIZE - 1,
                                      FAR_GUEST, UINT64_MAX, FAR_GUEST + FAR_SIZE - 4, 1 << 30};
    return below(8) ? below(NEAR_SIZE) : places[below(sizeof places / sizeof *places)];
}

/* Mostly small and mostly right, or nothing would get past the first check. */
static void write_rows(struct guest *guest, uint64_t at, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct { uint64_t addr; uint32_t len; uint16_t flags, next; } row = {
            .addr = below(16) ? below(NEAR_SIZE / 2) : odd_address(),
            .len = (uint32_t)(below(16) ? below(5000) : any()),
            .flags = (uint16_t)(below(8) ? below(4) : any()),
            .next = (uint16_t)(below(16) ? below(count) : any()),
        };
        if (!below(4)) {
            row.flags = 4;
            row.len = (uint32_t)(16 * (below(8) ? below(9) : below(1100)));
            row.addr = below(4) ? row.addr : NEAR_SIZE - below(100);
        }
        put(guest, at + 16 * i, &row, sizeof row);
    }
}

struct ring_at {
    uint64_t desc, avail, used;
};

static struct ring_at write_ring(struct guest *guest, uint32_t size, uint16_t base)
{
    struct ring_at at = {NEAR_SIZE / 2, NEAR_SIZE / 2 + 16 * size, NEAR_SIZE / 2 + 24 * size + 64};
    write_rows(guest, at.desc, size);
    write_rows(guest, below(NEAR_SIZE / 2 - 4096), 64);
    write_rows(guest, NEAR_SIZE - below(100), 8);
    for (uint32_t i = 0; i < size; i++) {
        uint16_t head = (uint16_t)(below(64) ? below(size) : any());
        put(guest, at.avail + 4 + 2 * i, &head, 2);
    }
    uint16_t available = (uint16_t)(base + (below(16) ? below(size + 1) : any()));
    put(guest, at.avail + 2, &available, 2);
    put(guest, at.used + 2, &base, 2);
    return at;
}

/* An in-flight region for queue 0 that could be true, and some of the bytes changed. */
static void write_inflight(int fd, uint32_t size, uint16_t used)
{
    struct { uint64_t features; uint16_t version, desc_num, last_batch_head, used_idx; } header = {
        .version = below(8) ? 1 : 0, .desc_num = (uint16_t)size,
        .last_batch_head = (uint16_t)below(size), .used_idx = (uint16_t)(used - (below(2) ? below(size) : 0)),
    };
    CHECK(pwrite(fd, &header, sizeof header, 0) == sizeof header);
    for (uint32_t i = 0; i < size; i++) {
        struct { uint8_t inflight, padding[5]; uint16_t next; uint64_t counter; } entry = {
            .inflight = !below(4), .next = (uint16_t)below(size), .counter = any() >> below(64),
        };
        CHECK(pwrite(fd, &entry, sizeof entry, (off_t)(16 + 16 * i)) == sizeof entry);
    }
    for (uint64_t changes = below(4); changes; changes--) {
        uint64_t value = any();
        CHECK(pwrite(fd, &value, 2, (off_t)(below(16 + 16 * size))) == 2);
    }
}

static void serve(struct guest *guest, vu_queue *queue)
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

static void random_round(struct guest *guest)
{
    static const uint32_t sizes[] = {1, 2, 8, 64, 256};
    uint32_t size = sizes[below(5)];
    uint16_t base = (uint16_t)any();
    struct ring_at at = write_ring(guest, size, base);
    int error, log_fd = file_of(LOG_SIZE), inflight_fd = file_of(vu_inflight_size(2, 256));
    vu_log *log = vu_log_map(log_fd, LOG_SIZE, 0, &error);
    write_inflight(inflight_fd, size, base);
    vu_inflight *inflight = vu_inflight_map(inflight_fd, vu_inflight_size(2, 256), 0, 2, 256, &error);
    CHECK(log && inflight);
    struct vu_ring ring = {
        .size = size,
        .flags = (uint32_t)(any() & (VU_RING_EVENT_IDX | VU_RING_INDIRECT | VU_RING_LOG_USED)) | VU_RING_GUEST_ADDR,
        .desc = at.desc, .avail = at.avail, .used = at.used, .log_addr = at.used, .base = base, .index = (uint32_t)below(2),
    };
    if (!below(16))
        *(&ring.desc + below(3)) = odd_address();
    vu_queue *queue = vu_queue_new(guest->map, &ring, below(2) ? log : NULL, below(4) ? NULL : inflight, &error);
    int call = eventfd(0, EFD_NONBLOCK);
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

/* A device that lies to a driver: whatever it says, the driver hands out only what it has offered, each once. */
static void lying_round(struct guest *guest)
{
    struct vu_driver_parts parts = {.desc = below(64) * 16, .avail = 16384 + below(64) * 2, .used = 32768 + below(64) * 4};
    uint32_t size = UINT32_C(1) << below(7), counts[64], out = 0;
    bool held[64] = {false};
    int error;
    vu_driver *driver = vu_driver_place(guest->map, &parts, size, (uint32_t)below(2), &error);
    CHECK(driver);
    for (int turn = 0; turn < 8; turn++) {
        vu_buffer buffers[64];
        uint16_t heads[64];
        for (uint32_t i = 0; i < 64; i++)
            buffers[i] = (vu_buffer){any(), (uint32_t)any(), (uint32_t)below(2)}, counts[i] = 1;
        int added = vu_driver_add_many(driver, buffers, counts, 64, heads);
        CHECK(added == (size == out ? VU_E_SIZE : (int)(size - out)));
        for (int i = 0; i < added; i++, out++) {
            CHECK(!held[heads[i]]);
            held[heads[i]] = true;
        }
        CHECK(vu_driver_publish(driver) >= 0);
        struct { uint32_t id, length; } entry = {(uint32_t)below(size + 1), below(4) ? 0 : (uint32_t)any()};
        for (uint32_t i = 0; i < size; i++)
            put(guest, parts.used + 4 + 8 * i, &entry, sizeof entry), entry.id = (uint32_t)below(size + 1);
        CHECK(vu_map_publish16(guest->map, parts.used + 2, (uint16_t)below(2 * size)) == 0);
        vu_returned returned[64];
        int taken = vu_driver_take_many(driver, returned, 64);
        for (int i = 0; i < taken; i++, out--) {
            CHECK(returned[i].head < size && held[returned[i].head]);
            held[returned[i].head] = false;
        }
    }
    vu_driver_free(driver);
}

/* Random marks, taken in pieces: what comes out is what went in, once. */
static void marked_round(void)
{
    int error, fd = file_of(LOG_SIZE);
    uint64_t size = 1 + below(200), page = 0, found = 0, marks = 0;
    vu_log *log = vu_log_map(fd, size, below(64), &error);
    CHECK(log);
    for (uint64_t i = 0; i < 40; i++)
        CHECK(vu_log_mark(log, below(size * 8) * 4096, 1) == 0);
    vu_range ranges[VU_LOG_RANGES + 3], last = {0, 0};
    for (int count; (count = vu_log_take(log, &page, ranges, VU_LOG_RANGES + 3)) > 0; marks++)
        for (int i = 0; i < count; i++) {
            CHECK(ranges[i].length && ranges[i].guest >= last.guest + last.length);
            last = ranges[i];
            found += last.length / 4096;
        }
    CHECK(found && found <= 40 && last.guest + last.length <= size * 8 * 4096 && marks <= 40);
    page = 0;
    CHECK(vu_log_take(log, &page, ranges, VU_LOG_RANGES) == 0 && page == size * 8);
    vu_log_put(log);
    close(fd);
}

/* ---- fixed scenarios ------------------------------------------------------------------------------------------ */

static void both_sides(struct guest *guest, uint32_t size, uint32_t flags)
{
    int error;
    vu_driver *driver = vu_driver_new(guest->map, 0, size, flags, &error);
    CHECK(driver);
    struct vu_ring ring = {
        .size = size, .flags = VU_RING_GUEST_ADDR | VU_RING_INDIRECT | (flags & VU_DRIVER_EVENT_IDX ? VU_RING_EVENT_IDX : 0),
        .desc = vu_driver_desc(driver), .avail = vu_driver_avail(driver), .used = vu_driver_used(driver),
    };
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, &error);
    CHECK(queue);
    uint32_t offered = 0, returned = 0, room = size < 32 ? size : 32;
    for (int turn = 0; turn < 300; turn++) {
        vu_buffer buffers[VU_DRIVER_TABLE] = {{FAR_GUEST, 16, 0}};
        for (uint32_t i = 1; i < VU_DRIVER_TABLE; i++)
            buffers[i] = (vu_buffer){FAR_GUEST + 4096, 4096, 1};
        uint32_t length_of_chain = flags & VU_DRIVER_INDIRECT ? (turn % 8 ? 3 : VU_DRIVER_TABLE) : size > 1 ? 2 : 1;
        for (uint32_t i = 0; i < room; i++)
            offered += vu_driver_add(driver, buffers, length_of_chain) >= 0;
        vu_driver_publish(driver);
        vu_chain *chains[32];
        uint32_t lengths[32] = {0};
        int popped = vu_queue_pop(queue, chains, 32);
        CHECK(popped >= 0 && vu_queue_push(queue, chains, lengths, (uint32_t)popped) == 0);
        CHECK(vu_queue_signal(queue) == 0 && vu_queue_arm(queue) >= 0);
        vu_returned taken[7];
        for (int got; (got = vu_driver_take_many(driver, taken, 7)) != 0; returned += (uint32_t)got)
            CHECK(got > 0);
    }
    CHECK(offered && offered == returned);
    vu_queue_free(queue);
    vu_driver_free(driver);
}

/* Two threads that sleep whenever they may: if an index, an event or a fence is wrong, both sleep for ever. */
struct talk {
    vu_queue *queue;
    vu_driver *driver;
    int kick, call;
    uint32_t requests;
};

static void sleep_on(int fd)
{
    uint64_t value;
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    CHECK(poll(&ready, 1, 5000) == 1 && read(fd, &value, sizeof value) == sizeof value);
}

static void *answer(void *argument)
{
    struct talk *talk = argument;
    vu_chain *chains[4];
    uint32_t lengths[4] = {0};
    for (uint32_t done = 0; done < talk->requests;) {
        int popped = vu_queue_pop(talk->queue, chains, 4);
        CHECK(popped >= 0);
        if (!popped && !vu_queue_arm(talk->queue))
            sleep_on(talk->kick);
        CHECK(vu_queue_push(talk->queue, chains, lengths, (uint32_t)popped) == 0 && vu_queue_signal(talk->queue) >= 0);
        done += (uint32_t)popped;
    }
    return NULL;
}

static void ask(struct talk *talk)
{
    static const uint64_t one = 1;
    vu_buffer buffer = {FAR_GUEST, 16, 0};
    uint16_t head;
    uint32_t length;
    for (uint32_t offered = 0, returned = 0; returned < talk->requests;) {
        /* One at a time or all that fit, so that the device is now ahead and now behind. */
        for (uint32_t most = offered % 7 ? 1 : 8; most && offered < talk->requests; most--)
            offered += vu_driver_add(talk->driver, &buffer, 1) >= 0;
        if (vu_driver_publish(talk->driver) == 1)
            CHECK(write(talk->kick, &one, sizeof one) == sizeof one);
        uint32_t before = returned;
        while (vu_driver_take(talk->driver, &head, &length) == 1)
            returned++;
        if (returned == before && !vu_driver_arm(talk->driver))
            sleep_on(talk->call);
    }
}

static void converse(struct guest *guest, uint32_t flags, uint32_t requests)
{
    int error;
    struct talk talk = {.kick = eventfd(0, 0), .call = eventfd(0, EFD_NONBLOCK), .requests = requests};
    talk.driver = vu_driver_new(guest->map, 0, 8, flags, &error);
    struct vu_ring ring = {
        .size = 8, .flags = VU_RING_GUEST_ADDR | (flags & VU_DRIVER_EVENT_IDX ? VU_RING_EVENT_IDX : 0),
        .desc = vu_driver_desc(talk.driver), .avail = vu_driver_avail(talk.driver), .used = vu_driver_used(talk.driver),
    };
    talk.queue = vu_queue_new(guest->map, &ring, NULL, NULL, &error);
    CHECK(talk.queue);
    vu_queue_set_call(talk.queue, talk.call);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, answer, &talk) == 0);
    ask(&talk);
    pthread_join(thread, NULL);
    vu_queue_free(talk.queue);
    vu_driver_free(talk.driver);
    close(talk.kick);
    close(talk.call);
}

/* Store, fence, load on both sides: of two that meet, one must see the other. Rounds begin together, so they meet often. */
struct meeting {
    vu_queue *queue;
    vu_driver *driver;
    uint32_t rounds;
    _Atomic uint32_t arrived;
    int armed, signalled;
};

static void meet(struct meeting *meeting, uint32_t step, uint32_t late)
{
    atomic_fetch_add(&meeting->arrived, 1);
    for (uint32_t spins = 0; atomic_load(&meeting->arrived) < 2 * step; spins++)
        if (spins > 10000)
            sched_yield();
    for (volatile uint32_t left = late; left; left--)
        ; /* the window is a few nanoseconds wide, so it is searched */
}

/* Each looks at the other's index first: a line that has to be fetched would be loaded too late to be wrong. */
static void *device_side(void *argument)
{
    struct meeting *meeting = argument;
    for (uint32_t step = 1; step <= 4 * meeting->rounds; step += 4) {
        vu_chain *chain;
        uint32_t length = 0;
        meet(meeting, step, 0);
        CHECK(vu_queue_pop(meeting->queue, &chain, 1) == 0);
        meet(meeting, step + 1, step % 61);
        meeting->armed = vu_queue_arm(meeting->queue);
        meet(meeting, step + 2, step % 47);
        CHECK(vu_queue_pop(meeting->queue, &chain, 1) == 1);
        CHECK(vu_queue_push(meeting->queue, &chain, &length, 1) == 0);
        meeting->signalled = vu_queue_signal(meeting->queue);
        meet(meeting, step + 3, 0);
    }
    return NULL;
}

static void driver_side(struct meeting *meeting)
{
    vu_buffer buffer = {FAR_GUEST, 16, 0};
    uint16_t head;
    uint32_t length;
    for (uint32_t step = 1; step <= 4 * meeting->rounds; step += 4) {
        CHECK(vu_driver_add(meeting->driver, &buffer, 1) >= 0);
        meet(meeting, step, 0);
        meet(meeting, step + 1, step % 59);
        int kicked = vu_driver_publish(meeting->driver);
        CHECK(vu_driver_take(meeting->driver, &head, &length) == 0);
        meet(meeting, step + 2, step % 211);
        int armed = vu_driver_arm(meeting->driver);
        CHECK(kicked || meeting->armed == 1);
        meet(meeting, step + 3, 0);
        CHECK(armed == 1 || meeting->signalled == 1);
        CHECK(vu_driver_take(meeting->driver, &head, &length) == 1 && vu_driver_disarm(meeting->driver) == 0);
        CHECK(vu_queue_disarm(meeting->queue) == 0); /* the other side waits for us */
    }
}

static void meetings(struct guest *guest, uint32_t flags, uint32_t rounds)
{
    int error, call = eventfd(0, EFD_NONBLOCK);
    struct meeting meeting = {.rounds = rounds};
    meeting.driver = vu_driver_new(guest->map, 0, 8, flags, &error);
    struct vu_ring ring = {
        .size = 8, .flags = VU_RING_GUEST_ADDR | (flags & VU_DRIVER_EVENT_IDX ? VU_RING_EVENT_IDX : 0),
        .desc = vu_driver_desc(meeting.driver), .avail = vu_driver_avail(meeting.driver),
        .used = vu_driver_used(meeting.driver),
    };
    meeting.queue = vu_queue_new(guest->map, &ring, NULL, NULL, &error);
    CHECK(meeting.queue);
    vu_queue_set_call(meeting.queue, call);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, device_side, &meeting) == 0);
    driver_side(&meeting);
    pthread_join(thread, NULL);
    vu_queue_free(meeting.queue);
    vu_driver_free(meeting.driver);
    close(call);
}

/* A driver that rewrites everything while we look: what was checked must be what is used. */
struct scribbler {
    struct guest *guest;
    _Atomic int stop;
};

static void *scribble(void *argument)
{
    struct scribbler *scribbler = argument;
    uint64_t local = 88172645463325252u;
    uint16_t *ring = (uint16_t *)vu_map_guest(scribbler->guest->map, NEAR_SIZE / 2, 1024);
    while (!atomic_load_explicit(&scribbler->stop, memory_order_relaxed)) {
        local ^= local << 13;
        local ^= local >> 7;
        local ^= local << 17;
        __atomic_store_n(&ring[local % 512], (uint16_t)(local >> 48 & (local & 1 << 20 ? 0xffff : 7)), __ATOMIC_RELAXED);
    }
    return NULL;
}

static void scribbled_round(struct guest *guest)
{
    int error;
    uint16_t base = (uint16_t)any();
    struct ring_at at = write_ring(guest, 8, base);
    struct vu_ring ring = {.size = 8, .flags = VU_RING_GUEST_ADDR | VU_RING_INDIRECT | VU_RING_EVENT_IDX,
                           .desc = at.desc, .avail = at.avail, .used = at.used, .base = base};
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, &error);
    CHECK(queue);
    serve(guest, queue);
    vu_queue_free(queue);
}

static void scribbled(struct guest *guest, unsigned long rounds)
{
    struct scribbler scribbler = {.guest = guest};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, scribble, &scribbler) == 0);
    while (rounds--)
        scribbled_round(guest);
    atomic_store(&scribbler.stop, 1);
    pthread_join(thread, NULL);
}

/* Memory that goes away, in every function that touches it. */
static void lose(struct guest *guest, void (*take_away)(struct guest *))
{
    int error;
    char byte = 0;
    vu_driver *driver = vu_driver_new(guest->map, FAR_GUEST, 8, 0, &error);
    CHECK(driver);
    vu_buffer buffer = {0, 4096, 1};
    CHECK(vu_driver_add(driver, &buffer, 1) >= 0 && vu_driver_publish(driver) == 1);
    struct vu_ring ring = {.size = 8, .flags = VU_RING_GUEST_ADDR, .desc = vu_driver_desc(driver),
                           .avail = vu_driver_avail(driver), .used = vu_driver_used(driver)};
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, &error);
    vu_chain *chain;
    CHECK(queue && vu_queue_pop(queue, &chain, 1) == 1);
    take_away(guest);
    CHECK(vu_map_read(guest->map, 0, &byte, 1) == VU_E_FAULT && vu_map_write(guest->map, 0, &byte, 1) == VU_E_FAULT);
    CHECK(vu_chain_write(queue, chain, 0, &byte, 1) == VU_E_FAULT);
    uint16_t head;
    uint32_t length = 1;
    CHECK(vu_driver_take(driver, &head, &length) == VU_E_FAULT && vu_driver_add(driver, &buffer, 1) == VU_E_FAULT);
    CHECK(vu_driver_arm(driver) == VU_E_FAULT && vu_driver_disarm(driver) == VU_E_FAULT);
    CHECK(vu_driver_wait(driver, -1, 0, UINT64_MAX) == VU_E_FAULT && vu_map_publish16(guest->map, 0, 1) == VU_E_FAULT);
    vu_returned returned;
    CHECK(vu_driver_take_many(driver, &returned, 1) == VU_E_FAULT && vu_driver_move(driver, guest->map) == 0);
    CHECK(vu_queue_push(queue, &chain, &length, 1) == VU_E_FAULT && vu_queue_pop(queue, &chain, 1) == VU_E_FAULT);
    CHECK(vu_queue_arm(queue) == VU_E_FAULT && vu_queue_broken(queue) == VU_E_FAULT && vu_queue_out(queue) == 0);
    vu_queue_free(queue);
    vu_driver_free(driver);
}

static void truncate_all(struct guest *guest)
{
    for (int i = 0; i < 3; i++)
        CHECK(ftruncate(guest->fds[i], 0) == 0);
}

static void revoke_all(struct guest *guest)
{
    CHECK(vu_map_revoke(guest->map) == 0);
}

/* Guards nest: a fault that only the outer one covers goes there. */
static void nested(struct guest *guest)
{
    struct guest other;
    open_guest(&other);
    volatile uint8_t *lost = vu_map_guest(guest->map, 0, 1);
    vu_map_revoke(guest->map);
    struct vu_guard outer, inner;
    volatile int reached = 0;
    if (VU_GUARD(&outer, guest->map)) {
        CHECK(reached == 1);
        close_guest(&other);
        return;
    }
    if (VU_GUARD(&inner, other.map))
        CHECK(!"the inner guard does not cover this map");
    reached = 1;
    (void)*lost;
    CHECK(!"the memory was revoked");
}

/* The device has the file as well: it may cut it off and give it back between two offers. */
static void lost_offers(void)
{
    struct guest guest;
    open_guest(&guest);
    int error;
    vu_driver *driver = vu_driver_new(guest.map, FAR_GUEST, 4, 0, &error);
    vu_buffer buffer = {0, 4096, 1};
    CHECK(driver && ftruncate(guest.fds[2], 0) == 0);
    for (int i = 0; i <= 4; i++)
        CHECK(vu_driver_add(driver, &buffer, 1) == VU_E_FAULT);
    CHECK(ftruncate(guest.fds[2], (off_t)FAR_SIZE) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(vu_driver_add(driver, &buffer, 1) == i);
    vu_driver_free(driver);
    close_guest(&guest);
}

static volatile int warnings;

static void on_warning(int number)
{
    (void)number;
    warnings++;
}

/* The kernel tells of bad memory that nobody touches (BUS_MCEERR_AO) at any moment, while a lock is held for example. */
static void warned(struct guest *guest)
{
    struct sigaction before, counting = {.sa_handler = on_warning};
    siginfo_t warning = {.si_signo = SIGBUS, .si_code = BUS_MCEERR_AO};
    struct vu_guard guard;
    CHECK(sigaction(SIGBUS, &counting, &before) == 0 && vu_guard_install() == 0);
    warning.si_addr = vu_map_guest(guest->map, 0, 1);
    if (VU_GUARD(&guard, guest->map))
        CHECK(!"a warning is no fault of ours");
    CHECK(syscall(SYS_rt_sigqueueinfo, getpid(), SIGBUS, &warning) == 0);
    vu_guard_leave(&guard);
    CHECK(warnings == 1);
    CHECK(sigaction(SIGBUS, &before, NULL) == 0);
}

int main(int count, char **arguments)
{
    CHECK(count == 3);
    lost_offers();
    struct guest guest;
    open_guest(&guest);
    for (uint32_t size = 1; size <= 1024; size *= 4)
        for (uint32_t flags = 0; flags < (size > 64 ? 2 : 4); flags++)
            both_sides(&guest, size, flags);
    state = strtoull(arguments[1], NULL, 10) | 1;
    for (unsigned long round = strtoul(arguments[2], NULL, 10); round; round--)
        random_round(&guest), lying_round(&guest), marked_round();
    scribbled(&guest, 2000);
    for (uint32_t flags = 0; flags <= VU_DRIVER_EVENT_IDX; flags++)
        converse(&guest, flags, 10000), meetings(&guest, flags, 50000);
    lose(&guest, truncate_all);
    close_guest(&guest);
    open_guest(&guest);
    lose(&guest, revoke_all);
    close_guest(&guest);
    open_guest(&guest);
    warned(&guest);
    nested(&guest);
    close_guest(&guest);
    puts("ok");
    return 0;
}
