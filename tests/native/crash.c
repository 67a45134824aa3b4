/*
 * A back-end that is killed behind any instruction of its rings.
 *
 *     crash SEED FORMAT BATCH
 *
 * A child serves a ring with an in-flight region, one instruction at a time (PTRACE_SINGLESTEP). What SIGKILL would leave
 * behind is what is in the shared files at that moment, so each time that they have changed, a successor is tried on a
 * copy of them: it must return every request that the driver does not have back, once, those that were taken before in
 * the order in which they were taken. FORMAT: split or packed; BATCH: requests that are out at once. SEED decides in
 * which order they are returned. Prints how many different moments there were; exit status 1 and a line if one is bad.
 */
#define _GNU_SOURCE
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "guest.h"

#define SIZE 32u
#define REQUESTS 12u
#define EARLIER 10u /* requests that were served in peace, so that the later ones cross the end of the ring */
#define BATCH_MAX 4u
#define BUFFERS (NEAR_SIZE / 2)
#define RING_BYTES 4096u /* of near memory from address 0: the ring and all its parts */
#define MARK UINT64_C(0x6b6e6f776e207468)

struct world {
    struct guest guest;
    uint64_t region_size;
    int region; /* the file of the in-flight region */
    vu_driver *driver;
    uint32_t flags; /* VU_DRIVER_ */
    uint16_t heads[REQUESTS];
};

/* Request n: n % 3 buffers to read, then 8 bytes to write. */
static void offer(struct world *world, uint32_t number)
{
    vu_buffer buffers[3];
    uint32_t count = 0;
    for (; count < number % 3; count++)
        buffers[count] = (vu_buffer){BUFFERS + 4096, 16, 0};
    buffers[count++] = (vu_buffer){BUFFERS + 8 * number, 8, 1};
    int head = vu_driver_add(world->driver, buffers, count);
    CHECK(head >= 0);
    world->heads[number] = (uint16_t)head;
}

static void open_world(struct world *world, uint32_t flags)
{
    int error;
    open_guest(&world->guest);
    world->flags = flags;
    world->region_size = vu_inflight_size(1, SIZE, flags & VU_DRIVER_PACKED);
    world->region = file_of(world->region_size);
    world->driver = vu_driver_new(world->guest.map, 0, SIZE, flags, &error);
    CHECK(world->driver && vu_driver_bytes(SIZE, flags) <= RING_BYTES);
}

static vu_queue *open_queue(struct world *world, uint32_t base)
{
    int error, packed = (world->flags & VU_DRIVER_PACKED) != 0;
    vu_inflight *region = vu_inflight_map(world->region, world->region_size, 0, 1, SIZE, packed, &error);
    CHECK(region);
    struct vu_ring ring = {
        .size = SIZE, .flags = VU_RING_GUEST_ADDR | (packed ? VU_RING_PACKED : 0), .base = base,
        .desc = vu_driver_desc(world->driver), .avail = vu_driver_avail(world->driver), .used = vu_driver_used(world->driver),
    };
    vu_queue *queue = vu_queue_new(world->guest.map, &ring, NULL, region, NULL, &error);
    CHECK(queue);
    vu_inflight_put(region);
    return queue;
}

/* ---- the one that is killed ----------------------------------------------------------------------------- */

static void execute(vu_queue *queue, vu_chain *chain)
{
    uint64_t mark = MARK;
    CHECK(vu_chain_write(queue, chain, 0, &mark, sizeof mark) == sizeof mark);
}

static void shuffle(vu_chain **chains, uint32_t count)
{
    for (uint32_t i = count; i > 1; i--) {
        uint32_t other = (uint32_t)below(i);
        vu_chain *chain = chains[i - 1];
        chains[i - 1] = chains[other];
        chains[other] = chain;
    }
}

/* Has up to `batch` requests out, and returns some of them together, in any order. */
static void be_served(vu_queue *queue, uint32_t batch)
{
    vu_chain *out[BATCH_MAX];
    uint32_t count = 0;
    for (;;) {
        int popped = vu_queue_pop(queue, out + count, batch - count);
        CHECK(popped >= 0);
        for (int i = 0; i < popped; i++)
            execute(queue, out[count + (uint32_t)i]);
        count += (uint32_t)popped;
        if (!count)
            return;
        shuffle(out, count);
        uint32_t done = 1 + (uint32_t)below(count);
        CHECK(vu_queue_push(queue, out, NULL, done) == 0);
        count -= done;
        memmove(out, out + done, count * sizeof *out);
    }
}

static uint32_t base_after(const struct world *world, uint32_t used)
{
    return world->flags & VU_DRIVER_PACKED ? 0x80008000 : used;
}

static void serve_earlier(struct world *world)
{
    vu_queue *queue = open_queue(world, base_after(world, 0));
    vu_chain *chains[EARLIER];
    vu_returned taken[EARLIER];
    for (uint32_t i = 0; i < EARLIER; i++)
        offer(world, 1);
    vu_driver_publish(world->driver);
    CHECK(vu_queue_pop(queue, chains, EARLIER) == EARLIER && vu_queue_push(queue, chains, NULL, EARLIER) == 0);
    CHECK(vu_driver_take_many(world->driver, taken, EARLIER) == EARLIER);
    vu_queue_free(queue);
}

