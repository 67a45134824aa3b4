/*
 * Packed rings, their driver side and their in-flight region as a plain program, for the sanitizers.
 *
 *     packed SEED ROUNDS
 *
 * ROUNDS rounds of random bytes. What is right is judged by the tests in Python; here only what no input may do.
 * Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
#include "guest.h"

struct row {
    uint64_t addr;
    uint32_t len;
    uint16_t id, flags;
};

/* Mostly small and mostly right, or nothing would get past the first check. */
static struct row any_row(void)
{
    struct row row = {
        .addr = below(16) ? below(NEAR_SIZE / 2) : odd_address(),
        .len = (uint32_t)(below(16) ? below(5000) : any()),
        .id = (uint16_t)any(),
        .flags = (uint16_t)(below(8) ? below(4) : any()),
    };
    if (!below(4)) {
        row.flags = 4;
        row.len = (uint32_t)(16 * (below(8) ? below(9) : below(1100)));
        row.addr = below(4) ? row.addr : NEAR_SIZE - below(100);
    }
    return row;
}

static void write_rows(struct guest *guest, uint64_t at, uint32_t count, bool ring)
{
    for (uint32_t i = 0; i < count; i++) {
        struct row row = any_row();
        if (ring && below(16))
            row.flags = (uint16_t)((row.flags & 0x7f7f) | (below(8) ? 0x80 : 0x8000));
        put(guest, at + 16 * i, &row, sizeof row);
    }
}

#define RING (NEAR_SIZE / 2)
#define EVENTS (NEAR_SIZE / 2 + 16 * 256)

static void write_ring(struct guest *guest, uint32_t size)
{
    write_rows(guest, RING, size, true);
    write_rows(guest, below(NEAR_SIZE / 2 - 4096), 64, false);
    write_rows(guest, NEAR_SIZE - below(100), 8, false);
    uint64_t events = any() & 0x0003ffff0003ffff;
    put(guest, EVENTS, &events, sizeof events);
}

/* A region that a run of the plain procedure could have left, and some of the bytes changed. */
static void write_inflight(int fd, uint32_t size, uint16_t used)
{
    struct { uint64_t features; uint16_t fields[6]; uint8_t wraps[2], padding[10]; } header = {
        .fields = {below(8) ? 1 : 0, (uint16_t)size, 0, 0, used, used}, .wraps = {1, 1},
    };
    uint32_t taken = (uint32_t)below(size + 1), num = 0;
    for (uint32_t i = 0; i < size; i++) {
        struct { uint8_t inflight, pad; uint16_t next, last, num; uint64_t counter; struct row row; } entry = {
            .next = (uint16_t)(i + 1), .counter = any() >> below(64), .row = any_row(),
        };
        struct { uint16_t id, flags; uint32_t len; uint64_t addr; } saved = {
            entry.row.id, entry.row.flags, entry.row.len, entry.row.addr,
        };
        if (!num && i < taken) {
            num = 1 + (uint32_t)below(taken - i < 4 ? taken - i : 4);
            entry.inflight = 1, entry.num = (uint16_t)num, entry.last = (uint16_t)(i + num - 1);
        }
        num -= num ? 1 : 0;
        CHECK(pwrite(fd, &entry, 16, (off_t)(32 + 32 * i)) == 16);
        CHECK(pwrite(fd, &saved, 16, (off_t)(48 + 32 * i)) == 16);
    }
    header.fields[2] = header.fields[3] = (uint16_t)taken;
    CHECK(pwrite(fd, &header, sizeof header, 0) == sizeof header);
    for (uint64_t changes = below(4); changes; changes--) {
        uint64_t value = below(2) ? any() : below(2 * size);
        CHECK(pwrite(fd, &value, 2, (off_t)(below(32 + 32 * size))) == 2);
    }
}

static void random_round(struct guest *guest)
{
    static const uint32_t sizes[] = {1, 3, 8, 100, 256};
    uint32_t size = sizes[below(5)];
    uint16_t place = (uint16_t)(below(size) | (below(4) ? 0x8000 : 0));
    write_ring(guest, size);
    struct vu_ring ring = {
        .size = size, .flags = VU_RING_PACKED, .desc = RING, .avail = EVENTS, .used = EVENTS + 4,
        .base = below(16) ? place | (uint32_t)place << 16 : (uint32_t)any(),
    };
    serve_any(guest, ring, place & 0x7fff, write_inflight);
}

static void lie(struct guest *guest, const struct vu_driver_parts *parts, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++) {
        struct row row = {any(), below(4) ? 0 : (uint32_t)any(), (uint16_t)below(size + 1),
                          (uint16_t)(below(8) ? (below(2) ? 0x8082 : 2) : any())};
        put(guest, parts->desc + 16 * i, &row, sizeof row);
    }
}

static void lying_round(struct guest *guest)
{
    struct vu_driver_parts parts = {.desc = below(64) * 16, .avail = 16384 + below(64) * 4, .used = 32768 + below(64) * 4};
    lie_to(guest, &parts, 1 + (uint32_t)below(64), VU_DRIVER_PACKED | (uint32_t)below(2), lie);
}

/* A driver that rewrites everything while we look: what was checked must be what is used. */
struct scribbler {
    struct guest *guest;
    _Atomic int stop;
};

static void *scribble(void *argument)
{
    struct scribbler *scribbler = argument;
    uint64_t mine = 88172645463325252u;
    uint8_t *ring = vu_map_guest(scribbler->guest->map, RING, 16 * 8 + 8);
    while (!atomic_load_explicit(&scribbler->stop, memory_order_relaxed)) {
        mine ^= mine << 13, mine ^= mine >> 7, mine ^= mine << 17;
        uint64_t *word = (uint64_t *)(ring + mine % 17 * 8);
        __atomic_store_n(word, mine & (mine >> 60 ? 0x80830fff000fffff : ~UINT64_C(0)), __ATOMIC_RELAXED);
    }
    return NULL;
}

static void scribbled(struct guest *guest, unsigned long rounds)
{
    struct scribbler scribbler = {.guest = guest};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, scribble, &scribbler) == 0);
    while (rounds--) {
        int error;
        struct vu_ring ring = {.size = 8, .flags = VU_RING_GUEST_ADDR | VU_RING_INDIRECT | VU_RING_EVENT_IDX | VU_RING_PACKED,
                               .desc = RING, .avail = RING + 128, .used = RING + 132, .base = 0x80008000};
        write_ring(guest, 8);
        vu_queue *queue = vu_queue_new(guest->map, &ring, NULL, NULL, NULL, &error);
        CHECK(queue);
        serve(guest, queue);
        vu_queue_free(queue);
    }
    atomic_store(&scribbler.stop, 1);
    pthread_join(thread, NULL);
}

int main(int count, char **arguments)
{
    CHECK(count == 3);
    struct guest guest;
    open_guest(&guest);
    state = strtoull(arguments[1], NULL, 10) | 1;
    for (unsigned long round = strtoul(arguments[2], NULL, 10); round; round--)
        random_round(&guest), lying_round(&guest);
    scribbled(&guest, 2000);
    close_guest(&guest);
    puts("ok");
    return 0;
}
