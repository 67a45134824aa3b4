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

enum {
    VECTORS = 1024, /* the kernel's UIO_MAXIOV */
    BUFFER = 4 * VU_NET_FRAME_MOST,
    LINE = 64, /* frames begin at a cache line */
};

/* One half is the receiving thread's, the other the sending one's. */
struct tap_pair {
    int fd;
    bool gone; /* the interface was removed: its descriptor is of no use any more, and readable for ever */
    uint32_t first, count; /* of `frames`, not yet taken */
    struct vu_frame frames[VU_NET_BATCH];
    uint8_t received[BUFFER];
    struct iovec iov[VECTORS];
    uint8_t sent[VU_NET_FRAME_MOST]; /* a frame in too many pieces for one system call */
};

struct tap {
    vu_end end;
    bool vnet;
    struct tap_pair pairs[];
};

static struct tap_pair *pair_of(const vu_end *end, uint32_t pair)
{
    return &((struct tap *)end)->pairs[pair];
}

/* ---- receiving ---------------------------------------------------------------------------------------------------------- */

static bool read_frame(const struct tap *tap, struct tap_pair *pair, struct vu_frame *frame)
{
    struct iovec iov[2] = {{&frame->header, VU_NET_HEADER}, {frame->bytes, VU_NET_FRAME_MOST}};
    int skip = !tap->vnet;
    ssize_t length = readv(pair->fd, iov + skip, 2 - skip);
    if (length < 0)
        pair->gone = errno != EAGAIN && errno != EINTR && errno != ENOBUFS && errno != ENOMEM;
    length -= tap->vnet ? VU_NET_HEADER : 0;
    frame->length = length > 0 ? (uint32_t)length : 0;
    return length > 0;
}

static void read_frames(const struct tap *tap, struct tap_pair *pair)
{
    uint32_t used = 0;
    pair->first = pair->count = 0;
    while (!pair->gone && pair->count < VU_NET_BATCH && used + VU_NET_FRAME_MOST <= BUFFER) {
        struct vu_frame *frame = &pair->frames[pair->count];
        *frame = (struct vu_frame){.bytes = pair->received + used};
        if (!read_frame(tap, pair, frame))
            break;
        pair->count++;
        used += (frame->length + LINE - 1) & ~(uint32_t)(LINE - 1);
    }
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    struct tap_pair *of = pair_of(end, pair);
    if (!of->count)
        read_frames((struct tap *)end, of);
    uint32_t count = (uint32_t)vu_least(of->count, max);
    memcpy(frames, of->frames + of->first, count * sizeof *frames);
    return count;
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    struct tap_pair *of = pair_of(end, pair);
    of->first += count;
    of->count -= count;
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    const struct tap_pair *of = pair_of(end, pair);
    return of->gone ? -1 : of->fd;
}

/* ---- sending ------------------------------------------------------------------------------------------------------------- */

/* Bytes, or -1 and errno. */
static ssize_t write_frame(const struct tap *tap, struct tap_pair *pair, const vu_map *map, struct vu_packet *packet)
{
    int count = tap->vnet;
    pair->iov[0] = (struct iovec){&packet->header, VU_NET_HEADER};
    count = vu_packet_vectors(packet, pair->iov, count, VECTORS);
    if (count > VECTORS) {
        uint8_t *to = pair->sent;
        vu_packets_copy(map, packet, &to, 1);
        if (packet->drop != VU_DROP_NONE) {
            errno = EFAULT; /* as writev says where memory is lost under it */
            return -1;
        }
        count = tap->vnet;
        pair->iov[count++] = (struct iovec){pair->sent, packet->length};
    }
    return writev(pair->fd, pair->iov, count);
}

static uint32_t send(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    struct tap_pair *of = pair_of(end, pair);
    for (uint32_t i = 0; i < count; i++) {
        ssize_t written = write_frame((struct tap *)end, of, map, &packets[i]);
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
    struct tap *tap = (struct tap *)end;
    struct virtio_net_hdr header = {0};
    struct iovec iov[2] = {{&header, VU_NET_HEADER}, {(void *)bytes, length}};
    return writev(tap->pairs[0].fd, iov + !tap->vnet, 1 + tap->vnet) > 0;
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
    struct tap *tap = (struct tap *)end;
    if (!tap->vnet)
        return 0;
    return ioctl(tap->pairs[0].fd, TUNSETOFFLOAD, offloads(features)) < 0 ? VU_E_SYS : 0;
}

static void flush(vu_end *end)
{
    for (uint32_t i = 0; i < end->pairs; i++)
        pair_of(end, i)->count = 0;
}

static void free_tap(vu_end *end)
{
    free(end);
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
    .free = free_tap,
};

vu_end *vu_end_tap(const int *fds, uint32_t pairs, int vnet, int *error)
{
    struct tap *tap = pairs ? calloc(1, sizeof *tap + pairs * sizeof *tap->pairs) : NULL;
    if (!tap) {
        *error = pairs ? VU_E_NOMEM : VU_E_SIZE;
        return NULL;
    }
    tap->end = (vu_end){&kind, pairs};
    tap->vnet = vnet;
    for (uint32_t i = 0; i < pairs; i++)
        tap->pairs[i].fd = fds[i];
    return &tap->end;
}