static pid_t start(struct world *world, uint32_t batch)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child)
        return child;
    vu_queue *queue = open_queue(world, base_after(world, EARLIER));
    CHECK(ptrace(PTRACE_TRACEME, 0, 0, 0) == 0);
    raise(SIGSTOP);
    be_served(queue, batch);
    _exit(0);
}

/* ---- its successor -------------------------------------------------------------------------------------- */

static void copy(int from, int to, uint64_t length)
{
    uint8_t bytes[RING_BYTES];
    for (uint64_t at = 0; at < length; at += sizeof bytes) {
        size_t run = length - at < sizeof bytes ? (size_t)(length - at) : sizeof bytes;
        CHECK(pread(from, bytes, run, (off_t)at) == (ssize_t)run && pwrite(to, bytes, run, (off_t)at) == (ssize_t)run);
    }
}

static uint32_t number_of(const struct world *world, uint32_t head)
{
    uint32_t number = 0;
    while (number < REQUESTS && world->heads[number] != head)
        number++;
    CHECK(number < REQUESTS);
    return number;
}

/* Requests that the driver has back; what it has back was done. */
static uint32_t take_back(struct world *world, bool *back)
{
    uint32_t taken = 0, length;
    uint16_t head;
    int got;
    for (; (got = vu_driver_take(world->driver, &head, &length)) == 1; taken++) {
        uint32_t number = number_of(world, head);
        uint64_t mark = 0;
        CHECK(!back[number] && length == sizeof mark);
        back[number] = true;
        CHECK(vu_map_read(world->guest.map, BUFFERS + 8 * number, &mark, sizeof mark) == sizeof mark && mark == MARK);
    }
    CHECK(got == 0);
    return taken;
}

/* In a process of its own: the driver's memory is a copy of the parent's, as the files are. */
static void succeed(const struct world *before)
{
    struct world world = *before;
    bool back[REQUESTS] = {false};
    open_guest(&world.guest);
    world.region = file_of(world.region_size);
    copy(before->guest.fds[0], world.guest.fds[0], NEAR_SIZE);
    copy(before->region, world.region, world.region_size);
    CHECK(vu_driver_move(world.driver, world.guest.map) == 0);
    uint32_t returned = take_back(&world, back);
    /* What a front-end passes when it was not told: how far the used ring has come. The region knows better. */
    vu_queue *queue = open_queue(&world, base_after(&world, EARLIER + returned));
    uint32_t last = 0;
    vu_chain *chains[REQUESTS];
    uint32_t count = 0;
    for (int popped; (popped = vu_queue_pop(queue, chains + count, REQUESTS - count)) != 0; count += (uint32_t)popped)
        CHECK(popped > 0);
    CHECK(returned + count == REQUESTS);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = number_of(&world, chains[i]->head);
        CHECK(!back[number] && (!i || number > last));
        last = number;
        execute(queue, chains[i]);
    }
    CHECK(vu_queue_push(queue, chains, NULL, count) == 0);
    CHECK(take_back(&world, back) == count);
    _exit(0);
}

static void try_successor(const struct world *world)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child)
        succeed(world);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- instruction by instruction -------------------------------------------------------------------------- */

struct moment {
    uint8_t ring[RING_BYTES], region[RING_BYTES];
};

static bool changed(const struct moment *now, struct moment *last, uint64_t region_size)
{
    if (!memcmp(now->ring, last->ring, RING_BYTES) && !memcmp(now->region, last->region, region_size))
        return false;
    memcpy(last->ring, now->ring, RING_BYTES);
    memcpy(last->region, now->region, region_size);
    return true;
}

static uint32_t walk(struct world *world, uint32_t batch)
{
    static struct moment last, now;
    pid_t child = start(world, batch);
    int status;
    uint32_t moments = 0;
    uint8_t *ring = vu_map_guest(world->guest.map, 0, RING_BYTES);
    uint8_t *region = mmap(NULL, world->region_size, PROT_READ, MAP_SHARED, world->region, 0);
    CHECK(ring && region != MAP_FAILED && world->region_size <= RING_BYTES);
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
        memcpy(now.ring, ring, RING_BYTES);
        memcpy(now.region, region, world->region_size);
        if (changed(&now, &last, world->region_size)) {
            try_successor(world);
            moments++;
        }
        CHECK(ptrace(PTRACE_SINGLESTEP, child, 0, 0) == 0);
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    munmap(region, world->region_size);
    return moments;
}

int main(int argc, char **argv)
{
    CHECK(argc == 4);
    state = strtoull(argv[1], NULL, 0) + 1;
    uint32_t batch = (uint32_t)strtoul(argv[3], NULL, 0);
    CHECK(batch >= 1 && batch <= BATCH_MAX);
    struct world world = {0};
    open_world(&world, strcmp(argv[2], "packed") ? 0 : VU_DRIVER_PACKED);
    CHECK(vu_guard_install() == 0);
    serve_earlier(&world);
    for (uint32_t number = 0; number < REQUESTS; number++)
        offer(&world, number);
    vu_driver_publish(world.driver);
    printf("%u\n", walk(&world, batch));
    return 0;
}
