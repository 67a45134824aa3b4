/*
 * The driver's side and the device's of one ring, in one thread and in two, in both formats, for the sanitizers.
 *
 *     meetings SEED ROUNDS
 *
 * An index, an event or a fence that is wrong shows itself here: two that sleep for ever, or two that miss each other.
 * Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
#include "guest.h"

static void both_sides(struct guest *guest, uint32_t size, uint32_t flags)
{
    int error;
    vu_driver *driver = vu_driver_new(guest->map, 0, size, flags, &error);
    CHECK(driver);
    vu_queue *queue = queue_of(guest, driver, size, flags);
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
    talk.queue = queue_of(guest, talk.driver, 8, flags);
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
    meeting.queue = queue_of(guest, meeting.driver, 8, flags);
    vu_queue_set_call(meeting.queue, call);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, device_side, &meeting) == 0);
    driver_side(&meeting);
    pthread_join(thread, NULL);
    vu_queue_free(meeting.queue);
    vu_driver_free(meeting.driver);
    close(call);
}

int main(int count, char **arguments)
{
    CHECK(count == 3);
    struct guest guest;
    open_guest(&guest);
    for (uint32_t size = 1; size <= 1024; size *= 4)
        for (uint32_t flags = 0; flags < 8; flags++)
            if (size <= 64 || !(flags & VU_DRIVER_INDIRECT))
                both_sides(&guest, size + (flags & VU_DRIVER_PACKED ? 2 : 0), flags);
    state = strtoull(arguments[1], NULL, 10) | 1;
    uint32_t rounds = (uint32_t)strtoul(arguments[2], NULL, 10);
    for (uint32_t flags = 0; flags < 8; flags++)
        if (!(flags & VU_DRIVER_INDIRECT))
            converse(&guest, flags, rounds), meetings(&guest, flags, 5 * rounds);
    close_guest(&guest);
    puts("ok");
    return 0;
}
