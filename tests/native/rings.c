/*
 * Memory, split rings, the driver side and the in-flight region as a plain program, for the sanitizers. Packed rings have
 * one of their own (packed.c), and so have two sides that meet (meetings.c).
 *
 *     rings SEED ROUNDS
 *
 * First fixed scenarios, then ROUNDS rounds of random bytes in rings, tables and regions. What is right is judged by the
 * tests in Python; here only what no input may do: touch memory that is not ours, overflow, leak, hang, or give back
 * chains that are not inside guest memory. Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
#include "guest.h"

/* ---- random bytes ------------------------------------------------------------------------------------------- */

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

static void random_round(struct guest *guest)
{
    static const uint32_t sizes[] = {1, 2, 8, 64, 256};
    uint32_t size = sizes[below(5)];
    uint16_t base = (uint16_t)any();
    struct ring_at at = write_ring(guest, size, base);
    struct vu_ring ring = {
        .size = size, .desc = at.desc, .avail = at.avail, .used = at.used, .log_addr = at.used, .base = base,
    };
    serve_any(guest, ring, base, write_inflight);
}

static void lie(struct guest *guest, const struct vu_driver_parts *parts, uint32_t size)
{
    struct { uint32_t id, length; } entry = {0, below(4) ? 0 : (uint32_t)any()};
    for (uint32_t i = 0; i < size; i++) {
        entry.id = (uint32_t)below(size + 1);
        put(guest, parts->used + 4 + 8 * i, &entry, sizeof entry);
    }
    CHECK(vu_map_publish16(guest->map, parts->used + 2, (uint16_t)below(2 * size)) == 0);
}

static void lying_round(struct guest *guest)
{
    struct vu_driver_parts parts = {.desc = below(64) * 16, .avail = 16384 + below(64) * 2, .used = 32768 + below(64) * 4};
    lie_to(guest, &parts, UINT32_C(1) << below(7), (uint32_t)below(2), lie);
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
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, NULL, &error);
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
    vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, NULL, &error);
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
    state = strtoull(arguments[1], NULL, 10) | 1;
    for (unsigned long round = strtoul(arguments[2], NULL, 10); round; round--)
        random_round(&guest), lying_round(&guest), marked_round();
    scribbled(&guest, 2000);
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
