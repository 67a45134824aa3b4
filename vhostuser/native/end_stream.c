/*
 * A connection as the end of a network device: frames in a stream of bytes, each behind its length.
 *
 * What belongs here: the framing, which is that of QEMU's "-netdev stream" and "-netdev socket" and of passt (4 bytes, big
 * endian, not counting themselves); what happens to frames when the connection goes or another takes its place. What does
 * not: who connects to whom, and when again (Python).
 *
 * A connection is replaced by the control thread, at any time. So each direction has a lock for its use of the descriptor,
 * under which nobody waits and guest memory is not touched; and ring threads sleep on an epoll set, whose number stays the
 * same whatever is in it.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net.h"

enum {
    PREFIX = 4,
    BUFFER = 4 * (PREFIX + VU_NET_FRAME_MOST),
};

struct direction {
    pthread_mutex_t lock;
    int set;    /* epoll: the connection while it is open in this direction */
    bool open;
};

struct stream {
    vu_end end;
    int fd; /* of the connection, -1 before the first one; changes under both locks */
    _Atomic int64_t refused;
    struct direction in, out;
    bool fresh; /* under in.lock: the receiver has not read from this connection */
    /* Under out.lock: of the bytes below those that are still to be sent, so that no frame is cut off by another. */
    const uint8_t *rest;
    size_t left;
    uint8_t injected[PREFIX + VU_NET_FRAME_MOST];
    /* The sender's. */
    uint8_t sent[BUFFER];
    /* The receiver's. */
    uint32_t begin, filled; /* of `received`: bytes that are not taken */
    uint8_t received[BUFFER];
};

static uint32_t load_length(const uint8_t *at)
{
    uint32_t length;
    memcpy(&length, at, PREFIX);
    return be32toh(length);
}

static void store_length(uint8_t *at, uint32_t length)
{
    length = htobe32(length);
    memcpy(at, &length, PREFIX);
}

/* Under its lock. What is over would wake whoever sleeps on it for ever. */
static void leave(const struct stream *stream, struct direction *direction)
{
    epoll_ctl(direction->set, EPOLL_CTL_DEL, stream->fd, NULL);
    direction->open = false;
}

/* ---- receiving ---------------------------------------------------------------------------------------------------------- */

static bool possible(uint32_t length)
{
    return length >= VU_NET_ETHER && length <= VU_NET_FRAME_MOST;
}

/* The length of the frame at `at`; 0 if it is not whole, or none. */
static uint32_t whole(const struct stream *stream, uint32_t at)
{
    uint32_t there = stream->filled - at;
    if (there < PREFIX)
        return 0;
    uint32_t length = load_length(stream->received + at);
    return possible(length) && length <= there - PREFIX ? length : 0;
}

static uint32_t find(struct stream *stream, struct vu_frame *frames, uint32_t max)
{
    uint32_t at = stream->begin, count = 0;
    for (uint32_t length; count < max && (length = whole(stream, at)); at += PREFIX + length)
        frames[count++] = (struct vu_frame){.bytes = stream->received + at + PREFIX, .length = length};
    return count;
}

/* Reads behind what is there, which is less than a frame. */
static void read_more(struct stream *stream)
{
    stream->filled -= stream->begin;
    memmove(stream->received, stream->received + stream->begin, stream->filled);
    stream->begin = 0;

    pthread_mutex_lock(&stream->in.lock);
    if (stream->fresh)
        stream->filled = 0; /* the beginning of a frame whose end went with the connection before */
    stream->fresh = false;
    if (stream->in.open) {
        ssize_t length = recv(stream->fd, stream->received + stream->filled, BUFFER - stream->filled, MSG_DONTWAIT);
        if (length > 0)
            stream->filled += (uint32_t)length;
        else if (length == 0 || (errno != EAGAIN && errno != EINTR))
            leave(stream, &stream->in);
    }
    pthread_mutex_unlock(&stream->in.lock);
}

/* A length that no frame has: where the next one would begin nobody knows. */
static void judge(struct stream *stream)
{
    if (stream->filled - stream->begin < PREFIX)
        return;
    uint32_t length = load_length(stream->received + stream->begin);
    if (possible(length))
        return;
    stream->begin = stream->filled = 0;
    pthread_mutex_lock(&stream->in.lock);
    if (!stream->fresh && stream->in.open) {
        stream->refused = length;
        shutdown(stream->fd, SHUT_RDWR);
        leave(stream, &stream->in);
    }
    pthread_mutex_unlock(&stream->in.lock);
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    struct stream *stream = (struct stream *)end;
    (void)pair;
    uint32_t count = find(stream, frames, max);
    if (!count) {
        read_more(stream);
        judge(stream);
        count = find(stream, frames, max);
    }
    return count;
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    struct stream *stream = (struct stream *)end;
    (void)pair;
    while (count--)
        stream->begin += PREFIX + load_length(stream->received + stream->begin);
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    (void)pair;
    return ((const struct stream *)end)->in.set;
}

/* ---- sending ------------------------------------------------------------------------------------------------------------- */

