/*
 * The thread of one queue of the block engine, in one call.
 *
 * What belongs here: when it takes chains and returns them. What does not: what chains ask for (blk.c), when the thread
 * polls, sleeps and ends (engine.c), missing pages (touch.c).
 */
#include <string.h>

#include "blk.h"

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
    if (code == 0) /* a call descriptor that is of no use is the front-end's affair: only a broken ring counts here */
        vu_queue_signal(run->queue);
    settle(run);
    /* A ring that broke while chains were taken says so when more are; those of this batch are still served. */
    return code || vu_queue_drains(run->queue) ? code : vu_queue_broken(run->queue);
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
    return !run->engine.stopping && run->free;
}

/* Whether what is under way is left to whoever serves the ring next. */
static bool leaves(const struct vu_blk_run *run)
{
    return run->engine.stopping && vu_queue_leaves(run->queue);
}

/* Each chain may become a transfer, so no more are taken than can be under way. */
static uint32_t most(const struct vu_blk_run *run)
{
    return (uint32_t)vu_least(VU_BLK_BATCH, run->free);
}

static int serve_popped(struct vu_blk_run *run)
{
    int popped = takes_more(run) ? vu_queue_pop(run->queue, run->chains, most(run)) : 0;
    int ready = popped > 0 && run->engine.ahead ? submit(run, (uint32_t)popped) : popped;
    int code = ready > 0 ? serve_all(run, (uint32_t)ready) : ready;
    return code < 0 ? code : popped;
}

static int serve_collected(struct vu_blk_run *run)
{
    int collected = run->engine.ahead && run->free && !run->leaving ? vu_ahead_collect(run->queue, run->chains, most(run)) : 0;
    int code = collected > 0 ? serve_all(run, (uint32_t)collected) : collected;
    return code < 0 ? code : collected;
}

/* Chains served, 0 if there was nothing to do, or a negative code. */
static int work(void *of)
{
    struct vu_blk_run *run = of;
    if (leaves(run))
        vu_blk_transfers_leave(run);
    int popped = serve_popped(run);
    int collected = popped < 0 ? 0 : serve_collected(run);
    int ended = popped < 0 || collected < 0 ? 0 : serve_pending(run);
    return popped < 0 ? popped : collected < 0 ? collected : ended < 0 ? ended : popped + collected + ended;
}

static bool kept(const void *of)
{
    const struct vu_blk_run *run = of;
    return vu_blk_transfers_out(run) || (vu_ahead_waiting(run->queue) && !leaves(run));
}

/* While a medium is waited for it sleeps at once: what polling saves is little beside that wait, and costs as much CPU as
 * the request itself. */
static int rest(void *of)
{
    struct vu_blk_run *run = of;
    if (!vu_blk_transfers_out(run) && vu_engine_polls(&run->engine))
        return 0;
    settle(run);
    struct vu_engine_wish wish = {
        .kick = takes_more(run),
        .pages = run->free,
        .other = {{.fd = run->uring ? vu_uring_fd(run->uring) : -1, .events = POLLIN}, {.fd = -1}},
    };
    return vu_engine_sleep(&run->engine, &wish);
}

int vu_blk_run(vu_blk *blk, vu_queue *queue, int kick, int stop)
{
    static const struct vu_engine_tasks tasks = {work, kept, rest};
    struct vu_blk_run run;
    memset(&run, 0, offsetof(struct vu_blk_run, unused)); /* the arrays behind are written before they are read */
    run.blk = blk;
    run.queue = queue;
    vu_engine_begin(&run.engine, queue, kick, stop, blk->config.poll_us);
    int code = vu_blk_transfers_open(&run);
    if (code == 0)
        code = vu_engine_run(&run.engine, &tasks, &run);
    vu_blk_transfers_close(&run);
    settle(&run);
    return code;
}
