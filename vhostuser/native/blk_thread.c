/*
 * The thread of one queue of the block engine, in one call.
 *
 * What belongs here: when it takes chains, returns them, polls, sleeps and ends. What does not: what chains ask for (blk.c),
 * missing pages (touch.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "blk.h"

enum {
    STOP_CHECK_NS = 1000000,
    POLLED_SLEEP_NS = 100000, /* between two looks at an idle ring that has no kick descriptor */
};

/* ---- the queue's thread ------------------------------------------------------------------------------------------ */

/* Adds the tally to the shared counters. */
static void settle(struct vu_blk_run *run)
{
    const uint64_t *tally = (const uint64_t *)&run->tally;
    for (size_t i = 0; i < VU_BLK_COUNTERS; i++)
        if (tally[i])
            atomic_fetch_add_explicit(&run->blk->counters[i], tally[i], memory_order_relaxed);
    memset(&run->tally, 0, sizeof run->tally);
}

/* Returns the finished chains to the driver. */
static int push(struct vu_blk_run *run)
{
    if (!run->finished)
        return 0;
    int code = vu_queue_push(run->queue, run->done, run->lengths, run->finished);
    run->finished = 0;
    run->tally.batches++;
    if (code == 0) /* a call descriptor that is of no use is the front-end's affair: only a broken ring counts here */
        run->tally.calls += vu_queue_signal(run->queue) > 0;
    settle(run);
    return code ? code : vu_queue_broken(run->queue);
}

/* Puts one that was served among those to be returned. */
static int finish(struct vu_blk_run *run, vu_chain *chain)
{
    run->done[run->finished++] = chain;
    return run->finished == VU_BLK_PUSH ? push(run) : 0;
}

/* What was finished before a fault is returned all the same. */
static int serve_all(struct vu_blk_run *run, uint32_t count)
{
    int code = 0;
    for (uint32_t i = 0; i < count && code >= 0; i++) {
        code = vu_blk_serve(run, run->chains[i], &run->lengths[run->finished]);
        if (code > 0)
            code = finish(run, run->chains[i]);
    }
    int pushed = push(run);
    return code < 0 ? code : pushed;
}

/* Returns those that have ended meanwhile: how many, or a negative code. */
static int serve_pending(struct vu_blk_run *run)
{
    vu_chain *chain;
    int count = 0, code;
    while ((code = vu_blk_serve_next(run, &chain, &run->lengths[run->finished])) > 0) {
        count++;
        if ((code = finish(run, chain)) < 0)
            break;
    }
    int pushed = push(run);
    return code < 0 ? code : pushed < 0 ? pushed : count;
}

/* Leaves in run->chains the ones whose pages are resident; the others come back through vu_ahead_collect. */
static int submit(struct vu_blk_run *run, uint32_t count)
{
    bool alone = count == 1 && !vu_ahead_waiting(run->queue) && !vu_blk_transfers_out(run);
    uint32_t ready = 0;
    for (uint32_t i = 0; i < count; i++) {
        int waits = vu_ahead_submit(run->queue, run->chains[i], alone);
        if (waits < 0)
            return waits;
        if (!waits)
            run->chains[ready++] = run->chains[i];
    }
    return (int)ready;
}

/* Whether one more chain may be popped. */
static bool takes_more(const struct vu_blk_run *run)
{
    return !run->stopping && run->free;
}

/* Each chain may become a transfer, so no more are taken than can be under way. */
static uint32_t most(const struct vu_blk_run *run)
{
    return (uint32_t)vu_least(VU_BLK_BATCH, run->free);
}

static int serve_popped(struct vu_blk_run *run)
{
    int popped = takes_more(run) ? vu_queue_pop(run->queue, run->chains, most(run)) : 0;
    int ready = popped > 0 && run->ahead ? submit(run, (uint32_t)popped) : popped;
    int code = ready > 0 ? serve_all(run, (uint32_t)ready) : ready;
    return code < 0 ? code : popped;
}

static int serve_collected(struct vu_blk_run *run)
{
    int collected = run->ahead && run->free ? vu_ahead_collect(run->queue, run->chains, most(run)) : 0;
    int code = collected > 0 ? serve_all(run, (uint32_t)collected) : collected;
    return code < 0 ? code : collected;
}

