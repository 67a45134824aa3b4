/*
 * The life of an engine's thread: one ring, from its start to the stop.
 *
 * An engine says what it does when there is work (work), what it is still waiting for when it has been told to stop
 * (kept), and what it wants to be woken by when there is none (rest); vu_engine_run does the rest.
 */
#ifndef VHOSTUSER_ENGINE_H
#define VHOSTUSER_ENGINE_H

#include <poll.h>

#include "core.h"

struct vu_engine {
    vu_queue *queue;
    int kick, stop;
    bool stopping;
    bool ahead;          /* a touch pool is set: chains wait there for their missing pages */
    uint64_t now;        /* ns, monotonic; read once a round */
    uint64_t active;     /* when there was work last */
    uint64_t stop_check; /* when `stop` was looked at */
    uint64_t window;     /* ns: how long to poll after `active`, adapted between 0 and `patience` */
    uint64_t patience;
};

struct vu_engine_tasks {
    /* Does what can be done without waiting: more than 0 if there was something, 0, or a negative code. */
    int (*work)(void *run);
    /* Whether something is under way that has to end before the thread does. Asked after the stop. */
    bool (*kept)(const void *run);
    /* There is nothing to do: polls or sleeps. 0 or a negative code. */
    int (*rest)(void *run);
};

/* What ends a sleep, beside the stop. */
struct vu_engine_wish {
    bool kick;              /* more chains would be taken */
    bool pages;             /* chains whose pages have come would be */
    struct pollfd other[2]; /* fd -1: none */
};

/* kick: an eventfd or a pipe, -1: the ring is polled. stop: an eventfd, left unread. */
void vu_engine_begin(struct vu_engine *engine, vu_queue *queue, int kick, int stop, uint32_t poll_us);
/* Until the stop or until the driver breaks the ring, and until nothing is kept: 0, or why the ring is broken; or at
 * once the negative code of a task that failed otherwise. [touches] */
int vu_engine_run(struct vu_engine *engine, const struct vu_engine_tasks *tasks, void *run);

/* For rest: true while it pays to look again soon rather than to sleep. Gives the CPU to whoever else wants it. */
bool vu_engine_polls(const struct vu_engine *engine);
/* For rest: asks the driver for kicks if they are wished for and sleeps until something is to be done, a stop included.
 * Adapts how long is polled next time. 0 or a negative code. [touches] */
int vu_engine_sleep(struct vu_engine *engine, const struct vu_engine_wish *wish);

#endif
