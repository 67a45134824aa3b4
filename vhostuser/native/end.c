/*
 * What all ends of a network device share: copying frames out of guest memory, and what a kind of end need not do.
 *
 * What does not belong here: where frames go (end_measure.c, end_tap.c, end_stream.c, hub.c), which frames may pass (net.c).
 */
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

int vu_packet_vectors(const struct vu_packet *packet, struct iovec *iov, int count, int most)
{
    const vu_segment *segment = packet->segments;
    uint64_t skip = packet->skip, left = packet->length;
    for (; left && count < most; segment++) {
        uint64_t part = vu_least(segment->length - skip, left);
        iov[count++] = (struct iovec){segment->host + skip, part};
        left -= part;
        skip = 0;
    }
    return left ? most + 1 : count;
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
