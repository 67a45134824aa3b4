/*
 * What all ends of a network device share: frames out of guest memory, frames that are read before they are taken, and what
 * a kind of end need not do.
 *
 * What does not belong here: where frames go (end_measure.c, end_tap.c, end_stream.c, end_datagram.c, hub.c), which frames may pass (net.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net.h"

static void copy(const struct vu_packet *packet, uint8_t *to)
{
    const vu_segment *segment = packet->segments;
    uint64_t skip = packet->skip, left = packet->length;
    for (; left; segment++) {
        uint64_t part = vu_least(segment->length - skip, left);
        memcpy(to, segment->host + skip, part);
        to += part;
        left -= part;
        skip = 0;
    }
}

static void copy_guarded(const vu_map *map, struct vu_packet *packets, uint8_t *const *to, uint32_t count,
                         volatile uint32_t *at)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, map)) {
        packets[*at].drop = VU_DROP_FAULT;
        *at = *at + 1;
        return;
    }
    for (uint32_t i = *at; i < count; *at = ++i)
        copy(&packets[i], to[i]);
    vu_guard_leave(&guard);
}

void vu_packets_copy(const vu_map *map, struct vu_packet *packets, uint8_t *const *to, uint32_t count)
{
    volatile uint32_t at = 0;
    while (at < count)
        copy_guarded(map, packets, to, count, &at);
}

/* The count with those before, or more than there may be. */
static int vectors(const struct vu_packet *packet, struct iovec *iov, int count)
{
    const vu_segment *segment = packet->segments;
    uint64_t skip = packet->skip, left = packet->length;
    for (; left && count < VU_NET_VECTORS; segment++) {
        uint64_t part = vu_least(segment->length - skip, left);
        iov[count++] = (struct iovec){segment->host + skip, part};
        left -= part;
        skip = 0;
    }
    return left ? VU_NET_VECTORS + 1 : count;
}

int vu_packet_gather(const vu_map *map, struct vu_packet *packet, struct vu_gathered *gathered, int first)
{
    uint8_t *to = gathered->copy;
    int count = vectors(packet, gathered->iov, first);
    if (count <= VU_NET_VECTORS)
        return count;
    vu_packets_copy(map, packet, &to, 1);
    gathered->iov[first] = (struct iovec){gathered->copy, packet->length};
    errno = EFAULT;
    return packet->drop == VU_DROP_NONE ? first + 1 : -1;
}

/* ---- frames of a descriptor that keeps them apart ---------------------------------------------------------------------- */

static void read_frames(struct vu_inbox *inbox, vu_read_frame *read_frame, void *of)
{
    enum { LINE = 64 }; /* frames begin at a cache line */
    uint32_t used = 0;
    inbox->first = inbox->count = 0;
    while (inbox->count < VU_NET_BATCH && used + VU_NET_FRAME_MOST <= sizeof inbox->received) {
        struct vu_frame *frame = &inbox->frames[inbox->count];
        *frame = (struct vu_frame){.bytes = inbox->received + used};
        if (!read_frame(of, frame))
            break;
        inbox->count++;
        used += ((uint32_t)vu_least(frame->length, VU_NET_FRAME_MOST) + LINE - 1) & ~(uint32_t)(LINE - 1);
    }
}

uint32_t vu_inbox_look(struct vu_inbox *inbox, vu_read_frame *read_frame, void *of, struct vu_frame *frames, uint32_t max)
{
    if (!inbox->count)
        read_frames(inbox, read_frame, of);
    uint32_t count = (uint32_t)vu_least(inbox->count, max);
    memcpy(frames, inbox->frames + inbox->first, count * sizeof *frames);
    return count;
}

void vu_inbox_take(struct vu_inbox *inbox, uint32_t count)
{
    inbox->first += count;
    inbox->count -= count;
}

/* ---- for Python -------------------------------------------------------------------------------------------------------- */

void vu_end_free(vu_end *end)
{
    if (end)
        end->kind->free(end);
}

int vu_end_accept(vu_end *end, uint64_t features)
{
    return end->kind->accept(end, features);
}

void vu_end_flush(vu_end *end)
{
    end->kind->flush(end);
}

int vu_end_inject(vu_end *end, const void *frame, uint32_t length)
{
    return length >= VU_NET_ETHER && length <= VU_NET_FRAME_MOST && end->kind->inject(end, frame, length);
}

/* ---- what a kind need not do -------------------------------------------------------------------------------------------- */

bool vu_end_never_arms(vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
    return false;
}

void vu_end_is_woken(vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
}

int vu_end_has_no_receive_fd(const vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
    return -1;
}

uint64_t vu_end_loses_none(vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
    return 0;
}

void vu_end_is_attended(vu_end *end, uint32_t pair, bool on)
{
    (void)end, (void)pair, (void)on;
}

bool vu_end_sends_at_once(vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
    return false;
}

struct pollfd vu_end_has_room(const vu_end *end, uint32_t pair)
{
    (void)end, (void)pair;
    return (struct pollfd){.fd = -1};
}

int vu_end_accepts_all(vu_end *end, uint64_t features)
{
    (void)end, (void)features;
    return 0;
}

void vu_end_flushes_none(vu_end *end)
{
    (void)end;
}

/* Whole frames only, so that a stream goes on where one begins; and not for ever, whatever the other side sends. */
void vu_end_flushes_what_comes(vu_end *end)
{
    enum { LOOKS = 256 };
    struct vu_frame frames[VU_NET_BATCH];
    uint32_t count = 1;
    for (uint32_t i = 0; i < LOOKS && count; i++) {
        count = end->kind->look(end, 0, frames, VU_NET_BATCH);
        end->kind->take(end, 0, count);
    }
}

void vu_end_is_memory(vu_end *end)
{
    free(end);
}
