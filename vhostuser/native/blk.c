/*
 * The virtio-blk engine: requests of one queue executed on an image, on one thread, in one call.
 *
 * What belongs here: the request format of virtio 1.3 section 5.2.6, and when a queue's thread works, polls and sleeps.
 * What does not: rings and chains (split.c), missing pages (touch.c), opening, locking and sizing the image (Python).
 *
 * The kernel copies between the image and guest memory, so memory that is lost shows as EFAULT and needs no guard here;
 * headers, ranges and the status byte go through vu_chain_read and vu_chain_write, which are guarded.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum {
    SECTOR = 512,
    HEADER = sizeof(struct virtio_blk_outhdr),
    RANGE = sizeof(struct virtio_blk_discard_write_zeroes),
    BATCH = 64,            /* chains popped at once */
    PUSH = 8,              /* chains returned at once: the driver works on these while we work on the next */
    VECTORS = 1024,        /* the kernel's UIO_MAXIOV */
    SEGMENTS = 256,        /* ranges in one discard or write-zeroes request */
    BOUNCE = 1 << 18,      /* bytes */
    ZEROES = 1 << 16,      /* bytes */
    STOP_CHECK_NS = 1000000,
    POLLED_SLEEP_NS = 100000, /* between two looks at an idle ring that has no kick descriptor */
    COUNTERS = sizeof(struct vu_blk_stats) / sizeof(uint64_t),
};

struct vu_blk {
    struct vu_blk_config config;
    _Atomic uint64_t sectors;
    _Atomic int writeback;
    bool direct;       /* O_DIRECT: buffers must be aligned, or bounced */
    bool block_device; /* and not a regular file */
    _Atomic uint64_t counters[COUNTERS]; /* in the order of struct vu_blk_stats */
};

/* One thread's work on one queue. */
struct run {
    vu_blk *blk;
    vu_queue *queue;
    int kick, stop;
    bool stopping;
    bool ahead;          /* a touch pool is set: chains wait there for their missing pages */
    uint64_t now;        /* ns, monotonic; read once a round */
    uint64_t active;     /* when the last chain was served */
    uint64_t stop_check; /* when `stop` was looked at */
    uint64_t window;     /* ns: how long to poll after `active`, adapted between 0 and poll_us */
    struct vu_blk_stats tally; /* since the last settle */
    uint8_t *bounce;     /* NULL without O_DIRECT */
    uint32_t finished;   /* chains in `done` */
    vu_chain *done[PUSH];
    uint32_t lengths[PUSH];
    vu_chain *chains[BATCH];
    struct iovec iov[VECTORS];
    struct virtio_blk_discard_write_zeroes ranges[SEGMENTS];
};

/* Bytes on their way between the image and the data part of a chain. */
struct transfer {
    bool write;
    uint64_t position, length, done;
};

static const uint8_t zeroes[ZEROES] __attribute__((aligned(4096)));

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static bool writeback(const vu_blk *blk)
{
    return atomic_load_explicit(&blk->writeback, memory_order_relaxed);
}

/* ---- reading and writing ------------------------------------------------------------------------------------- */

/* Fills run->iov with what is left of the transfer, as far as one system call can take it. */
static int gather(struct run *run, const vu_chain *chain, const struct transfer *transfer)
{
    const vu_segment *segment = chain->segments + (transfer->write ? 0 : chain->readable_count);
    uint64_t skip = transfer->done + (transfer->write ? HEADER : 0);
    uint64_t left = transfer->length - transfer->done;
    int count = 0;

    for (; left && count < VECTORS; segment++) {
        if (skip >= segment->length) {
            skip -= segment->length;
            continue;
        }
        uint64_t part = least(segment->length - skip, left);
        run->iov[count++] = (struct iovec){segment->host + skip, part};
        left -= part;
        skip = 0;
    }
    return count;
}

static ssize_t image_io(const vu_blk *blk, bool write, const struct iovec *iov, int count, uint64_t position)
{
    ssize_t moved;
    do
        moved = write ? pwritev2(blk->config.fd, iov, count, (off_t)position, writeback(blk) ? 0 : RWF_DSYNC)
                      : preadv(blk->config.fd, iov, count, (off_t)position);
    while (moved < 0 && errno == EINTR);
    return moved;
}

