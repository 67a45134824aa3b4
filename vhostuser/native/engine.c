/*
 * The life of an engine's thread: when it works, polls, sleeps and ends.
 *
 * What belongs here: what the threads of all engines have in common. What does not: what their chains ask for (blk.c,
 * net.c), missing pages (touch.c), making threads (Python).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include "engine.h"

enum {
    STOP_CHECK_NS = 1000000,
    /* Between two looks at an idle ring that has no kick descriptor. */
    POLLED_SLEEP_LEAST_NS = 50000,
    POLLED_SLEEP_MOST_NS = 1000000,
    POLLED_IDLE_PARTS = 8,
};

void vu_engine_begin(struct vu_engine *engine, vu_queue *queue, int kick, int stop, uint32_t poll_us)
{
    memset(engine, 0, sizeof *engine);
    engine->queue = queue;
    engine->kick = kick;
    engine->stop = stop;
    engine->ahead = vu_queue_touch(queue) != NULL;
    engine->patience = (uint64_t)poll_us * 1000;
    engine->now = engine->active = vu_clock_ns();
}

/* A front-end may make its eventfd a blocking one and read it itself, so poll's word is not enough. */
static void drain_kick(struct vu_engine *engine)
{
    uint64_t count;
    struct iovec iov = {&count, sizeof count};
    vu_queue_kicked(engine->queue);
    if (preadv2(engine->kick, &iov, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP)
        engine->kick = -1;
}

/* Like KVM's halt polling: a wait that was short makes polling worthwhile next time, a long one does not. */
static void adapt(struct vu_engine *engine)
{
    uint64_t most = engine->patience;
    if (engine->now - engine->active > most)
        engine->window = 0;
    else
        engine->window = vu_least(engine->window ? 2 * engine->window : most / 4, most);
}

bool vu_engine_polls(const struct vu_engine *engine)
{
    if (engine->now - engine->active >= engine->window)
        return false;
    sched_yield(); /* the driver may share our CPU */
    return true;
}

/* A part of the time for which nothing came: a request is late by little beside the pause before it, and a ring that nobody
 * uses costs a thousand looks a second. */
static struct timespec polled_sleep(const struct vu_engine *engine)
{
    uint64_t ns = (engine->now - engine->active) / POLLED_IDLE_PARTS;
    ns = ns < POLLED_SLEEP_LEAST_NS ? POLLED_SLEEP_LEAST_NS : vu_least(ns, POLLED_SLEEP_MOST_NS);
    return (struct timespec){.tv_nsec = (long)ns};
}

static int sleep_until_woken(struct vu_engine *engine, const struct vu_engine_wish *wish)
{
    struct pollfd fds[6] = {
        {.fd = engine->stopping ? -1 : engine->stop, .events = POLLIN},
        {.fd = wish->kick ? engine->kick : -1, .events = POLLIN},
        {.fd = engine->ahead && wish->pages ? vu_ahead_fd(engine->queue) : -1, .events = POLLIN},
        wish->other[0],
        wish->other[1],
        {.fd = vu_queue_translated_fd(engine->queue), .events = POLLIN},
    };
    eventfd_t seen;
    struct timespec pause = polled_sleep(engine);
    bool polled = engine->kick < 0 && wish->kick;

    if (ppoll(fds, 6, polled ? &pause : NULL, NULL) < 0)
        return errno == EINTR ? 0 : VU_E_SYS;
    engine->stopping |= fds[0].revents != 0;
    if (fds[5].revents)
        eventfd_read(fds[5].fd, &seen);
    if (fds[1].revents & POLLIN)
        drain_kick(engine);
    else if (fds[1].revents)
        engine->kick = -1; /* its other end is gone: look at the ring from time to time */
    return 0;
}

int vu_engine_sleep(struct vu_engine *engine, const struct vu_engine_wish *wish)
{
    int more = wish->kick ? vu_queue_arm(engine->queue) : 0;
    if (more)
        return more < 0 ? more : 0;
    int code = sleep_until_woken(engine, wish);
    if (code < 0)
        return code;
    engine->now = vu_clock_ns();
    adapt(engine);
    return wish->kick && !engine->stopping ? vu_queue_disarm(engine->queue) : 0;
}

static void look_for_stop(struct vu_engine *engine)
{
    struct pollfd fd = {.fd = engine->stop, .events = POLLIN};
    if (engine->stopping || engine->now - engine->stop_check < STOP_CHECK_NS)
        return;
    engine->stop_check = engine->now;
    engine->stopping = poll(&fd, 1, 0) > 0;
}

/* Whoever learns of the stop looks whether anything keeps it before it rests again: nothing else might ever wake it. */
int vu_engine_run(struct vu_engine *engine, const struct vu_engine_tasks *tasks, void *run)
{
    int code = engine->ahead ? vu_queue_touch_ring(engine->queue) : 0;
    while (code >= 0 && (!engine->stopping || tasks->kept(run))) {
        code = tasks->work(run);
        /* What was taken before the driver broke the ring goes back to it, as with a stop. */
        if (code < 0 && vu_queue_drains(engine->queue)) {
            engine->stopping = true;
            code = 1;
        }
        engine->now = vu_clock_ns();
        if (code > 0)
            engine->active = engine->now;
        else if (code == 0 && (!engine->stopping || tasks->kept(run)))
            code = tasks->rest(run);
        look_for_stop(engine);
    }
    code = code < 0 ? code : vu_queue_broken(engine->queue);
    /* Whoever serves the ring next begins with a kick; a driver that was told to send none must hear otherwise. */
    if (!code)
        vu_queue_arm(engine->queue);
    return code;
}
