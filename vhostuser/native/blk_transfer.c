/*
 * The way of data between the image and guest memory: from the page cache, by an io_uring while others go on, or by a
 * system call that waits.
 *
 * What belongs here: which of them pays, going on after a short one, buffers that the medium does not take as they lie.
 * What does not: requests and their status byte (blk.c), the rings of an io_uring (uring.c).
 *
 * Copies to and from the page cache are done by this thread: handing them to another costs more than it saves. Whatever
 * has to wait for a medium goes to the io_uring, where there is one. The kernel copies, so memory that is lost shows as
 * EFAULT and needs no guard here. The io_uring gets only chains whose pages are resident: in postcopy the others come
 * from vu_ahead_collect.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blk.h"

enum {
    BOUNCE = 1 << 18, /* bytes of one bounce buffer */
    BOUNCES = 16,     /* the first is for those who wait */
};

/* ---- system calls -------------------------------------------------------------------------------------------------- */

static int write_flags(const vu_blk *blk)
{
    return vu_blk_writeback(blk) ? 0 : RWF_DSYNC;
}

ssize_t vu_blk_write_at(const vu_blk *blk, const struct iovec *iov, int count, uint64_t position)
{
    ssize_t moved;
    do
        moved = pwritev2(blk->config.fd, iov, count, (off_t)position, write_flags(blk));
    while (moved < 0 && errno == EINTR);
    return moved < 0 ? -errno : moved;
}

static ssize_t read_at(const vu_blk *blk, const struct iovec *iov, int count, uint64_t position, int flags)
{
    ssize_t moved;
    do
        moved = preadv2(blk->config.fd, iov, count, (off_t)position, flags);
    while (moved < 0 && errno == EINTR);
    return moved < 0 ? -errno : moved;
}

int vu_blk_sync(const vu_blk *blk)
{
    int code;
    do
        code = fdatasync(blk->config.fd);
    while (code < 0 && errno == EINTR);
    return code < 0 ? -errno : 0;
}

/* ---- buffers -------------------------------------------------------------------------------------------------------- */

/* Without a free one the transfer waits, in the first. */
static void take_bounce(struct vu_blk_run *run, struct vu_blk_transfer *transfer)
{
    uint32_t number = 1;
    while (number < BOUNCES && run->bounces_taken >> number & 1)
        number++;
    transfer->bounced = true;
    if (number == BOUNCES) {
        transfer->way = VU_BLK_WAIT;
        return;
    }
    run->bounces_taken |= 1u << number;
    transfer->bounce = run->bounces + (size_t)number * BOUNCE;
}

static void give_bounce_back(struct vu_blk_run *run, const struct vu_blk_transfer *transfer)
{
    if (transfer->bounce)
        run->bounces_taken &= ~(1u << ((size_t)(transfer->bounce - run->bounces) / BOUNCE));
}

static uint8_t *bounce_of(const struct vu_blk_run *run, const struct vu_blk_transfer *transfer)
{
    return transfer->bounce ? transfer->bounce : run->bounces;
}

/* Fills one vector: 1, or VU_E_FAULT. */
static int fill_bounce(struct vu_blk_run *run, struct vu_blk_transfer *transfer, struct iovec *iov)
{
    uint64_t part = vu_least(transfer->length - transfer->done, BOUNCE);
    *iov = (struct iovec){bounce_of(run, transfer), part};
    if (transfer->kind == VU_BLK_WRITE && vu_chain_read(run->queue, transfer->chain, VU_BLK_HEADER + transfer->done,
                                                        iov->iov_base, part) != (int64_t)part)
        return VU_E_FAULT;
    return 1;
}

static bool empty_bounce(struct vu_blk_run *run, struct vu_blk_transfer *transfer, ssize_t moved)
{
    return vu_chain_write(run->queue, transfer->chain, transfer->done, bounce_of(run, transfer), (uint64_t)moved) == moved;
}

/* Fills vectors with what is left of the transfer, as far as one system call can take it: their number. */
static int gather(const struct vu_blk_transfer *transfer, struct iovec *iov, uint32_t room)
{
    const vu_chain *chain = transfer->chain;
    bool write = transfer->kind == VU_BLK_WRITE;
    const vu_segment *segment = chain->segments + (write ? 0 : chain->readable_count);
    uint64_t skip = transfer->done + (write ? VU_BLK_HEADER : 0);
    uint64_t left = transfer->length - transfer->done;
    uint32_t count = 0;

    for (; left && count < room; segment++) {
        if (skip >= segment->length) {
            skip -= segment->length;
            continue;
        }
        uint64_t part = vu_least(segment->length - skip, left);
        iov[count++] = (struct iovec){segment->host + skip, part};
        left -= part;
        skip = 0;
    }
    return (int)count;
}