/* One step of a transfer through the aligned buffer: the bytes moved, 0 or negative when it cannot go on. */
static ssize_t bounce(struct run *run, vu_chain *chain, const struct transfer *transfer)
{
    uint64_t part = least(transfer->length - transfer->done, BOUNCE);
    struct iovec iov = {run->bounce, part};

    if (transfer->write && vu_chain_read(run->queue, chain, HEADER + transfer->done, run->bounce, part) != (int64_t)part)
        return -1;
    ssize_t moved = image_io(run->blk, transfer->write, &iov, 1, transfer->position + transfer->done);
    if (!transfer->write && moved > 0 &&
        vu_chain_write(run->queue, chain, transfer->done, run->bounce, (uint64_t)moved) != moved)
        return -1;
    return moved;
}

static ssize_t step(struct run *run, vu_chain *chain, const struct transfer *transfer)
{
    int count = gather(run, chain, transfer);
    ssize_t moved = image_io(run->blk, transfer->write, run->iov, count, transfer->position + transfer->done);
    if (run->bounce && moved < 0 && errno == EINVAL) /* not aligned as this medium wants it, which it alone knows */
        return bounce(run, chain, transfer);
    return moved;
}

/* The end of the image inside the capacity is an error: the guest must not take invented zeroes for its data. */
static uint8_t move(struct run *run, vu_chain *chain, struct transfer *transfer)
{
    while (transfer->done < transfer->length) {
        ssize_t moved = step(run, chain, transfer);
        if (moved <= 0)
            return VIRTIO_BLK_S_IOERR;
        transfer->done += (uint64_t)moved;
    }
    return VIRTIO_BLK_S_OK;
}

/* Whole blocks inside the capacity; no sum that could wrap. */
static bool inside(const vu_blk *blk, uint64_t sector, uint64_t length)
{
    uint64_t sectors = atomic_load_explicit(&blk->sectors, memory_order_relaxed);
    uint64_t block = blk->config.block_size;
    return sector <= sectors && !(length & (block - 1)) && !(sector & (block / SECTOR - 1)) &&
           length / SECTOR <= sectors - sector;
}

static uint8_t read_image(struct run *run, vu_chain *chain, uint64_t sector, uint64_t *written)
{
    struct transfer transfer = {.write = false, .position = sector * SECTOR, .length = chain->writable - 1};
    run->tally.reads++;
    if (!inside(run->blk, sector, transfer.length))
        return VIRTIO_BLK_S_IOERR;
    uint8_t status = move(run, chain, &transfer);
    *written = transfer.done;
    run->tally.bytes_read += transfer.done;
    return status;
}

static uint8_t write_image(struct run *run, vu_chain *chain, uint64_t sector)
{
    struct transfer transfer = {.write = true, .position = sector * SECTOR, .length = chain->readable - HEADER};
    run->tally.writes++;
    if (run->blk->config.flags & VU_BLK_READ_ONLY || !inside(run->blk, sector, transfer.length))
        return VIRTIO_BLK_S_IOERR;
    uint8_t status = move(run, chain, &transfer);
    run->tally.bytes_written += transfer.done;
    return status;
}

static uint8_t flush(const vu_blk *blk)
{
    int code;
    do
        code = fdatasync(blk->config.fd);
    while (code < 0 && errno == EINTR);
    return code ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
}

/* ---- discard and write zeroes ----------------------------------------------------------------------------------- */

