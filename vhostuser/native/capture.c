/*
 * What passes an end, as packets of a pcapng file.
 *
 * What belongs here: an end that stands before another one and copies what passes; the packet block (draft-ietf-opsawg-pcapng,
 * 4.3); writing blocks to the file, on a thread that no ring waits for. What does not: the blocks in front of all packets and
 * opening the file (Python).
 *
 * Rings put whole blocks into a mailbox. What it has no room for, because the file is slow, is counted and not recorded.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mailbox.h"

enum {
    ENHANCED_PACKET = 6,
    EPB_FLAGS = 2,
    COPIES = 4 * VU_NET_FRAME_MOST,
};

/* As the guest sees it: the values of the lowest bits of epb_flags. */
enum heading { INBOUND = 1, OUTBOUND = 2 };

struct block_head {
    uint32_t kind, size, interface, time_high, time_low, captured, length;
};

struct block_tail {
    uint16_t code, code_size;
    uint32_t flags, end_of_options, size;
};

enum { BLOCK_MOST = sizeof(struct block_head) + VU_NET_FRAME_MOST + 3 + sizeof(struct block_tail) };

struct vu_capture {
    struct vu_mailbox box;
    uint32_t snap, interfaces;
    bool told_slow, told_failed;
    bool torn;       /* half a block is in a file that cannot be cut: nothing that follows could be read */
    off_t written;   /* where the file ends behind whole blocks; -1: it has no end */
    _Atomic uint64_t lost[]; /* of each interface */
};

/* What is the receiver's and what the sender's of one pair. */
struct captured_pair {
    uint64_t when; /* ns since 1970: `looked` */
    struct vu_frame looked[VU_NET_BATCH];
    struct vu_packet packets[VU_NET_BATCH];
    vu_segment segments[VU_NET_BATCH];
    uint32_t places[VU_NET_BATCH]; /* of the packets among those that were to be sent */
    uint8_t copies[COPIES];
};

struct captured {
    vu_end end;
    vu_end *inner;
    vu_capture *capture;
    uint32_t interface;
    struct captured_pair pairs[];
};

/* ---- blocks -------------------------------------------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void record(const struct captured *captured, enum heading heading, uint64_t now, const uint8_t *bytes, uint32_t length)
{
    vu_capture *capture = captured->capture;
    uint32_t kept = (uint32_t)vu_least(length, capture->snap), padded = (kept + 3) & ~3u;
    uint32_t size = sizeof(struct block_head) + padded + sizeof(struct block_tail);
    struct block_head head = {ENHANCED_PACKET, size, captured->interface, (uint32_t)(now >> 32), (uint32_t)now, kept, length};
    struct block_tail tail = {EPB_FLAGS, sizeof tail.flags, heading, 0, size};
    uint8_t block[BLOCK_MOST];
    memcpy(block, &head, sizeof head);
    memcpy(block + sizeof head, bytes, kept);
    memset(block + sizeof head + kept, 0, padded - kept);
    memcpy(block + sizeof head + padded, &tail, sizeof tail);
    struct vu_frame frame = {.bytes = block, .length = size};
    if (!vu_mailbox_put(&capture->box, &frame, 1))
        atomic_fetch_add_explicit(&capture->lost[captured->interface], 1, memory_order_relaxed);
}

/* ---- the end ------------------------------------------------------------------------------------------------------------- */

static struct captured_pair *pair_of(vu_end *end, uint32_t pair)
{
    return &((struct captured *)end)->pairs[pair];
}

static vu_end *inner_of(const vu_end *end)
{
    return ((const struct captured *)end)->inner;
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    vu_end *inner = inner_of(end);
    uint32_t count = inner->kind->look(inner, pair, frames, (uint32_t)vu_least(max, VU_NET_BATCH));
    struct captured_pair *of = pair_of(end, pair);
    of->when = count ? now_ns() : 0;
    memcpy(of->looked, frames, count * sizeof *frames);
    return count;
}

/* Frames are looked at any number of times, and taken once. */
static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    vu_end *inner = inner_of(end);
    const struct captured_pair *of = pair_of(end, pair);
    for (uint32_t i = 0; i < count; i++)
        record((struct captured *)end, INBOUND, of->when, of->looked[i].bytes, of->looked[i].length);
    inner->kind->take(inner, pair, count);
}

