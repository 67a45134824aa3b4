/*
 * Datagrams of a Unix socket as the end of a network device, one frame each: QEMU's "-netdev dgram".
 *
 * What belongs here: frames to and from one socket. What does not: its file and who may reach it (Python).
 *
 * Frames are sent by the other side's address, so that it may go and come again; and from the bound socket, so that it knows
 * them by ours. Whether its queue has room again only a connected socket can tell: a second one, which sends nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "net.h"

struct datagram {
    vu_end end;
    int fd, gauge;
    struct sockaddr_un peer;
    /* The receiver's. */
    struct vu_inbox in;
    /* The sender's. */
    struct vu_gathered out;
};

/* ---- receiving ---------------------------------------------------------------------------------------------------------- */

static bool read_frame(void *of, struct vu_frame *frame)
{
    ssize_t length = recv(((struct datagram *)of)->fd, frame->bytes, VU_NET_FRAME_MOST, MSG_DONTWAIT | MSG_TRUNC);
    frame->length = length > 0 ? (uint32_t)length : 0;
    return length >= 0;
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    (void)pair;
    return vu_inbox_look(&((struct datagram *)end)->in, read_frame, end, frames, max);
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    (void)pair;
    vu_inbox_take(&((struct datagram *)end)->in, count);
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    (void)pair;
    return ((const struct datagram *)end)->fd;
}

/* ---- sending ------------------------------------------------------------------------------------------------------------- */

static ssize_t send_one(const struct datagram *datagram, struct iovec *iov, int count)
{
    struct msghdr message = {
        .msg_name = (void *)&datagram->peer,
        .msg_namelen = sizeof datagram->peer,
        .msg_iov = iov,
        .msg_iovlen = (size_t)count,
    };
    return sendmsg(datagram->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static uint32_t send_packets(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    struct datagram *datagram = (struct datagram *)end;
    (void)pair;
    for (uint32_t i = 0; i < count; i++) {
        int pieces = vu_packet_gather(map, &packets[i], &datagram->out, 0);
        ssize_t sent = pieces < 0 ? -1 : send_one(datagram, datagram->out.iov, pieces);
        if (sent < 0 && errno == EAGAIN)
            return i;
        if (sent < 0)
            packets[i].drop = errno == EFAULT ? VU_DROP_FAULT : VU_DROP_REFUSED;
    }
    return count;
}

/* Each time anew: the other side may be another one. One that is connected to us alone has our own socket to tell. */
static struct pollfd room(const vu_end *end, uint32_t pair)
{
    const struct datagram *datagram = (const struct datagram *)end;
    int told = connect(datagram->gauge, (const struct sockaddr *)&datagram->peer, sizeof datagram->peer);
    (void)pair;
    return (struct pollfd){.fd = told < 0 ? datagram->fd : datagram->gauge, .events = POLLOUT};
}

static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    return send_one((struct datagram *)end, &(struct iovec){(void *)bytes, length}, 1) >= 0;
}

/* ---- the whole -------------------------------------------------------------------------------------------------------------- */

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = vu_end_never_arms,
    .woken = vu_end_is_woken,
    .receive_fd = receive_fd,
    .lost = vu_end_loses_none,
    .attend = vu_end_is_attended,
    .send = send_packets,
    .unsent = vu_end_sends_at_once,
    .room = room,
    .inject = inject,
    .accept = vu_end_accepts_all,
    .flush = vu_end_flushes_what_comes,
    .free = vu_end_is_memory,
};

vu_end *vu_end_datagram(int fd, int gauge, const char *peer, int *error)
{
    struct datagram *datagram = NULL;
    *error = VU_E_SIZE;
    if (strlen(peer) < sizeof datagram->peer.sun_path) {
        *error = VU_E_NOMEM;
        datagram = calloc(1, sizeof *datagram);
    }
    if (!datagram)
        return NULL;
    datagram->end = (vu_end){&kind, 1};
    datagram->fd = fd;
    datagram->gauge = gauge;
    datagram->peer.sun_family = AF_UNIX;
    strcpy(datagram->peer.sun_path, peer);
    return &datagram->end;
}