/* Under out.lock: sends what is left, as far as there is room. True if nothing is left. */
static bool push(struct stream *stream)
{
    while (stream->left && stream->out.open) {
        ssize_t sent = send(stream->fd, stream->rest, stream->left, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return false;
        if (sent < 0 && errno != EINTR)
            leave(stream, &stream->out);
        stream->rest += sent > 0 ? sent : 0;
        stream->left -= sent > 0 ? (size_t)sent : 0;
    }
    stream->left = stream->out.open ? stream->left : 0;
    return true;
}

/* Under out.lock. False if something else is to be sent before. */
static bool begin_to_send(struct stream *stream, const uint8_t *bytes, size_t length)
{
    if (!push(stream))
        return false;
    stream->rest = bytes;
    stream->left = length;
    push(stream);
    return true;
}

/* Packets with their lengths, as many as there is space for: how many, and in *length the bytes. [touches] */
static uint32_t pack(struct stream *stream, const vu_map *map, struct vu_packet *packets, uint32_t count, size_t *length)
{
    uint32_t n = 0;
    *length = 0;
    for (; n < count && *length + PREFIX + packets[n].length <= BUFFER; n++) {
        uint8_t *prefix = stream->sent + *length, *to = prefix + PREFIX;
        vu_packets_copy(map, &packets[n], &to, 1);
        if (packets[n].drop != VU_DROP_NONE)
            continue;
        store_length(prefix, packets[n].length);
        *length += PREFIX + packets[n].length;
    }
    return n;
}

static uint32_t refuse(struct vu_packet *packets, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        packets[i].drop = VU_DROP_REFUSED;
    return count;
}

/* Frames that do not go to a connection at once stay with the guest: more than one batch is never kept here. */
static uint32_t send_packets(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    struct stream *stream = (struct stream *)end;
    uint32_t done = 0;
    bool room, open;
    (void)pair;
    do {
        size_t length = 0;
        pthread_mutex_lock(&stream->out.lock);
        room = push(stream);
        open = stream->out.open;
        pthread_mutex_unlock(&stream->out.lock);
        if (!open)
            return done + refuse(packets + done, count - done);
        uint32_t packed = room ? pack(stream, map, packets + done, count - done, &length) : 0;
        pthread_mutex_lock(&stream->out.lock);
        room = room && begin_to_send(stream, stream->sent, length);
        pthread_mutex_unlock(&stream->out.lock);
        done += room ? packed : 0;
    } while (room && done < count);
    return done;
}

static bool unsent(vu_end *end, uint32_t pair)
{
    struct stream *stream = (struct stream *)end;
    (void)pair;
    pthread_mutex_lock(&stream->out.lock);
    bool left = stream->left != 0;
    pthread_mutex_unlock(&stream->out.lock);
    return left;
}

static struct pollfd room(const vu_end *end, uint32_t pair)
{
    (void)pair;
    return (struct pollfd){.fd = ((const struct stream *)end)->out.set, .events = POLLIN};
}

/* What of it the connection does not take at once goes with the next frame of the guest's. */
static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    struct stream *stream = (struct stream *)end;
    pthread_mutex_lock(&stream->out.lock);
    bool taken = push(stream) && stream->out.open;
    if (taken) {
        store_length(stream->injected, length);
        memcpy(stream->injected + PREFIX, bytes, length);
        begin_to_send(stream, stream->injected, PREFIX + length);
    }
    pthread_mutex_unlock(&stream->out.lock);
    return taken;
}

/* ---- the whole -------------------------------------------------------------------------------------------------------------- */

static void close_direction(struct direction *direction)
{
    if (direction->set >= 0)
        close(direction->set);
    pthread_mutex_destroy(&direction->lock);
}

static void free_stream(vu_end *end)
{
    struct stream *stream = (struct stream *)end;
    if (stream->fd >= 0)
        close(stream->fd);
    close_direction(&stream->in);
    close_direction(&stream->out);
    free(stream);
}

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = vu_end_never_arms,
    .woken = vu_end_is_woken,
    .receive_fd = receive_fd,
    .lost = vu_end_loses_none,
    .attend = vu_end_is_attended,
    .send = send_packets,
    .unsent = unsent,
    .room = room,
    .inject = inject,
    .accept = vu_end_accepts_all,
    .flush = vu_end_flushes_what_comes,
    .free = free_stream,
};

static void open_direction(struct direction *direction)
{
    pthread_mutex_init(&direction->lock, NULL);
    direction->set = epoll_create1(EPOLL_CLOEXEC);
}

vu_end *vu_end_stream(int *error)
{
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    stream->end = (vu_end){&kind, 1};
    stream->fd = -1;
    stream->refused = -1;
    open_direction(&stream->in);
    open_direction(&stream->out);
    if (stream->in.set >= 0 && stream->out.set >= 0)
        return &stream->end;
    *error = VU_E_SYS;
    int code = errno;
    free_stream(&stream->end);
    errno = code;
    return NULL;
}

static int enter(const struct stream *stream, struct direction *direction, uint32_t events)
{
    struct epoll_event event = {.events = events};
    direction->open = epoll_ctl(direction->set, EPOLL_CTL_ADD, stream->fd, &event) == 0;
    return direction->open ? 0 : VU_E_SYS;
}

int vu_stream_attach(vu_end *end, int fd)
{
    struct stream *stream = (struct stream *)end;
    pthread_mutex_lock(&stream->in.lock);
    pthread_mutex_lock(&stream->out.lock);
    if (stream->fd >= 0)
        close(stream->fd); /* and is in no set any more */
    stream->fd = fd;
    stream->refused = -1;
    stream->fresh = true;
    stream->left = 0;
    int code = enter(stream, &stream->in, EPOLLIN);
    code = code ? code : enter(stream, &stream->out, EPOLLOUT);
    pthread_mutex_unlock(&stream->out.lock);
    pthread_mutex_unlock(&stream->in.lock);
    return code;
}

int64_t vu_stream_refused(const vu_end *end)
{
    return ((const struct stream *)end)->refused;
}
