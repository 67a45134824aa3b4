/*
 * The thread of a receive ring: frames from the end into buffers of the guest.
 *
 * What belongs here: which buffers a frame takes, filling them, returning them in batches. What does not: where frames
 * come from (end.c), what a driver accepts (net.c), how a frame is cut (net_cut.c), when the thread sleeps (engine.c).
 */
#include <endian.h>
#include <string.h>

#include "net.h"

/* The chains that a frame takes: run->lengths has what is written into each. None: the frame is dropped. */
struct placement {
    uint32_t first, count;
};

struct receive {
    struct vu_engine engine;
    vu_net *net;
    vu_end *end;
    uint32_t pair;
    bool starved; /* a frame is there, and the guest has no buffer for it */
    bool cutting;        /* `frames` are segments of one frame of the end's, the first */
    uint32_t segments;   /* of that frame, which are done with */
    struct vu_cut cut;
    struct vu_net_stats tally;
    struct vu_held held;
    /* Written before they are read. */
    struct vu_frame frames[VU_NET_BATCH];
    uint8_t pieces[2 * VU_NET_FRAME_MOST]; /* the bytes of segments */
    struct placement placements[VU_NET_BATCH];
    uint32_t lengths[VU_NET_HELD];
    vu_chain *done[VU_NET_HELD];
};

/* ---- which frames are next --------------------------------------------------------------------------------------------- */

/* Made again each time until they are done with: what is filled in completes checksums in them. */
static uint32_t cut_some(struct receive *run)
{
    const struct vu_frame whole = run->frames[0];
    uint32_t used = 0, n = 0, most = run->cut.headers + run->cut.size;
    for (; n < VU_NET_BATCH && run->segments + n < run->cut.count && used + most <= sizeof run->pieces; n++) {
        vu_cut_segment(&whole, &run->cut, run->segments + n, run->pieces + used, &run->frames[n]);
        used += run->frames[n].length;
    }
    return n;
}

/* The end's frames up to one that has to be cut; or, where that is the first, segments of it. */
static uint32_t look(struct receive *run)
{
    uint32_t count = run->end->kind->look(run->end, run->pair, run->frames, VU_NET_BATCH), n = 0;
    while (n < count && !vu_net_cuts(run->net, &run->frames[n], &run->cut))
        n++;
    run->cutting = count && !n;
    return run->cutting ? cut_some(run) : n;
}

/* The first `done` of those are done with. */
static void take(struct receive *run, uint32_t done)
{
    if (run->cutting) {
        run->segments += done;
        if (run->segments < run->cut.count)
            return;
        run->segments = 0;
        done = 1;
    }
    run->end->kind->take(run->end, run->pair, done);
}

/* ---- which buffers a frame takes ------------------------------------------------------------------------------------- */

/* Buffers that no frame fits into, or whose memory is lost, go back empty: they would stand in the way of all behind
 * them. Returns the first that is not so. */
static uint32_t pass_over(struct receive *run, uint32_t at)
{
    uint64_t least = run->net->header + (run->net->mergeable ? 0 : VU_NET_ETHER);
    for (; at < run->held.ready; at++) {
        const vu_chain *chain = vu_held_at(&run->held, at);
        if (chain->writable >= least && !chain->fault)
            break;
        run->lengths[at] = 0;
        run->tally.useless++;
    }
    return at;
}

enum verdict { PLACED, STARVED, TOO_LARGE };

/* Whether the guest could offer more buffers than we hold. */
static enum verdict want_more(const struct receive *run)
{
    uint64_t most = vu_least(vu_queue_size(run->engine.queue), VU_NET_HELD);
    return run->held.ready < most ? STARVED : TOO_LARGE;
}

/* The buffers from `at` on that hold the header and the frame: how many in *count. 5.1.6.3.2: each but the last is full. */
static enum verdict place(struct receive *run, uint32_t at, const struct vu_frame *frame, uint32_t *count)
{
    uint64_t left = (uint64_t)run->net->header + frame->length;
    if (at == run->held.ready)
        return at ? STARVED : want_more(run);
    if (!run->net->mergeable && vu_held_at(&run->held, at)->writable < left)
        return TOO_LARGE;
    uint32_t n = at;
    for (; left && n < run->held.ready; n++) {
        const vu_chain *chain = vu_held_at(&run->held, n);
        if (chain->fault)
            return TOO_LARGE;
        run->lengths[n] = (uint32_t)vu_least(chain->writable, left);
        left -= run->lengths[n];
    }
    *count = n - at;
    return !left ? PLACED : at ? STARVED : want_more(run);
}