/* Copies as many packets as there is space for: how many; and in *kept how many of them have not been lost. [touches] */
static uint32_t copy_some(struct captured_pair *pair, const vu_map *map, struct vu_packet *packets, uint32_t count,
                          uint32_t *kept)
{
    uint8_t *to[VU_NET_BATCH];
    uint32_t n = 0, used = 0;
    *kept = 0;
    if (!count)
        return 0;
    do {
        to[n] = pair->copies + used;
        used += packets[n++].length;
    } while (n < count && n < VU_NET_BATCH && used + packets[n].length <= COPIES);
    vu_packets_copy(map, packets, to, n);
    for (uint32_t i = 0; i < n; i++) {
        if (packets[i].drop != VU_DROP_NONE)
            continue;
        memcpy(to[i], packets[i].ether, VU_NET_ETHER);
        struct vu_packet *packet = &pair->packets[*kept];
        *packet = packets[i];
        packet->skip = 0;
        packet->count = 1;
        packet->segments = &pair->segments[*kept];
        pair->segments[*kept] = (vu_segment){to[i], packets[i].length, 0};
        pair->places[(*kept)++] = i;
    }
    return n;
}

/* A guest may write over a frame while it is sent, so that what is recorded is a copy and what is sent is that copy. The
 * time is that before it was sent: an answer is never older, whatever thread records it first. */
static uint32_t send_packets(vu_end *end, uint32_t number, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    vu_end *inner = inner_of(end);
    struct captured_pair *pair = pair_of(end, number);
    uint32_t done = 0, n, kept;
    do {
        n = copy_some(pair, map, packets + done, count - done, &kept);
        uint64_t now = now_ns();
        uint32_t sent = inner->kind->send(inner, number, map, pair->packets, kept);
        for (uint32_t i = 0; i < sent; i++) {
            packets[done + pair->places[i]].drop = pair->packets[i].drop;
            if (pair->packets[i].drop == VU_DROP_NONE)
                record((struct captured *)end, OUTBOUND, now, pair->segments[i].host, pair->packets[i].length);
        }
        if (sent < kept)
            return done + pair->places[sent];
        done += n;
    } while (done < count);
    return done;
}

static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    vu_end *inner = inner_of(end);
    uint64_t now = now_ns();
    bool taken = inner->kind->inject(inner, bytes, length);
    if (taken)
        record((struct captured *)end, OUTBOUND, now, bytes, length);
    return taken;
}

static bool arm(vu_end *end, uint32_t pair)
{
    return inner_of(end)->kind->arm(inner_of(end), pair);
}

static void woken(vu_end *end, uint32_t pair)
{
    inner_of(end)->kind->woken(inner_of(end), pair);
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    return inner_of(end)->kind->receive_fd(inner_of(end), pair);
}

static uint64_t lost(vu_end *end, uint32_t pair)
{
    return inner_of(end)->kind->lost(inner_of(end), pair);
}

static void attend(vu_end *end, uint32_t pair, bool on)
{
    inner_of(end)->kind->attend(inner_of(end), pair, on);
}

static bool unsent(vu_end *end, uint32_t pair)
{
    return inner_of(end)->kind->unsent(inner_of(end), pair);
}

static struct pollfd room(const vu_end *end, uint32_t pair)
{
    return inner_of(end)->kind->room(inner_of(end), pair);
}

static int accept_features(vu_end *end, uint64_t features)
{
    return inner_of(end)->kind->accept(inner_of(end), features);
}

static void flush(vu_end *end)
{
    inner_of(end)->kind->flush(inner_of(end));
}

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = arm,
    .woken = woken,
    .receive_fd = receive_fd,
    .lost = lost,
    .attend = attend,
    .send = send_packets,
    .unsent = unsent,
    .room = room,
    .inject = inject,
    .accept = accept_features,
    .flush = flush,
    .free = vu_end_is_memory,
};

vu_end *vu_capture_end(vu_capture *capture, vu_end *inner, uint32_t interface, int *error)
{
    struct captured *captured = NULL;
    *error = interface < capture->interfaces ? VU_E_NOMEM : VU_E_SIZE;
    if (interface < capture->interfaces)
        captured = calloc(1, sizeof *captured + inner->pairs * sizeof *captured->pairs);
    if (!captured)
        return NULL;
    captured->end = (vu_end){&kind, inner->pairs};
    captured->inner = inner;
    captured->capture = capture;
    captured->interface = interface;
    return &captured->end;
}

/* ---- the file ------------------------------------------------------------------------------------------------------------ */