/* Room for the vectors of one system call behind those that wait for the next submit. */
static struct iovec *take_vectors(struct vu_blk_run *run, const struct vu_chain *chain)
{
    uint64_t most = vu_least((uint64_t)chain->readable_count + chain->writable_count, VU_BLK_VECTORS);
    if (run->iov_used + most > VU_BLK_VECTORS) {
        vu_uring_submit(run->uring);
        run->iov_used = 0;
    }
    return run->iov + run->iov_used;
}

/* ---- one step --------------------------------------------------------------------------------------------------------- */

static enum vu_blk_way first_way(const struct vu_blk_run *run, enum vu_blk_kind kind)
{
    if (run->blk->in_memory || run->alone)
        return VU_BLK_WAIT;
    if (run->blk->direct || kind == VU_BLK_FLUSH)
        return VU_BLK_ASIDE;
    if (kind == VU_BLK_WRITE)
        return vu_blk_writeback(run->blk) ? VU_BLK_WAIT : VU_BLK_ASIDE;
    return run->uncached ? VU_BLK_WAIT : VU_BLK_CACHED;
}

static bool has_uring(struct vu_blk_run *run)
{
    if (!run->uring && !run->alone) {
        run->uring = vu_uring_new(VU_BLK_TRANSFERS);
        run->alone = !run->uring;
    }
    return run->uring != NULL;
}

static void set_aside(struct vu_blk_run *run, const struct vu_blk_transfer *transfer, const struct iovec *iov, int count)
{
    uint64_t cookie = (uint64_t)(transfer - run->transfers);
    bool write = transfer->kind == VU_BLK_WRITE;

    if (transfer->kind == VU_BLK_FLUSH)
        return vu_uring_sync(run->uring, run->blk->config.fd, cookie);
    vu_uring_move(run->uring, write, run->blk->config.fd, iov, count, transfer->position + transfer->done,
                  write ? write_flags(run->blk) : 0, cookie);
    run->iov_used += (uint32_t)count;
}

static ssize_t move_now(struct vu_blk_run *run, const struct vu_blk_transfer *transfer, const struct iovec *iov, int count)
{
    uint64_t position = transfer->position + transfer->done;
    if (transfer->kind == VU_BLK_WRITE)
        return vu_blk_write_at(run->blk, iov, count, position);
    return read_at(run->blk, iov, count, position, transfer->way == VU_BLK_CACHED ? RWF_NOWAIT : 0);
}

/* One system call, or its preparation: true, and *result is what it returned or -errno; false if that comes later. */
static bool step(struct vu_blk_run *run, struct vu_blk_transfer *transfer, ssize_t *result)
{
    if (transfer->way == VU_BLK_ASIDE && !has_uring(run))
        transfer->way = VU_BLK_WAIT;
    struct iovec *iov = run->iov;
    int count = 0;

    if (transfer->kind != VU_BLK_FLUSH) {
        iov = take_vectors(run, transfer->chain);
        count = transfer->bounced ? fill_bounce(run, transfer, iov)
                                  : gather(transfer, iov, (uint32_t)(run->iov + VU_BLK_VECTORS - iov));
    }
    if (count < 0) {
        *result = -EFAULT;
    } else if (transfer->way == VU_BLK_ASIDE) {
        set_aside(run, transfer, iov, count);
        return false;
    } else {
        *result = transfer->kind == VU_BLK_FLUSH ? vu_blk_sync(run->blk) : move_now(run, transfer, iov, count);
    }
    return true;
}

/* EINVAL: the buffers are not aligned as this medium wants it, which it alone knows. EFAULT: also said of buffers in so
 * many pieces that no request of the medium holds a block of them (Linux 6.18); memory that is lost shows again. */
static bool wants_bounce(const struct vu_blk_run *run, const struct vu_blk_transfer *transfer, ssize_t result)
{
    return (result == -EINVAL || result == -EFAULT) && run->bounces && !transfer->bounced &&
           transfer->kind != VU_BLK_FLUSH;
}