/* Chains served, 0 if there was nothing to do, or a negative code. */
static int work(struct vu_blk_run *run)
{
    int popped = serve_popped(run);
    int collected = popped < 0 ? 0 : serve_collected(run);
    int ended = popped < 0 || collected < 0 ? 0 : serve_pending(run);
    return popped < 0 ? popped : collected < 0 ? collected : ended < 0 ? ended : popped + collected + ended;
}

/* A front-end may make its eventfd a blocking one and read it itself, so poll's word is not enough. */
static void drain_kick(struct vu_blk_run *run)
{
    uint64_t count;
    struct iovec iov = {&count, sizeof count};
    run->tally.kicks++;
    if (preadv2(run->kick, &iov, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP)
        run->kick = -1;
}

/* Like KVM's halt polling: a wait that was short makes polling worthwhile next time, a long one does not. */
static void adapt(struct vu_blk_run *run)
{
    uint64_t most = (uint64_t)run->blk->config.poll_us * 1000;
    if (run->now - run->active > most)
        run->window = 0;
    else
        run->window = vu_least(run->window ? 2 * run->window : most / 4, most);
}

/* Sleeps until something is to be done, a stop included. */
static int sleep_until_kick(struct vu_blk_run *run)
{
    struct pollfd fds[4] = {
        {.fd = run->stopping ? -1 : run->stop, .events = POLLIN},
        {.fd = takes_more(run) ? run->kick : -1, .events = POLLIN},
        {.fd = run->ahead && run->free ? vu_ahead_fd(run->queue) : -1, .events = POLLIN},
        {.fd = run->uring ? vu_uring_fd(run->uring) : -1, .events = POLLIN},
    };
    struct timespec pause = {.tv_nsec = POLLED_SLEEP_NS};
    bool polled = run->kick < 0 && takes_more(run);

    if (ppoll(fds, 4, polled ? &pause : NULL, NULL) < 0)
        return errno == EINTR ? 0 : VU_E_SYS;
    run->stopping |= fds[0].revents != 0;
    if (fds[1].revents & POLLIN)
        drain_kick(run);
    else if (fds[1].revents)
        run->kick = -1; /* its other end is gone: look at the ring from time to time */
    return 0;
}

/* Nothing to do: polls for a while, then asks for kicks and sleeps. While a medium is waited for it sleeps at once: what
 * polling saves is little beside that wait, and costs as much CPU as the request itself. */
static int rest(struct vu_blk_run *run)
{
    if (run->now - run->active < run->window && !vu_blk_transfers_out(run)) {
        sched_yield(); /* the driver may share our CPU */
        return 0;
    }
    bool armed = takes_more(run);
    int more = armed ? vu_queue_arm(run->queue) : 0;
    if (more)
        return more < 0 ? more : 0;
    settle(run);
    int code = sleep_until_kick(run);
    if (code < 0)
        return code;
    run->now = vu_clock_ns();
    adapt(run);
    return armed && !run->stopping ? vu_queue_disarm(run->queue) : 0;
}

static void look_for_stop(struct vu_blk_run *run)
{
    struct pollfd fd = {.fd = run->stop, .events = POLLIN};
    if (run->stopping || run->now - run->stop_check < STOP_CHECK_NS)
        return;
    run->stop_check = run->now;
    run->stopping = poll(&fd, 1, 0) > 0;
}

static int loop(struct vu_blk_run *run)
{
    int code = run->ahead ? vu_queue_touch_ring(run->queue) : 0;
    while (code >= 0 && !(run->stopping && !vu_ahead_waiting(run->queue) && !vu_blk_transfers_out(run))) {
        code = work(run);
        run->now = vu_clock_ns();
        if (code > 0)
            run->active = run->now;
        else if (code == 0)
            code = rest(run);
        look_for_stop(run);
    }
    return code < 0 ? code : 0;
}

int vu_blk_run(vu_blk *blk, vu_queue *queue, int kick, int stop)
{
    struct vu_blk_run run;
    memset(&run, 0, offsetof(struct vu_blk_run, unused)); /* the arrays behind are written before they are read */
    run.blk = blk;
    run.queue = queue;
    run.kick = kick;
    run.stop = stop;
    run.ahead = vu_queue_touch(queue) != NULL;
    run.now = run.active = vu_clock_ns();
    int code = vu_blk_transfers_open(&run);
    if (code == 0)
        code = loop(&run);
    vu_blk_transfers_close(&run);
    settle(&run);
    return code;
}