static uint32_t interface_of(const struct vu_frame *block)
{
    struct block_head head;
    memcpy(&head, block->bytes, sizeof head);
    return head.interface;
}

/* Bytes that went into the file, all of them but after a failure. */
static size_t write_all(int fd, struct iovec *iov, int count)
{
    size_t total = 0;
    while (count) {
        ssize_t written = writev(fd, iov, count);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            break;
        total += (size_t)written;
        for (; count && (size_t)written >= iov->iov_len; iov++, count--)
            written -= (ssize_t)iov->iov_len;
        if (count) {
            iov->iov_base = (uint8_t *)iov->iov_base + written;
            iov->iov_len -= (size_t)written;
        }
    }
    return total;
}

/* The file ends with a whole block again, so that it can be read and written on. */
static void cut(vu_capture *capture, int fd, size_t part)
{
    int code = errno;
    if (part && (capture->written < 0 || ftruncate(fd, capture->written) < 0 || lseek(fd, capture->written, SEEK_SET) < 0))
        capture->torn = true;
    errno = code;
}

/* 0; or VU_E_SYS when it failed for some of them, which are counted. */
static int write_blocks(vu_capture *capture, int fd, const struct vu_frame *blocks, uint32_t count)
{
    struct iovec iov[VU_NET_BATCH];
    for (uint32_t i = 0; i < count; i++)
        iov[i] = (struct iovec){blocks[i].bytes, blocks[i].length};
    size_t written = capture->torn ? 0 : write_all(fd, iov, (int)count);
    uint32_t whole = 0;
    for (; whole < count && blocks[whole].length <= written; whole++) {
        written -= blocks[whole].length;
        capture->written += capture->written < 0 ? 0 : blocks[whole].length;
    }
    if (whole == count)
        return 0;
    cut(capture, fd, written);
    for (uint32_t i = whole; i < count; i++)
        atomic_fetch_add_explicit(&capture->lost[interface_of(&blocks[i])], 1, memory_order_relaxed);
    return VU_E_SYS;
}

static bool told_to(int stop)
{
    struct pollfd fd = {.fd = stop, .events = POLLIN};
    return poll(&fd, 1, 0) > 0;
}

static void await_blocks(vu_capture *capture, int stop)
{
    struct pollfd fds[2] = {{.fd = capture->box.event, .events = POLLIN}, {.fd = stop, .events = POLLIN}};
    if (vu_mailbox_arm(&capture->box))
        return;
    poll(fds, 2, -1);
    vu_mailbox_woken(&capture->box);
}

static bool first_time(bool *told)
{
    bool first = !*told;
    *told = true;
    return first;
}

int vu_capture_write(vu_capture *capture, int fd, int stop)
{
    struct vu_frame blocks[VU_NET_BATCH];
    uint32_t left = VU_MAILBOX_SLOTS; /* after the stop, if blocks come for ever */
    if (!capture->written)
        capture->written = lseek(fd, 0, SEEK_CUR);
    while (left) {
        uint32_t count = vu_mailbox_look(&capture->box, blocks, VU_NET_BATCH);
        int code = count ? write_blocks(capture, fd, blocks, count) : 0;
        vu_mailbox_take(&capture->box, count);
        if (code < 0 && first_time(&capture->told_failed))
            return code;
        if (atomic_load_explicit(&capture->box.full, memory_order_relaxed) && first_time(&capture->told_slow))
            return VU_CAPTURE_SLOW;
        if (told_to(stop))
            left = count ? left - (uint32_t)vu_least(left, count) : 0;
        else if (!count)
            await_blocks(capture, stop);
    }
    return 0;
}

uint64_t vu_capture_lost(const vu_capture *capture, uint32_t interface)
{
    return interface < capture->interfaces ? atomic_load_explicit(&capture->lost[interface], memory_order_relaxed) : 0;
}

vu_capture *vu_capture_new(uint32_t interfaces, uint32_t snap, int *error)
{
    vu_capture *capture = calloc(1, sizeof *capture + interfaces * sizeof *capture->lost);
    if (!capture) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    capture->interfaces = interfaces;
    capture->snap = (uint32_t)vu_least(snap, VU_NET_FRAME_MOST);
    *error = vu_mailbox_open(&capture->box);
    if (!*error)
        return capture;
    vu_capture_free(capture);
    return NULL;
}

void vu_capture_free(vu_capture *capture)
{
    if (capture)
        vu_mailbox_close(&capture->box);
    free(capture);
}
