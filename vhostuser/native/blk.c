/*
 * The virtio-blk engine: what a request asks for, judged and answered.
 *
 * What belongs here: the request format of virtio 1.3 section 5.2.6, and the engine's own life. What does not: rings and
 * chains (split.c), how data gets to the image and from it (blk_transfer.c), when a queue's thread works and sleeps
 * (blk_thread.c), opening, locking and sizing the image (Python).
 *
 * Headers, ranges and the status byte go through vu_chain_read and vu_chain_write, which are guarded.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "blk.h"

enum {
    RANGE = sizeof(struct virtio_blk_discard_write_zeroes),
    ZEROES = 1 << 16,  /* bytes */
    ZERO_VECTORS = 64, /* of them in one system call */
};

static const uint8_t zeroes[ZEROES] __attribute__((aligned(4096)));

/* ---- reading and writing ------------------------------------------------------------------------------------- */

/* Whole blocks inside the capacity; no sum that could wrap. */
static bool inside(const vu_blk *blk, uint64_t sector, uint64_t length)
{
    uint64_t sectors = atomic_load_explicit(&blk->sectors, memory_order_relaxed);
    uint64_t block = blk->config.block_size;
    return sector <= sectors && !(length & (block - 1)) && !(sector & (block / VU_BLK_SECTOR - 1)) &&
           length / VU_BLK_SECTOR <= sectors - sector;
}

static int read_image(struct vu_blk_run *run, vu_chain *chain, uint64_t sector, uint64_t *moved)
{
    uint64_t length = chain->writable - 1;
    run->tally.reads++;
    if (!inside(run->blk, sector, length))
        return VIRTIO_BLK_S_IOERR;
    return vu_blk_transfer(run, chain, VU_BLK_READ, sector * VU_BLK_SECTOR, length, moved);
}

static int write_image(struct vu_blk_run *run, vu_chain *chain, uint64_t sector, uint64_t *moved)
{
    uint64_t length = chain->readable - VU_BLK_HEADER;
    run->tally.writes++;
    if (run->blk->config.flags & VU_BLK_READ_ONLY || !inside(run->blk, sector, length))
        return VIRTIO_BLK_S_IOERR;
    return vu_blk_transfer(run, chain, VU_BLK_WRITE, sector * VU_BLK_SECTOR, length, moved);
}