static int change_range(const vu_blk *blk, int mode, uint64_t offset, uint64_t length)
{
    int code;
    do
        code = fallocate(blk->config.fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    while (code < 0 && errno == EINTR);
    return code;
}

static uint8_t discard(const vu_blk *blk, uint64_t offset, uint64_t length)
{
    uint64_t range[2] = {offset, length};
    int code = blk->block_device ? ioctl(blk->config.fd, BLKDISCARD, range)
                                 : change_range(blk, FALLOC_FL_PUNCH_HOLE, offset, length);
    if (code == 0)
        return VIRTIO_BLK_S_OK;
    return errno == EOPNOTSUPP || errno == ENOSYS || errno == ENOTTY ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

static uint8_t write_zero_bytes(struct run *run, uint64_t offset, uint64_t length)
{
    while (length) {
        uint64_t left = length;
        int count = 0;
        for (; left && count < VECTORS; count++) {
            run->iov[count] = (struct iovec){(void *)zeroes, least(left, ZEROES)};
            left -= run->iov[count].iov_len;
        }
        ssize_t moved = image_io(run->blk, true, run->iov, count, offset);
        if (moved <= 0)
            return VIRTIO_BLK_S_IOERR;
        offset += (uint64_t)moved;
        length -= (uint64_t)moved;
    }
    return VIRTIO_BLK_S_OK;
}

/* Without `unmap` the range stays allocated. What a file system cannot do is done by the next, slower way. */
static uint8_t zero(struct run *run, bool unmap, uint64_t offset, uint64_t length)
{
    vu_blk *blk = run->blk;
    if ((unmap && change_range(blk, FALLOC_FL_PUNCH_HOLE, offset, length) == 0) ||
        change_range(blk, FALLOC_FL_ZERO_RANGE, offset, length) == 0)
        return writeback(blk) ? VIRTIO_BLK_S_OK : flush(blk);
    return write_zero_bytes(run, offset, length);
}

/* Ranges longer than the announced limits are served: QEMU's blkio driver ignores the limits. */
static uint8_t judge_range(const vu_blk *blk, uint32_t type, const struct virtio_blk_discard_write_zeroes *range)
{
    uint32_t known = type == VIRTIO_BLK_T_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
    if (le32toh(range->flags) & ~known)
        return VIRTIO_BLK_S_UNSUPP;
    return inside(blk, le64toh(range->sector), (uint64_t)le32toh(range->num_sectors) * SECTOR) ? VIRTIO_BLK_S_OK
                                                                                               : VIRTIO_BLK_S_IOERR;
}

static uint8_t apply_range(struct run *run, uint32_t type, const struct virtio_blk_discard_write_zeroes *range)
{
    uint64_t offset = le64toh(range->sector) * SECTOR;
    uint64_t length = (uint64_t)le32toh(range->num_sectors) * SECTOR;
    if (!length)
        return VIRTIO_BLK_S_OK;
    if (type == VIRTIO_BLK_T_DISCARD)
        return discard(run->blk, offset, length);
    return zero(run, le32toh(range->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, offset, length);
}

/* All ranges are judged before the first is changed. */
static uint8_t change_ranges(struct run *run, vu_chain *chain, uint32_t type)
{
    uint64_t bytes = chain->readable - HEADER;
    uint64_t count = bytes / RANGE;
    uint8_t status = VIRTIO_BLK_S_OK;

    if (run->blk->config.flags & VU_BLK_READ_ONLY)
        return VIRTIO_BLK_S_IOERR;
    if (!(run->blk->config.flags & (type == VIRTIO_BLK_T_DISCARD ? VU_BLK_DISCARD : VU_BLK_WRITE_ZEROES)))
        return VIRTIO_BLK_S_UNSUPP;
    if (!count || bytes % RANGE || count > run->blk->config.max_segments ||
        vu_chain_read(run->queue, chain, HEADER, run->ranges, bytes) != (int64_t)bytes)
        return VIRTIO_BLK_S_IOERR;
    for (uint64_t i = 0; i < count && status == VIRTIO_BLK_S_OK; i++)
        status = judge_range(run->blk, type, &run->ranges[i]);
    for (uint64_t i = 0; i < count && status == VIRTIO_BLK_S_OK; i++)
        status = apply_range(run, type, &run->ranges[i]);
    return status;
}

/* ---- one request ---------------------------------------------------------------------------------------------------- */

static uint8_t get_id(struct run *run, vu_chain *chain, uint64_t *written)
{
    uint64_t length = least(chain->writable - 1, sizeof run->blk->config.serial);
    run->tally.others++;
    if (vu_chain_write(run->queue, chain, 0, run->blk->config.serial, length) != (int64_t)length)
        return VIRTIO_BLK_S_IOERR;
    *written = length;
    return VIRTIO_BLK_S_OK;
}

/* The status, and in *written the bytes of data written into the chain. The header is copied once, then judged. */
static uint8_t execute(struct run *run, vu_chain *chain, uint64_t *written)
{
    struct virtio_blk_outhdr header;
    if (chain->fault || vu_chain_read(run->queue, chain, 0, &header, HEADER) != HEADER)
        return VIRTIO_BLK_S_IOERR;
    uint32_t type = le32toh(header.type);
    switch (type) {
    case VIRTIO_BLK_T_IN:
        return read_image(run, chain, le64toh(header.sector), written);
    case VIRTIO_BLK_T_OUT:
        return write_image(run, chain, le64toh(header.sector));
    case VIRTIO_BLK_T_FLUSH:
        run->tally.flushes++;
        return flush(run->blk);
    case VIRTIO_BLK_T_GET_ID:
        return get_id(run, chain, written);
    case VIRTIO_BLK_T_DISCARD:
        run->tally.discards++;
        return change_ranges(run, chain, type);
    case VIRTIO_BLK_T_WRITE_ZEROES:
        run->tally.write_zeroes++;
        return change_ranges(run, chain, type);
    default:
        run->tally.others++;
        return VIRTIO_BLK_S_UNSUPP;
    }
}

/* Serves one chain; in *length what the used ring says. VU_E_FAULT if the status could not be written: a driver that is
 * told of a request without a status would take what is in its memory for one. */
static int serve(struct run *run, vu_chain *chain, uint32_t *length)
{
    uint64_t written = 0;
    run->tally.completed++;
    *length = 0;
    if (!chain->writable) { /* no room for a status: nothing is executed */
        run->tally.errors++;
        return 0;
    }
    uint8_t status = execute(run, chain, &written);
    run->tally.errors += status == VIRTIO_BLK_S_IOERR;
    run->tally.unsupported += status == VIRTIO_BLK_S_UNSUPP;
    /* The status is the last byte, so the dirty log reaches to the end: what a failed read left behind is in it too. */
    if (vu_chain_write(run->queue, chain, chain->writable - 1, &status, 1) != 1)
        return VU_E_FAULT;
    *length = (uint32_t)least(written + 1, UINT32_MAX);
    return 0;
}

/* ---- the queue's thread ------------------------------------------------------------------------------------------ */

/* Adds the tally to the shared counters. */
static void settle(struct run *run)
{
    const uint64_t *tally = (const uint64_t *)&run->tally;
    for (size_t i = 0; i < COUNTERS; i++)
        if (tally[i])
            atomic_fetch_add_explicit(&run->blk->counters[i], tally[i], memory_order_relaxed);
    memset(&run->tally, 0, sizeof run->tally);
}

/* Returns the finished chains to the driver. */
static int push(struct run *run)
{
    if (!run->finished)
        return 0;
    int code = vu_queue_push(run->queue, run->done, run->lengths, run->finished);
    run->finished = 0;
    run->tally.batches++;
    if (code == 0) /* a call descriptor that is of no use is the front-end's affair: only a broken ring counts here */
        run->tally.calls += vu_queue_signal(run->queue) > 0;
    settle(run);
    return code ? code : vu_queue_broken(run->queue);
}

/* What was finished before a fault is returned all the same. */
static int serve_all(struct run *run, uint32_t count)
{
    int code = 0;
    for (uint32_t i = 0; i < count && code == 0; i++) {
        vu_chain *chain = run->chains[i];
        code = serve(run, chain, &run->lengths[run->finished]);
        if (code == 0)
            run->done[run->finished++] = chain;
        if (code == 0 && run->finished == PUSH)
            code = push(run);
    }
    int pushed = push(run);
    return code ? code : pushed;
}

/* Leaves in run->chains the ones whose pages are resident; the others come back through vu_ahead_collect. */
static int submit(struct run *run, uint32_t count)
{
    bool alone = count == 1 && !vu_ahead_waiting(run->queue);
    uint32_t ready = 0;
    for (uint32_t i = 0; i < count; i++) {
        int waits = vu_ahead_submit(run->queue, run->chains[i], alone);
        if (waits < 0)
            return waits;
        if (!waits)
            run->chains[ready++] = run->chains[i];
    }
    return (int)ready;
}

/* Chains served, 0 if there was nothing to do, or a negative code. */
static int work(struct run *run)
{
    int popped = run->stopping ? 0 : vu_queue_pop(run->queue, run->chains, BATCH);
    int ready = popped > 0 && run->ahead ? submit(run, (uint32_t)popped) : popped;
    int code = ready > 0 ? serve_all(run, (uint32_t)ready) : ready;
    if (code < 0 || !run->ahead)
        return code < 0 ? code : popped;

    int collected = vu_ahead_collect(run->queue, run->chains, BATCH);
    code = collected > 0 ? serve_all(run, (uint32_t)collected) : collected;
    return code < 0 ? code : popped + collected;
}

/* A front-end may make its eventfd a blocking one and read it itself, so poll's word is not enough. */
static void drain_kick(struct run *run)
{
    uint64_t count;
    struct iovec iov = {&count, sizeof count};
    run->tally.kicks++;
    if (preadv2(run->kick, &iov, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP)
        run->kick = -1;
}

/* Like KVM's halt polling: a wait that was short makes polling worthwhile next time, a long one does not. */
static void adapt(struct run *run)
{
    uint64_t most = (uint64_t)run->blk->config.poll_us * 1000;
    if (run->now - run->active > most)
        run->window = 0;
    else
        run->window = least(run->window ? 2 * run->window : most / 4, most);
}

/* Sleeps until something is to be done, a stop included. */
static int sleep_until_kick(struct run *run)
{
    struct pollfd fds[3] = {
        {.fd = run->stopping ? -1 : run->stop, .events = POLLIN},
        {.fd = run->stopping ? -1 : run->kick, .events = POLLIN},
        {.fd = run->ahead ? vu_ahead_fd(run->queue) : -1, .events = POLLIN},
    };
    struct timespec pause = {.tv_nsec = POLLED_SLEEP_NS};
    bool polled = run->kick < 0 && !run->stopping;

    if (ppoll(fds, 3, polled ? &pause : NULL, NULL) < 0)
        return errno == EINTR ? 0 : VU_E_SYS;
    run->stopping |= fds[0].revents != 0;
    if (fds[1].revents & POLLIN)
        drain_kick(run);
    else if (fds[1].revents)
        run->kick = -1; /* its other end is gone: look at the ring from time to time */
    return 0;
}

/* Nothing to do: polls for a while, then asks for kicks and sleeps. */
static int rest(struct run *run)
{
    if (run->now - run->active < run->window) {
        sched_yield(); /* the driver may share our CPU */
        return 0;
    }
    int more = run->stopping ? 0 : vu_queue_arm(run->queue);
    if (more)
        return more < 0 ? more : 0;
    settle(run);
    int code = sleep_until_kick(run);
    if (code < 0)
        return code;
    run->now = clock_ns();
    adapt(run);
    return run->stopping ? 0 : vu_queue_disarm(run->queue);
}

static void look_for_stop(struct run *run)
{
    struct pollfd fd = {.fd = run->stop, .events = POLLIN};
    if (run->stopping || run->now - run->stop_check < STOP_CHECK_NS)
        return;
    run->stop_check = run->now;
    run->stopping = poll(&fd, 1, 0) > 0;
}

static int loop(struct run *run)
{
    int code = run->ahead ? vu_queue_touch_ring(run->queue) : 0;
    while (code >= 0 && !(run->stopping && !(run->ahead && vu_ahead_waiting(run->queue)))) {
        code = work(run);
        run->now = clock_ns();
        if (code > 0)
            run->active = run->now;
        else if (code == 0)
            code = rest(run);
        look_for_stop(run);
    }
    return code < 0 ? code : 0;
}

int vu_blk_run(vu_blk *blk, vu_queue *queue, int kick, int stop)
{
    struct run run;
    memset(&run, 0, offsetof(struct run, done)); /* the arrays behind are written before they are read */
    run.blk = blk;
    run.queue = queue;
    run.kick = kick;
    run.stop = stop;
    run.ahead = vu_queue_touch(queue) != NULL;
    run.now = run.active = clock_ns();
    if (blk->direct && posix_memalign((void **)&run.bounce, 4096, BOUNCE))
        return VU_E_NOMEM;
    int code = loop(&run);
    settle(&run);
    free(run.bounce);
    return code;
}

/* ---- the engine's own life --------------------------------------------------------------------------------------- */

vu_blk *vu_blk_new(const struct vu_blk_config *config, int *error)
{
    uint32_t block = config->block_size;
    struct stat status;
    int flags;

    if (block < SECTOR || block & (block - 1) || config->max_segments > SEGMENTS) {
        *error = VU_E_SIZE;
        return NULL;
    }
    if (fstat(config->fd, &status) < 0 || (flags = fcntl(config->fd, F_GETFL)) < 0) {
        *error = VU_E_SYS;
        return NULL;
    }
    vu_blk *blk = calloc(1, sizeof *blk);
    if (!blk) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    blk->config = *config;
    blk->direct = flags & O_DIRECT;
    blk->block_device = S_ISBLK(status.st_mode);
    vu_blk_set_sectors(blk, config->sectors);
    vu_blk_set_writeback(blk, config->flags & VU_BLK_WRITEBACK);
    return blk;
}

void vu_blk_free(vu_blk *blk)
{
    free(blk);
}

void vu_blk_set_writeback(vu_blk *blk, int on)
{
    atomic_store_explicit(&blk->writeback, on != 0, memory_order_relaxed);
}

void vu_blk_set_sectors(vu_blk *blk, uint64_t sectors)
{
    atomic_store_explicit(&blk->sectors, sectors, memory_order_relaxed);
}

void vu_blk_get_stats(const vu_blk *blk, struct vu_blk_stats *stats)
{
    uint64_t *copy = (uint64_t *)stats;
    for (size_t i = 0; i < COUNTERS; i++)
        copy[i] = atomic_load_explicit(&blk->counters[i], memory_order_relaxed);
}
