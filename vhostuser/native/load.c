/*
 * A load of block requests from the driver's side, for measurements: N random requests of one length kept in flight.
 *
 * What belongs here: what a benchmark needs to cost the same whoever serves it. What does not: the ring (driver.c), or
 * anything that a real driver would want beyond it.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include "core.h"

enum {
    HEADER = sizeof(struct virtio_blk_outhdr),
    SLOT = 64, /* bytes of a header and a status; a cache line, so that two requests do not share one */
    STATUS = 32,
    HEADS = 1 << 16,
};

struct state {
    const struct vu_load *load;
    struct vu_load_result *result;
    uint64_t random;
    uint32_t in_flight;
    uint16_t slots[HEADS]; /* by head */
};

/* xorshift64*: the same seed gives the same requests whoever serves them. */
static uint64_t next_random(struct state *state)
{
    state->random ^= state->random >> 12;
    state->random ^= state->random << 25;
    state->random ^= state->random >> 27;
    return state->random * 2685821657736338717u;
}

/* Slots lie behind the data buffers. */
static uint64_t slot_at(const struct vu_load *load, uint32_t slot)
{
    return load->at + (uint64_t)load->depth * load->length + (uint64_t)slot * SLOT;
}

static int submit(struct state *state, uint32_t slot)
{
    const struct vu_load *load = state->load;
    uint64_t at = slot_at(load, slot);
    struct virtio_blk_outhdr header = {
        .type = htole32(load->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN),
        .sector = htole64(next_random(state) % load->blocks * (load->length / 512)),
    };
    vu_buffer buffers[3] = {
        {.guest = at, .length = HEADER},
        {.guest = load->at + (uint64_t)slot * load->length, .length = load->length, .writable = !load->write},
        {.guest = at + STATUS, .length = 1, .writable = 1},
    };
    int64_t copied = vu_map_write(load->map, at, &header, HEADER);
    if (copied < 0)
        return (int)copied;
    int head = vu_driver_add(load->driver, buffers, 3);
    if (head < 0)
        return head;
    state->slots[head] = (uint16_t)slot;
    state->in_flight++;
    return 0;
}

static int publish(struct state *state)
{
    uint64_t one = 1;
    int wanted = vu_driver_publish(state->load->driver);
    if (wanted <= 0)
        return wanted;
    state->result->kicks++;
    return write(state->load->kick, &one, sizeof one) < 0 ? VU_E_SYS : 0;
}

/* Takes what was used and, with `again`, submits as much: the count, or a negative code. */
static int reap(struct state *state, int again)
{
    uint16_t head;
    uint32_t length;
    int taken, count = 0;

    while ((taken = vu_driver_take(state->load->driver, &head, &length)) > 0) {
        uint8_t status;
        uint32_t slot = state->slots[head];
        int64_t copied = vu_map_read(state->load->map, slot_at(state->load, slot) + STATUS, &status, 1);
        if (copied < 0)
            return (int)copied;
        state->result->errors += status != VIRTIO_BLK_S_OK;
        state->result->completed++;
        state->in_flight--;
        count++;
        int code = again ? submit(state, slot) : 0;
        if (code < 0)
            return code;
    }
    return taken < 0 ? taken : count;
}

/* Sleeps until the device calls; VU_E_CLOSED when it has not for five seconds. */
static int wait_for_call(struct state *state)
{
    struct pollfd fd = {.fd = state->load->call, .events = POLLIN};
    uint64_t count;
    int more = vu_driver_arm(state->load->driver);
    if (more)
        return more < 0 ? more : 0;
    state->result->sleeps++;
    int ready = poll(&fd, 1, 5000);
    if (ready <= 0)
        return ready < 0 ? VU_E_SYS : VU_E_CLOSED;
    if (read(fd.fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return VU_E_SYS;
    return vu_driver_disarm(state->load->driver);
}

static int loop(struct state *state)
{
    uint64_t start = vu_clock_ns(), now = start;
    uint64_t end = start + state->load->duration_ns;
    int code = 0;

    for (uint32_t slot = 0; slot < state->load->depth && code == 0; slot++)
        code = submit(state, slot);
    while (code >= 0 && state->in_flight) {
        code = publish(state);
        if (code == 0)
            code = reap(state, now < end);
        if (code == 0)
            code = wait_for_call(state);
        now = vu_clock_ns();
    }
    state->result->elapsed_ns = now - start;
    return code < 0 ? code : 0;
}

int vu_load_run(const struct vu_load *load, struct vu_load_result *result)
{
    struct state *state = calloc(1, sizeof *state);
    if (!state)
        return VU_E_NOMEM;
    state->load = load;
    state->result = result;
    state->random = load->seed | 1;
    *result = (struct vu_load_result){0};
    int code = loop(state);
    free(state);
    return code;
}