/* Plans for as many of the frames as there are buffers for: how many, and in *used the chains that they take. */
static uint32_t plan(struct receive *run, uint32_t frames, uint32_t *used)
{
    uint32_t at = 0, n = 0;
    run->starved = false;
    for (; n < frames && !run->starved; n++) {
        struct placement *placement = &run->placements[n];
        enum vu_drop why = vu_net_refuse(run->net, &run->frames[n]);
        *placement = (struct placement){at, 0};
        if (why != VU_DROP_NONE) {
            vu_net_count_drop(&run->tally, why);
            continue;
        }
        placement->first = at = pass_over(run, at);
        enum verdict verdict = place(run, at, &run->frames[n], &placement->count);
        if (verdict == STARVED) {
            run->starved = true;
            break;
        }
        if (verdict == TOO_LARGE) {
            placement->count = 0;
            vu_net_count_drop(&run->tally, VU_DROP_ROOM);
        } else {
            vu_net_fit(run->net, &run->frames[n]);
        }
        at += placement->count;
    }
    *used = at;
    return n;
}

/* ---- filling them ------------------------------------------------------------------------------------------------------ */

struct cursor {
    const struct receive *run;
    uint32_t chain;  /* of those that are held */
    uint32_t left;   /* bytes that go into it */
    const vu_segment *segment;
    uint64_t offset; /* in the segment */
};

static void enter_chain(struct cursor *cursor, uint32_t chain)
{
    const vu_chain *entered = vu_held_at(&cursor->run->held, chain);
    cursor->chain = chain;
    cursor->left = cursor->run->lengths[chain];
    cursor->segment = entered->segments + entered->readable_count;
    cursor->offset = 0;
}

static void store(struct cursor *cursor, const void *from, uint64_t length)
{
    const uint8_t *bytes = from;
    while (length) {
        while (!cursor->left)
            enter_chain(cursor, cursor->chain + 1);
        if (cursor->offset == cursor->segment->length) {
            cursor->segment++;
            cursor->offset = 0;
        }
        uint64_t part = vu_least(vu_least(length, cursor->left), cursor->segment->length - cursor->offset);
        memcpy(cursor->segment->host + cursor->offset, bytes, part);
        bytes += part;
        length -= part;
        cursor->offset += part;
        cursor->left -= (uint32_t)part;
    }
}

/* Before the copy: what was written when a page is lost halfway is dirty all the same. */
static void mark_written(struct receive *run, const struct placement *placement)
{
    for (uint32_t i = placement->first; i < placement->first + placement->count; i++)
        vu_held_at(&run->held, i)->written = run->lengths[i];
}

static void fill_pieces(struct receive *run, uint32_t chain, const uint8_t *header, const struct vu_frame *frame)
{
    struct cursor cursor = {.run = run};
    enter_chain(&cursor, chain);
    store(&cursor, header, run->net->header);
    store(&cursor, frame->bytes, frame->length);
}

static void fill(struct receive *run, uint32_t n)
{
    const struct placement *placement = &run->placements[n];
    const struct vu_frame *frame = &run->frames[n];
    uint8_t header[VU_NET_HEADER + 2];
    uint16_t buffers = htole16((uint16_t)placement->count);

    if (!placement->count)
        return;
    memcpy(header, &frame->header, VU_NET_HEADER);
    memcpy(header + VU_NET_HEADER, &buffers, sizeof buffers);
    mark_written(run, placement);
    const vu_chain *chain = vu_held_at(&run->held, placement->first);
    const vu_segment *segment = chain->segments + chain->readable_count;
    if (run->net->header == sizeof header && segment->length >= sizeof header + frame->length) {
        memcpy(segment->host, header, sizeof header);
        memcpy(segment->host + sizeof header, frame->bytes, frame->length);
    } else {
        fill_pieces(run, placement->first, header, frame);
    }
}

static void fill_guarded(struct receive *run, uint32_t frames, volatile uint32_t *at)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, vu_queue_map(run->engine.queue))) {
        struct placement *lost = &run->placements[*at];
        for (uint32_t i = lost->first; i < lost->first + lost->count; i++)
            run->lengths[i] = 0;
        lost->count = 0;
        vu_net_count_drop(&run->tally, VU_DROP_FAULT);
        *at = *at + 1;
        return;
    }
    for (uint32_t i = *at; i < frames; *at = ++i)
        fill(run, i);
    vu_guard_leave(&guard);
}

