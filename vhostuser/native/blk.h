/*
 * The inside of the block engine: what its requests (blk.c), their way to the image (blk_transfer.c) and the thread of a
 * queue (blk_thread.c) share.
 */
#ifndef VHOSTUSER_BLK_H
#define VHOSTUSER_BLK_H

#include <linux/virtio_blk.h>

#include "engine.h"

enum {
    VU_BLK_SECTOR = 512,
    VU_BLK_HEADER = sizeof(struct virtio_blk_outhdr),
    VU_BLK_SEGMENTS = 256,   /* ranges in one discard or write-zeroes request */
    VU_BLK_VECTORS = 1024,   /* the kernel's UIO_MAXIOV */
    VU_BLK_TRANSFERS = 128,  /* chains that are out at once; a power of two */
    VU_BLK_PUSH = 8,         /* chains returned at once: the driver works on these while we work on the next */
    VU_BLK_BATCH = 64,       /* chains popped at once */
    VU_BLK_PENDING = 256,    /* instead of a status byte: not yet known */
    VU_BLK_COUNTERS = sizeof(struct vu_blk_stats) / sizeof(uint64_t),
};

struct vu_blk {
    struct vu_blk_config config;
    _Atomic uint64_t sectors;
    _Atomic int writeback;
    bool direct;       /* O_DIRECT: buffers must be aligned, or bounced */
    bool in_memory;    /* a file on tmpfs: nothing is worth waiting for elsewhere */
    bool block_device; /* and not a regular file */
    _Atomic uint64_t counters[VU_BLK_COUNTERS]; /* in the order of struct vu_blk_stats */
};

/* The three ways of one step of a transfer. It starts with the first that pays and goes on with a later one. */
enum vu_blk_way {
    VU_BLK_CACHED, /* what the page cache has, without waiting */
    VU_BLK_ASIDE,  /* by the io_uring, while others go on */
    VU_BLK_WAIT,   /* by a system call that waits */
};

enum vu_blk_kind { VU_BLK_READ, VU_BLK_WRITE, VU_BLK_FLUSH };

/* Bytes on their way between the image and the data part of a chain, or a flush. */
struct vu_blk_transfer {
    vu_chain *chain;
    enum vu_blk_kind kind;
    enum vu_blk_way way;
    bool bounced;    /* the medium does not take the guest's buffers as they lie */
    uint8_t *bounce; /* NULL: none, or the one of those who wait */
    uint64_t position, length, done; /* bytes */
};

/* One thread's work on one queue. */
struct vu_blk_run {
    struct vu_engine engine;
    vu_blk *blk;
    vu_queue *queue;
    struct vu_blk_stats tally; /* since the last settle */
    uint32_t finished;   /* chains in `done` */

    /* Of blk_transfer.c. */
    bool uncached;           /* the file system cannot tell what the page cache has */
    bool alone;              /* no io_uring can be had: everything waits */
    bool leaving;            /* what does not end by itself stays in flight */
    struct vu_uring *uring;  /* NULL until the first transfer that needs it */
    uint8_t *bounces;        /* NULL without O_DIRECT */
    uint32_t bounces_taken;  /* bit n: the nth is a transfer's */
    uint32_t iov_used;       /* vectors of transfers that are prepared, but not submitted */
    uint32_t free;           /* in `unused` */

    /* Written before they are read. */
    struct vu_blk_transfer *unused[VU_BLK_TRANSFERS];
    struct vu_blk_transfer transfers[VU_BLK_TRANSFERS];
    struct iovec iov[VU_BLK_VECTORS];
    vu_chain *done[VU_BLK_PUSH];
    uint32_t lengths[VU_BLK_PUSH];
    vu_chain *chains[VU_BLK_BATCH];
    struct virtio_blk_discard_write_zeroes ranges[VU_BLK_SEGMENTS];
};

static inline bool vu_blk_writeback(const vu_blk *blk)
{
    return atomic_load_explicit(&blk->writeback, memory_order_relaxed);
}

/* ---- transfers (blk_transfer.c) ----------------------------------------------------------------------------------- */

/* 0 or VU_E_NOMEM. */
int vu_blk_transfers_open(struct vu_blk_run *run);
/* Waits for what the kernel has of them: from then on it does not touch guest memory. */
void vu_blk_transfers_close(struct vu_blk_run *run);
/* Ends those that the kernel gives up when it is asked to, without a status: their chains stay in flight. Nothing else
 * is given up, so what vu_blk_transfers_out counts still has to be waited for. Again: nothing. */
void vu_blk_transfers_leave(struct vu_blk_run *run);
/* Transfers that are under way. */
uint32_t vu_blk_transfers_out(const struct vu_blk_run *run);

/* Starts one; no more than run->free at a time. `length` bytes behind the chain's header or, for a read, from the start of
 * its writable part. A status, and in *moved the bytes; or VU_BLK_PENDING. */
int vu_blk_transfer(struct vu_blk_run *run, vu_chain *chain, enum vu_blk_kind kind, uint64_t position, uint64_t length,
                    uint64_t *moved);
/* Goes on with all that are pending, as far as they get without waiting. The status of one that has ended and *ended,
 * which is valid until the next call in this file; or VU_BLK_PENDING. */
int vu_blk_transfer_next(struct vu_blk_run *run, const struct vu_blk_transfer **ended);

/* The same in place, waiting, from the engine's own memory: bytes or -errno. */
ssize_t vu_blk_write_at(const vu_blk *blk, const struct iovec *iov, int count, uint64_t position);
/* 0 or -errno. */
int vu_blk_sync(const vu_blk *blk);

/* ---- requests (blk.c) ---------------------------------------------------------------------------------------------- */

/* Serves one chain: 1, and in *length what the used ring says; 0 if its end comes through vu_blk_serve_next; VU_E_FAULT if
 * the status could not be written: a driver that is told of a request without a status would take what is in its memory
 * for one. */
int vu_blk_serve(struct vu_blk_run *run, vu_chain *chain, uint32_t *length);
/* One that has ended meanwhile: 1, 0 if there is none, or VU_E_FAULT. */
int vu_blk_serve_next(struct vu_blk_run *run, vu_chain **chain, uint32_t *length);

#endif
