/*
 * The ends for measurements: one that takes every frame and one that has the same frame for ever.
 *
 * Nothing is saved here that a real end has to do: each byte is copied out of guest memory, and into it.
 */
#include <stdlib.h>
#include <string.h>

#include "net.h"

struct measure {
    vu_end end;
    uint8_t (*scratch)[VU_NET_FRAME_MOST + 1]; /* of each pair */
    uint32_t length;                           /* of the frame; 0: nothing is ever received */
    uint8_t frame[];
};

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    struct measure *measure = (struct measure *)end;
    (void)pair;
    for (uint32_t i = 0; measure->length && i < max; i++)
        frames[i] = (struct vu_frame){.bytes = measure->frame, .length = measure->length};
    return measure->length ? max : 0;
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    (void)end, (void)pair, (void)count;
}

static uint32_t send(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    struct measure *measure = (struct measure *)end;
    uint8_t *to[VU_NET_BATCH];
    for (uint32_t i = 0; i < count; i++)
        to[i] = measure->scratch[pair];
    vu_packets_copy(map, packets, to, count);
    return count;
}

static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    (void)end, (void)bytes, (void)length;
    return true;
}

static void free_measure(vu_end *end)
{
    free(((struct measure *)end)->scratch);
    free(end);
}

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = vu_end_never_arms,
    .woken = vu_end_is_woken,
    .receive_fd = vu_end_has_no_receive_fd,
    .lost = vu_end_loses_none,
    .attend = vu_end_is_attended,
    .send = send,
    .unsent = vu_end_sends_at_once,
    .room = vu_end_has_room,
    .inject = inject,
    .accept = vu_end_accepts_all,
    .flush = vu_end_flushes_none,
    .free = free_measure,
};

vu_end *vu_end_measure(uint32_t pairs, const void *frame, uint32_t length, int *error)
{
    if (!pairs || length > VU_NET_FRAME_MOST || (length && length < VU_NET_ETHER)) {
        *error = VU_E_SIZE;
        return NULL;
    }
    struct measure *measure = calloc(1, sizeof *measure + length);
    if (measure)
        measure->scratch = calloc(pairs, sizeof *measure->scratch);
    if (!measure || !measure->scratch) {
        free(measure);
        *error = VU_E_NOMEM;
        return NULL;
    }
    measure->end = (vu_end){&kind, pairs};
    measure->length = length;
    if (length)
        memcpy(measure->frame, frame, length);
    return &measure->end;
}