static void prefetch(const struct receive *run, uint32_t frames)
{
    for (uint32_t i = 0; i < frames; i++) {
        if (!run->placements[i].count)
            continue;
        const vu_chain *chain = vu_held_at(&run->held, run->placements[i].first);
        const uint8_t *host = chain->segments[chain->readable_count].host;
        vu_prefetch_to_write(host);
        vu_prefetch_to_write((const uint8_t *)((uintptr_t)host + VU_LINE));
    }
}

static void fill_all(struct receive *run, uint32_t frames)
{
    volatile uint32_t at = 0;
    prefetch(run, frames);
    while (at < frames)
        fill_guarded(run, frames, &at);
    for (uint32_t i = 0; i < frames; i++) {
        run->tally.frames += run->placements[i].count != 0;
        run->tally.bytes += run->placements[i].count ? run->frames[i].length : 0;
    }
}

static void settle(struct receive *run)
{
    ((uint64_t *)&run->tally)[VU_NET_COUNTER(dropped_header) + VU_DROP_FULL] += run->end->kind->lost(run->end, run->pair);
    vu_net_settle(run->net, 2 * run->pair, &run->tally);
}

/* All at once: no driver sees a part of a frame. */
static int give_back(struct receive *run, uint32_t used)
{
    for (uint32_t i = 0; i < used; i++)
        run->done[i] = vu_held_at(&run->held, i);
    vu_held_drop(&run->held, used);
    settle(run); /* whoever is called finds in the counters what for */
    int code = vu_queue_push(run->engine.queue, run->done, run->lengths, used);
    if (code == 0) /* what a signal says is of no interest: a ring that it breaks says so when more is taken */
        vu_queue_signal(run->engine.queue);
    return code;
}

/* ---- the thread -------------------------------------------------------------------------------------------------------- */

/* Enough for two batches; more while a frame waits for more. */
static uint32_t room(const struct receive *run)
{
    uint32_t most = run->starved ? VU_NET_HELD : 2 * VU_NET_BATCH;
    return run->held.count < most ? most - run->held.count : 0;
}

/* Chains used and frames done with, or a negative code. */
static int deliver(struct receive *run, uint32_t frames)
{
    uint32_t used;
    uint32_t done = plan(run, frames, &used);
    fill_all(run, done);
    int code = used ? give_back(run, used) : 0;
    take(run, done);
    return code < 0 ? code : (int)(used + done);
}

static int work(void *of)
{
    struct receive *run = of;
    int filled = vu_held_fill(&run->held, &run->engine, room(run));
    if (filled < 0 || run->engine.stopping)
        return filled;
    uint32_t frames = look(run);
    int done = frames ? deliver(run, frames) : 0;
    return done < 0 ? done : done + filled;
}

static bool kept(const void *of)
{
    const struct receive *run = of;
    return vu_ahead_waiting(run->engine.queue);
}

/* Sleeps until a frame comes; or, when one is there, until there are buffers for it. */
static int sleep_for(struct receive *run, bool frames)
{
    const struct vu_end_kind *kind = run->end->kind;
    struct vu_engine_wish wish = {
        .kick = !run->engine.stopping && run->starved && room(run),
        .pages = true,
        .other = {{.fd = frames ? kind->receive_fd(run->end, run->pair) : -1, .events = POLLIN}, {.fd = -1}},
    };
    settle(run);
    if (frames && kind->arm(run->end, run->pair))
        return 0;
    int code = vu_engine_sleep(&run->engine, &wish);
    if (frames)
        kind->woken(run->end, run->pair);
    return code;
}

static int rest(void *of)
{
    struct receive *run = of;
    if (vu_engine_polls(&run->engine))
        return 0;
    return sleep_for(run, !run->starved && !run->engine.stopping);
}

int vu_net_receive(vu_net *net, uint32_t pair, vu_queue *queue, int kick, int stop)
{
    static const struct vu_engine_tasks tasks = {work, kept, rest};
    struct receive run;
    memset(&run, 0, offsetof(struct receive, frames));
    run.net = net;
    run.end = net->config.end;
    run.pair = pair;
    vu_engine_begin(&run.engine, queue, kick, stop, net->config.poll_us);
    run.end->kind->attend(run.end, pair, true);
    /* Kicks are of interest only to a frame that has no buffer. */
    int code = vu_queue_disarm(queue);
    if (code == 0)
        code = vu_engine_run(&run.engine, &tasks, &run);
    if (code == 0)
        code = vu_held_give_back(&run.held, queue);
    run.end->kind->attend(run.end, pair, false);
    settle(&run);
    return code;
}
