/*
 * A tap as the end of a network device.
 *
 * What belongs here: frames to and from the descriptors of one tap, one for each pair. What does not: opening a tap and
 * its name (Python).
 *
 * Frames are read into memory of ours: their length is not known before, so that guest buffers for the longest would have
 * to be held ready for every read, and none of them may be missing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "net.h"

/* Newer than the headers of some distributions. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif
#ifndef VIRTIO_NET_F_GUEST_USO4
#define VIRTIO_NET_F_GUEST_USO4 54
#define VIRTIO_NET_F_GUEST_USO6 55
#endif

/* One half is the receiving thread's, the other the sending one's. */
struct tap_pair {
    int fd;
    bool vnet;
    bool gone; /* the interface was removed: its descriptor is of no use any more, and readable for ever */
    struct vu_inbox in;
    struct vu_gathered out;
};

struct tap {
    vu_end end;
    struct tap_pair pairs[];
};

static struct tap_pair *pair_of(const vu_end *end, uint32_t pair)
{
    return &((struct tap *)end)->pairs[pair];
}

/* ---- receiving ---------------------------------------------------------------------------------------------------------- */

static bool read_frame(void *of, struct vu_frame *frame)
{
    struct tap_pair *pair = of;
    struct iovec iov[2] = {{&frame->header, VU_NET_HEADER}, {frame->bytes, VU_NET_FRAME_MOST}};
    int skip = !pair->vnet;
    ssize_t length = pair->gone ? 0 : readv(pair->fd, iov + skip, 2 - skip);
    if (length < 0)
        pair->gone = errno != EAGAIN && errno != EINTR && errno != ENOBUFS && errno != ENOMEM;
    length -= pair->vnet ? VU_NET_HEADER : 0;
    frame->length = length > 0 ? (uint32_t)length : 0;
    return length > 0;
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    struct tap_pair *of = pair_of(end, pair);
    return vu_inbox_look(&of->in, read_frame, of, frames, max);
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    vu_inbox_take(&pair_of(end, pair)->in, count);
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    const struct tap_pair *of = pair_of(end, pair);
    return of->gone ? -1 : of->fd;
}

/* ---- sending ------------------------------------------------------------------------------------------------------------- */

/* Bytes, or -1 and errno. */
static ssize_t write_frame(struct tap_pair *pair, const vu_map *map, struct vu_packet *packet)
{
    pair->out.iov[0] = (struct iovec){&packet->header, VU_NET_HEADER};
    int count = vu_packet_gather(map, packet, &pair->out, pair->vnet);
    return count < 0 ? -1 : writev(pair->fd, pair->out.iov, count);
}

static uint32_t send(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    struct tap_pair *of = pair_of(end, pair);
    for (uint32_t i = 0; i < count; i++) {
        ssize_t written = write_frame(of, map, &packets[i]);
        if (written < 0 && errno == EAGAIN)
            return i;
        if (written < 0)
            packets[i].drop = errno == EFAULT ? VU_DROP_FAULT : VU_DROP_REFUSED;
    }
    return count;
}

static struct pollfd room(const vu_end *end, uint32_t pair)
{
    return (struct pollfd){.fd = pair_of(end, pair)->fd, .events = POLLOUT};
}

static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    const struct tap_pair *pair = pair_of(end, 0);
    struct virtio_net_hdr header = {0};
    struct iovec iov[2] = {{&header, VU_NET_HEADER}, {(void *)bytes, length}};
    return writev(pair->fd, iov + !pair->vnet, 1 + pair->vnet) > 0;
}

/* ---- the whole -------------------------------------------------------------------------------------------------------------- */

static unsigned offloads(uint64_t features)
{
    static const struct { unsigned feature, flag; } table[] = {
        {VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4},
        {VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6},
        {VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN},
    };
    unsigned flags = 0;
    if (!(features >> VIRTIO_NET_F_GUEST_CSUM & 1))
        return 0;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        flags |= features >> table[i].feature & 1 ? table[i].flag : 0;
    /* The kernel takes both or none. */
    if (features >> VIRTIO_NET_F_GUEST_USO4 & 1 && features >> VIRTIO_NET_F_GUEST_USO6 & 1)
        flags |= TUN_F_USO4 | TUN_F_USO6;
    return flags | TUN_F_CSUM;
}

/* The setting is the interface's: one descriptor speaks for all. */
static int accept_offloads(vu_end *end, uint64_t features)
{
    const struct tap_pair *pair = pair_of(end, 0);
    if (!pair->vnet)
        return 0;
    return ioctl(pair->fd, TUNSETOFFLOAD, offloads(features)) < 0 ? VU_E_SYS : 0;
}

static void flush(vu_end *end)
{
    for (uint32_t i = 0; i < end->pairs; i++)
        pair_of(end, i)->in.count = 0;
}

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = vu_end_never_arms,
    .woken = vu_end_is_woken,
    .receive_fd = receive_fd,
    .lost = vu_end_loses_none,
    .attend = vu_end_is_attended,
    .send = send,
    .unsent = vu_end_sends_at_once,
    .room = room,
    .inject = inject,
    .accept = accept_offloads,
    .flush = flush,
    .free = vu_end_is_memory,
};

vu_end *vu_end_tap(const int *fds, uint32_t pairs, int vnet, int *error)
{
    struct tap *tap = pairs ? calloc(1, sizeof *tap + pairs * sizeof *tap->pairs) : NULL;
    if (!tap) {
        *error = pairs ? VU_E_NOMEM : VU_E_SIZE;
        return NULL;
    }
    tap->end = (vu_end){&kind, pairs};
    for (uint32_t i = 0; i < pairs; i++) {
        tap->pairs[i].fd = fds[i];
        tap->pairs[i].vnet = vnet;
    }
    return &tap->end;
}