/* Covers what was completed before it came: those writes have ended, whatever their way. Length 1: it is to be done. */
static int flush(struct vu_blk_run *run, vu_chain *chain)
{
    uint64_t moved;
    run->tally.flushes++;
    return vu_blk_transfer(run, chain, VU_BLK_FLUSH, 0, 1, &moved);
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

static uint8_t write_zero_bytes(const vu_blk *blk, uint64_t offset, uint64_t length)
{
    struct iovec iov[ZERO_VECTORS];
    while (length) {
        uint64_t left = length;
        int count = 0;
        for (; left && count < ZERO_VECTORS; count++) {
            iov[count] = (struct iovec){(void *)zeroes, vu_least(left, ZEROES)};
            left -= iov[count].iov_len;
        }
        ssize_t moved = vu_blk_write_at(blk, iov, count, offset);
        if (moved <= 0)
            return VIRTIO_BLK_S_IOERR;
        offset += (uint64_t)moved;
        length -= (uint64_t)moved;
    }
    return VIRTIO_BLK_S_OK;
}

/* Without `unmap` the range stays allocated. What a file system cannot do is done by the next, slower way. */
static uint8_t zero(const vu_blk *blk, bool unmap, uint64_t offset, uint64_t length)
{
    if ((unmap && change_range(blk, FALLOC_FL_PUNCH_HOLE, offset, length) == 0) ||
        change_range(blk, FALLOC_FL_ZERO_RANGE, offset, length) == 0)
        return vu_blk_writeback(blk) || vu_blk_sync(blk) == 0 ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    return write_zero_bytes(blk, offset, length);
}

/* Ranges longer than the announced limits are served: QEMU's blkio driver ignores the limits. */
static uint8_t judge_range(const vu_blk *blk, uint32_t type, const struct virtio_blk_discard_write_zeroes *range)
{
    uint32_t known = type == VIRTIO_BLK_T_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
    if (le32toh(range->flags) & ~known)
        return VIRTIO_BLK_S_UNSUPP;
    return inside(blk, le64toh(range->sector), (uint64_t)le32toh(range->num_sectors) * VU_BLK_SECTOR) ? VIRTIO_BLK_S_OK
                                                                                               : VIRTIO_BLK_S_IOERR;
}

static uint8_t apply_range(const vu_blk *blk, uint32_t type, const struct virtio_blk_discard_write_zeroes *range)
{
    uint64_t offset = le64toh(range->sector) * VU_BLK_SECTOR;
    uint64_t length = (uint64_t)le32toh(range->num_sectors) * VU_BLK_SECTOR;
    if (!length)
        return VIRTIO_BLK_S_OK;
    if (type == VIRTIO_BLK_T_DISCARD)
        return discard(blk, offset, length);
    return zero(blk, le32toh(range->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, offset, length);
}

/* All ranges are judged before the first is changed. */
static uint8_t change_ranges(struct vu_blk_run *run, vu_chain *chain, uint32_t type)
{
    uint64_t bytes = chain->readable - VU_BLK_HEADER;
    uint64_t count = bytes / RANGE;
    uint8_t status = VIRTIO_BLK_S_OK;

    if (run->blk->config.flags & VU_BLK_READ_ONLY)
        return VIRTIO_BLK_S_IOERR;
    if (!(run->blk->config.flags & (type == VIRTIO_BLK_T_DISCARD ? VU_BLK_DISCARD : VU_BLK_WRITE_ZEROES)))
        return VIRTIO_BLK_S_UNSUPP;
    if (!count || bytes % RANGE || count > run->blk->config.max_segments ||
        vu_chain_read(run->queue, chain, VU_BLK_HEADER, run->ranges, bytes) != (int64_t)bytes)
        return VIRTIO_BLK_S_IOERR;
    for (uint64_t i = 0; i < count && status == VIRTIO_BLK_S_OK; i++)
        status = judge_range(run->blk, type, &run->ranges[i]);
    for (uint64_t i = 0; i < count && status == VIRTIO_BLK_S_OK; i++)
        status = apply_range(run->blk, type, &run->ranges[i]);
    return status;
}

/* ---- one request ---------------------------------------------------------------------------------------------------- */

static uint8_t get_id(struct vu_blk_run *run, vu_chain *chain, uint64_t *written)
{
    uint64_t length = vu_least(chain->writable - 1, sizeof run->blk->config.serial);
    run->tally.others++;
    if (vu_chain_write(run->queue, chain, 0, run->blk->config.serial, length) != (int64_t)length)
        return VIRTIO_BLK_S_IOERR;
    *written = length;
    return VIRTIO_BLK_S_OK;
}

/* The status or VU_BLK_PENDING, and in *moved the bytes of data. The header is copied once, then judged. */
static int execute(struct vu_blk_run *run, vu_chain *chain, uint32_t *type, uint64_t *moved)
{
    struct virtio_blk_outhdr header;
    if (chain->fault || vu_chain_read(run->queue, chain, 0, &header, VU_BLK_HEADER) != VU_BLK_HEADER)
        return VIRTIO_BLK_S_IOERR;
    *type = le32toh(header.type);
    switch (*type) {
    case VIRTIO_BLK_T_IN:
        return read_image(run, chain, le64toh(header.sector), moved);
    case VIRTIO_BLK_T_OUT:
        return write_image(run, chain, le64toh(header.sector), moved);
    case VIRTIO_BLK_T_FLUSH:
        return flush(run, chain);
    case VIRTIO_BLK_T_GET_ID:
        return get_id(run, chain, moved);
    case VIRTIO_BLK_T_DISCARD:
        run->tally.discards++;
        return change_ranges(run, chain, *type);
    case VIRTIO_BLK_T_WRITE_ZEROES:
        run->tally.write_zeroes++;
        return change_ranges(run, chain, *type);
    default:
        run->tally.others++;
        return VIRTIO_BLK_S_UNSUPP;
    }
}

/* Writes the status, counts, and says in *length how many bytes were written into the chain: 1 or VU_E_FAULT. */
static int answer(struct vu_blk_run *run, vu_chain *chain, uint8_t status, uint64_t written, uint32_t *length)
{
    run->tally.errors += status == VIRTIO_BLK_S_IOERR;
    run->tally.unsupported += status == VIRTIO_BLK_S_UNSUPP;
    /* The status is the last byte, so the dirty log reaches to the end: what a failed read left behind is in it too. */
    if (vu_chain_write(run->queue, chain, chain->writable - 1, &status, 1) != 1)
        return VU_E_FAULT;
    *length = (uint32_t)vu_least(written + 1, UINT32_MAX);
    return 1;
}

/* What a request of this type has written into its chain when it has moved so much. */
static uint64_t count_moved(struct vu_blk_run *run, uint32_t type, uint64_t moved)
{
    switch (type) {
    case VIRTIO_BLK_T_IN:
        run->tally.bytes_read += moved;
        return moved;
    case VIRTIO_BLK_T_OUT:
        run->tally.bytes_written += moved;
        return 0;
    default:
        return moved;
    }
}

int vu_blk_serve(struct vu_blk_run *run, vu_chain *chain, uint32_t *length)
{
    uint32_t type = 0;
    uint64_t moved = 0;
    *length = 0;
    if (!chain->writable) { /* no room for a status: nothing is executed */
        run->tally.errors++;
        return 1;
    }
    int status = execute(run, chain, &type, &moved);
    if (status == VU_BLK_PENDING)
        return 0;
    return answer(run, chain, (uint8_t)status, count_moved(run, type, moved), length);
}

int vu_blk_serve_next(struct vu_blk_run *run, vu_chain **chain, uint32_t *length)
{
    static const uint32_t types[] = {
        [VU_BLK_READ] = VIRTIO_BLK_T_IN, [VU_BLK_WRITE] = VIRTIO_BLK_T_OUT, [VU_BLK_FLUSH] = VIRTIO_BLK_T_FLUSH};
    const struct vu_blk_transfer *ended;
    int status = vu_blk_transfer_next(run, &ended);
    if (status == VU_BLK_PENDING)
        return 0;
    uint64_t moved = ended->kind == VU_BLK_FLUSH ? 0 : ended->done;
    *chain = ended->chain;
    return answer(run, ended->chain, (uint8_t)status, count_moved(run, types[ended->kind], moved), length);
}

/* ---- the engine's own life --------------------------------------------------------------------------------------- */

vu_blk *vu_blk_new(const struct vu_blk_config *config, int *error)
{
    uint32_t block = config->block_size;
    struct stat status;
    struct statfs system;
    int flags;

    if (block < VU_BLK_SECTOR || block & (block - 1) || config->max_segments > VU_BLK_SEGMENTS) {
        *error = VU_E_SIZE;
        return NULL;
    }
    if (fstat(config->fd, &status) < 0 || fstatfs(config->fd, &system) < 0 || (flags = fcntl(config->fd, F_GETFL)) < 0) {
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
    blk->in_memory = S_ISREG(status.st_mode) && system.f_type == TMPFS_MAGIC;
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
    for (size_t i = 0; i < VU_BLK_COUNTERS; i++)
        copy[i] = atomic_load_explicit(&blk->counters[i], memory_order_relaxed);
}
