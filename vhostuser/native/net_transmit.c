/*
 * The thread of a transmit ring: frames from the guest to the end.
 *
 * What belongs here: taking frames in batches, keeping their order, returning their buffers; and a ring that is disabled,
 * whose frames go nowhere. What does not: which frames may pass (net.c), where they go (end.c), when the thread sleeps
 * (engine.c).
 */
#include <string.h>

#include "net.h"

struct transmit {
    struct vu_engine engine;
    vu_net *net;
    vu_end *end;
    uint32_t pair;
    bool blocked; /* the end has no room, for a frame or for what it has begun to send */
    struct vu_net_stats tally;
    struct vu_held held;
    /* Written before they are read. */
    struct vu_packet packets[VU_NET_BATCH];
    uint8_t verdicts[VU_NET_BATCH]; /* of each chain: VU_DROP_NONE, or why its frame may not pass */
    vu_chain *done[VU_NET_BATCH];
};

/* Nothing is written into what a guest transmits. */
static const uint32_t nothing[VU_NET_BATCH];

/* ---- one batch -------------------------------------------------------------------------------------------------------- */

static void prefetch(const struct transmit *run, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        const vu_chain *chain = vu_held_at(&run->held, i);
        if (!chain->readable_count)
            continue;
        vu_prefetch(chain->segments->host);
        vu_prefetch((const uint8_t *)((uintptr_t)chain->segments->host + VU_LINE));
    }
}

/* Judges chains *at to `count`, and puts those that may pass into run->packets behind the first *passed. */
static void judge_guarded(struct transmit *run, uint32_t count, volatile uint32_t *at, volatile uint32_t *passed)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, vu_queue_map(run->engine.queue))) {
        run->verdicts[*at] = VU_DROP_FAULT;
        *at = *at + 1;
        return;
    }
    for (uint32_t i = *at, n = *passed; i < count; *at = ++i) {
        struct vu_packet *packet = &run->packets[n];
        run->verdicts[i] = (uint8_t)vu_net_parse(run->net, vu_held_at(&run->held, i), packet);
        packet->chain = (uint16_t)i;
        if (run->verdicts[i] == VU_DROP_NONE)
            *passed = ++n;
    }
    vu_guard_leave(&guard);
}

static uint32_t judge(struct transmit *run, uint32_t count)
{
    volatile uint32_t at = 0, passed = 0;
    while (at < count)
        judge_guarded(run, count, &at, &passed);
    return passed;
}

static void count_sent(struct transmit *run, uint32_t sent)
{
    for (uint32_t i = 0; i < sent; i++) {
        if (run->packets[i].drop == VU_DROP_NONE) {
            run->tally.frames++;
            run->tally.bytes += run->packets[i].length;
        } else {
            vu_net_count_drop(&run->tally, run->packets[i].drop);
        }
    }
}

/* Of chains that are done with: those behind a frame that waits are judged again. */
static void count_refused(struct transmit *run, uint32_t done)
{
    for (uint32_t i = 0; i < done; i++)
        if (run->verdicts[i] != VU_DROP_NONE)
            vu_net_count_drop(&run->tally, run->verdicts[i]);
}

static int give_back(struct transmit *run, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        run->done[i] = vu_held_at(&run->held, i);
    vu_held_drop(&run->held, count);
    vu_net_settle(run->net, 2 * run->pair + 1, &run->tally); /* whoever is called finds in the counters what for */
    int code = vu_queue_push(run->engine.queue, run->done, nothing, count);
    if (code == 0) /* what a signal says is of no interest: a ring that it breaks says so when more is taken */
        vu_queue_signal(run->engine.queue);
    return code;
}

/* Chains that are done with, or a negative code. Frames behind one for which there is no room wait with it, judged again
 * then: the guest may have written over them. */
static int send(struct transmit *run, uint32_t count)
{
    prefetch(run, count);
    uint32_t passed = judge(run, count);
    const struct vu_end_kind *kind = run->end->kind;
    uint32_t sent = kind->send(run->end, run->pair, vu_queue_map(run->engine.queue), run->packets, passed);
    run->blocked = sent < passed || kind->unsent(run->end, run->pair);
    count_sent(run, sent);
    uint32_t done = sent < passed ? run->packets[sent].chain : count;
    count_refused(run, done);
    int code = done ? give_back(run, done) : 0;
    return code < 0 ? code : (int)done;
}

/* ---- the thread -------------------------------------------------------------------------------------------------------- */

static uint32_t room(const struct transmit *run)
{
    return run->held.count < VU_NET_BATCH ? VU_NET_BATCH - run->held.count : 0;
}

static int work(void *of)
{
    struct transmit *run = of;
    int filled = vu_held_fill(&run->held, &run->engine, room(run));
    if (filled < 0 || (!run->held.ready && !run->blocked))
        return filled;
    int sent = send(run, (uint32_t)vu_least(run->held.ready, VU_NET_BATCH));
    return sent < 0 ? sent : sent + filled;
}

static bool kept(const void *of)
{
    const struct transmit *run = of;
    return vu_ahead_waiting(run->engine.queue);
}

static int rest(void *of)
{
    struct transmit *run = of;
    if (!run->blocked && vu_engine_polls(&run->engine))
        return 0;
    struct vu_engine_wish wish = {
        .kick = !run->engine.stopping && room(run),
        .pages = true,
        .other = {run->blocked ? run->end->kind->room(run->end, run->pair) : (struct pollfd){.fd = -1}, {.fd = -1}},
    };
    return vu_engine_sleep(&run->engine, &wish);
}

int vu_net_transmit(vu_net *net, uint32_t pair, vu_queue *queue, int kick, int stop)
{
    static const struct vu_engine_tasks tasks = {work, kept, rest};
    struct transmit run;
    memset(&run, 0, offsetof(struct transmit, packets));
    run.net = net;
    run.end = net->config.end;
    run.pair = pair;
    vu_queue_only_reads(queue);
    vu_engine_begin(&run.engine, queue, kick, stop, net->config.poll_us);
    int code = vu_engine_run(&run.engine, &tasks, &run);
    if (code == 0)
        code = vu_held_give_back(&run.held, queue);
    vu_net_settle(net, 2 * pair + 1, &run.tally);
    return code;
}

/* ---- a ring that is disabled -------------------------------------------------------------------------------------------- */

static int discard(void *of)
{
    struct vu_engine *engine = of;
    vu_chain *chains[VU_NET_BATCH];
    int count = engine->stopping ? 0 : vu_queue_pop(engine->queue, chains, VU_NET_BATCH);
    if (count <= 0)
        return count;
    int code = vu_queue_push(engine->queue, chains, nothing, (uint32_t)count);
    if (code == 0)
        vu_queue_signal(engine->queue);
    return code ? code : count;
}

static bool keeps_nothing(const void *of)
{
    (void)of;
    return false;
}

static int await_kick(void *of)
{
    struct vu_engine *engine = of;
    struct vu_engine_wish wish = {.kick = !engine->stopping, .other = {{.fd = -1}, {.fd = -1}}};
    return vu_engine_sleep(engine, &wish);
}

int vu_net_discard(vu_queue *queue, int kick, int stop)
{
    static const struct vu_engine_tasks tasks = {discard, keeps_nothing, await_kick};
    struct vu_engine engine;
    vu_queue_only_reads(queue);
    vu_engine_begin(&engine, queue, kick, stop, 0);
    return vu_engine_run(&engine, &tasks, &engine);
}
