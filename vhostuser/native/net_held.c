/*
 * Chains that a ring's thread has taken and not yet used.
 *
 * What belongs here: taking them, waiting for their pages without stopping anything else, giving back what was not used.
 * What does not: what is done with them (net_transmit.c, net_receive.c).
 */
#include "net.h"

enum { WAITING, READY }; /* in a chain's cookie */

static void look_again(struct vu_held *held)
{
    while (held->ready < held->count && vu_held_at(held, held->ready)->cookie == READY)
        held->ready++;
}

static int take(struct vu_held *held, struct vu_engine *engine, uint32_t most)
{
    uint32_t at = (held->first + held->count) & (VU_NET_HELD - 1);
    vu_chain **chains = held->chains + at;
    int popped = vu_queue_pop(engine->queue, chains, (uint32_t)vu_least(most, VU_NET_HELD - at));
    bool alone = popped == 1 && !held->count;

    for (int i = 0; i < popped; i++) {
        chains[i]->cookie = READY;
        if (!engine->ahead)
            continue;
        int waits = vu_ahead_submit(engine->queue, chains[i], alone);
        if (waits < 0)
            return waits;
        chains[i]->cookie = waits ? WAITING : READY;
    }
    if (popped > 0)
        held->count += (uint32_t)popped;
    return popped;
}

static int collect(struct vu_engine *engine)
{
    vu_chain *chains[VU_NET_BATCH];
    int count = vu_ahead_collect(engine->queue, chains, VU_NET_BATCH);
    for (int i = 0; i < count; i++)
        chains[i]->cookie = READY;
    return count;
}

int vu_held_fill(struct vu_held *held, struct vu_engine *engine, uint32_t most)
{
    uint32_t room = (uint32_t)vu_least(most, VU_NET_HELD - held->count);
    int taken = room && !engine->stopping ? take(held, engine, room) : 0;
    int come = taken >= 0 && engine->ahead ? collect(engine) : 0;
    look_again(held);
    return taken < 0 ? taken : come < 0 ? come : taken + come;
}

void vu_held_drop(struct vu_held *held, uint32_t n)
{
    held->first = (held->first + n) & (VU_NET_HELD - 1);
    held->count -= n;
    held->ready -= n;
}

int vu_held_give_back(struct vu_held *held, vu_queue *queue)
{
    vu_chain *chains[VU_NET_HELD];
    for (uint32_t i = 0; i < held->count; i++)
        chains[i] = vu_held_at(held, i);
    int code = vu_queue_unpop(queue, chains, held->count);
    held->count = held->ready = 0;
    return code;
}