/* Another way for what this one could not do: false if there is none. */
static bool change_way(struct vu_blk_run *run, struct vu_blk_transfer *transfer, ssize_t result)
{
    if (wants_bounce(run, transfer, result)) {
        take_bounce(run, transfer);
        return true;
    }
    if (transfer->way == VU_BLK_CACHED) {
        run->uncached |= result == -EOPNOTSUPP;
        transfer->way = result == -EAGAIN ? VU_BLK_ASIDE : VU_BLK_WAIT;
        return result == -EAGAIN || result == -EOPNOTSUPP;
    }
    if (transfer->way == VU_BLK_ASIDE && (result == -EAGAIN || result == -EINTR || result == -ECANCELED)) {
        transfer->way = VU_BLK_WAIT; /* the kernel gave it up without having done it */
        return true;
    }
    return false;
}

/* Takes in the result of one step: false when the transfer cannot go on. The end of the image inside the capacity is an
 * error: the guest must not take invented zeroes for its data. */
static bool take_in(struct vu_blk_run *run, struct vu_blk_transfer *transfer, ssize_t result)
{
    if (result < 0)
        return change_way(run, transfer, result);
    if (transfer->kind == VU_BLK_FLUSH)
        transfer->done = transfer->length;
    else if (result == 0 || (transfer->bounced && transfer->kind == VU_BLK_READ && !empty_bounce(run, transfer, result)))
        return false;
    else
        transfer->done += (uint64_t)result;
    return true;
}

/* ---- the whole --------------------------------------------------------------------------------------------------------- */

/* Ends it: the slot is free, what it says stays until the next transfer. */
static int end(struct vu_blk_run *run, struct vu_blk_transfer *transfer)
{
    give_bounce_back(run, transfer);
    run->unused[run->free++] = transfer;
    return transfer->done == transfer->length ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
}

static int go_on(struct vu_blk_run *run, struct vu_blk_transfer *transfer)
{
    while (transfer->done < transfer->length) {
        ssize_t result;
        if (!step(run, transfer, &result))
            return VU_BLK_PENDING;
        if (!take_in(run, transfer, result))
            break;
    }
    return end(run, transfer);
}

int vu_blk_transfer(struct vu_blk_run *run, vu_chain *chain, enum vu_blk_kind kind, uint64_t position, uint64_t length,
                    uint64_t *moved)
{
    struct vu_blk_transfer *transfer = run->unused[--run->free];
    *transfer = (struct vu_blk_transfer){
        .chain = chain, .kind = kind, .way = first_way(run, kind), .position = position, .length = length};
    int status = go_on(run, transfer);
    *moved = transfer->done;
    return status;
}

int vu_blk_transfer_next(struct vu_blk_run *run, const struct vu_blk_transfer **ended)
{
    uint64_t cookie;
    int result;

    while (run->uring) {
        if (!vu_uring_next(run->uring, &cookie, &result)) {
            if (!vu_uring_submit(run->uring))
                break;
            run->iov_used = 0;
            continue;
        }
        struct vu_blk_transfer *transfer = &run->transfers[cookie];
        bool goes_on = take_in(run, transfer, result);
        if (run->leaving && transfer->done < transfer->length) {
            end(run, transfer); /* whoever serves the ring next does it from the start */
            continue;
        }
        int status = goes_on ? go_on(run, transfer) : end(run, transfer);
        *ended = transfer;
        if (status != VU_BLK_PENDING)
            return status;
    }
    return VU_BLK_PENDING;
}

void vu_blk_transfers_leave(struct vu_blk_run *run)
{
    if (run->uring && !run->leaving)
        vu_uring_cancel(run->uring);
    run->leaving = true;
}

uint32_t vu_blk_transfers_out(const struct vu_blk_run *run)
{
    return VU_BLK_TRANSFERS - run->free;
}

int vu_blk_transfers_open(struct vu_blk_run *run)
{
    for (run->free = 0; run->free < VU_BLK_TRANSFERS; run->free++)
        run->unused[run->free] = &run->transfers[VU_BLK_TRANSFERS - 1 - run->free];
    if (run->blk->direct && posix_memalign((void **)&run->bounces, 4096, (size_t)BOUNCES * BOUNCE))
        return VU_E_NOMEM;
    return 0;
}

void vu_blk_transfers_close(struct vu_blk_run *run)
{
    vu_uring_free(run->uring);
    free(run->bounces);
}
