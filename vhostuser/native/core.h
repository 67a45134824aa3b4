/*
 * What the C files share among themselves and Python never sees: the clock, the guard against lost memory, and what one
 * file asks of another.
 */
#ifndef VHOSTUSER_CORE_H
#define VHOSTUSER_CORE_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <time.h>

#include "api.h"

/* Nanoseconds that never go back. */
static inline uint64_t vu_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t vu_least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- what will be needed soon -------------------------------------------------------------------------------- */

#define VU_LINE 64 /* bytes of a line of the cache, nearly everywhere */

/* Volatile: gcc takes a function that does nothing but __builtin_prefetch for one without any effect, and leaves out its
 * calls (seen with gcc 12). No address is wrong here. */
static inline void vu_prefetch(const uint8_t *at)
{
    __builtin_prefetch(at);
    __asm__ volatile("");
}

/* To be written: without PREFETCHW, which gcc leaves to who asks for it, the other CPU would be asked twice. */
static inline void vu_prefetch_to_write(const uint8_t *at)
{
#ifdef __x86_64__
    __asm__ volatile("prefetchw %0" : : "m"(*at));
#else
    __builtin_prefetch(at, 1);
    __asm__ volatile("");
#endif
}

/* ---- counters --------------------------------------------------------------------------------------------- */

/* Adds to a counter that one thread writes and any may read: no locked instruction. */
static inline void vu_add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

enum { VU_BUCKETS = 32 };

/* Of a histogram in powers of two: n for [2^n, 2^(n+1)) microseconds, 0 from 0; the last for all that is longer. */
static inline unsigned vu_bucket(uint64_t ns)
{
    uint64_t us = ns / 1000;
    unsigned bucket = us < 2 ? 0 : 63 - (unsigned)__builtin_clzll(us);
    return bucket < VU_BUCKETS ? bucket : VU_BUCKETS - 1;
}

/* ---- the guard ------------------------------------------------------------------------------------------
 * A peer may truncate a file under our mapping (SIGBUS), and we revoke mappings under our own threads (SIGSEGV).
 * Code that touches guest memory runs between vu_guard_enter and vu_guard_leave:
 *
 *     struct vu_guard guard;
 *     if (VU_GUARD(&guard, map)) { ... the memory is gone: VU_E_FAULT; the guard is already left ... }
 *     ... touch ...
 *     vu_guard_leave(&guard);
 *
 * Only faults at addresses inside the map's regions (or the log and in-flight mappings that were added to the guard)
 * are caught; any other goes to the handler that was installed before ours. Guards nest. Local variables that
 * change between enter and the fault and are read after it must be volatile.
 */
struct vu_span {
    uintptr_t base;
    size_t length;
};

struct vu_guard {
    sigjmp_buf env;
    struct vu_guard *outer;
    const vu_map *map;          /* may be NULL */
    struct vu_span extra[2];    /* log and in-flight; length 0 when unused */
};

void vu_guard_enter(struct vu_guard *guard, const vu_map *map);
void vu_guard_leave(struct vu_guard *guard);
#define VU_GUARD(guard, map) (vu_guard_enter((guard), (map)), sigsetjmp((guard)->env, 0))

/* Installs the handlers, or puts them back on top of one that was installed after ours. Cheap when nothing changed. */
int vu_guard_install(void);

/* Whether the range reaches beyond the last address. */
static inline bool vu_wraps(uint64_t start, uint64_t length)
{
    return length > UINT64_MAX - start;
}

/* ---- translation ------------------------------------------------------------------------------------------- */

/* The host address of [guest, guest + length) if one region holds all of it, else NULL. */
uint8_t *vu_map_guest(const vu_map *map, uint64_t guest, uint64_t length);
uint8_t *vu_map_user(const vu_map *map, uint64_t user, uint64_t length);
/* The host address of `guest` and in *run how many of `length` bytes follow it in the same region; NULL if unmapped. */
uint8_t *vu_map_run(const vu_map *map, uint64_t guest, uint64_t length, uint64_t *run);
/* Guest addresses that follow each other in one region. */
struct vu_window {
    uint64_t guest, length;
    uint8_t *host;
};
/* All of the region that holds the address: false if none does. */
bool vu_map_window(const vu_map *map, uint64_t guest, struct vu_window *window);
/* The same of the front-end's addresses. */
struct vu_user_window {
    uint64_t user, length, guest;
    uint8_t *host;
};
int vu_map_host_to_guest(const vu_map *map, const void *host, uint64_t *guest); /* 0 or VU_E_RANGE */
bool vu_map_user_window(const vu_map *map, uint64_t user, struct vu_user_window *window);
/* The page size in bytes of the region that holds this host address, or 0. */
uint64_t vu_map_page_size(const vu_map *map, const void *host);

/* ---- files of the front-end that are not guest memory: the dirty log, the in-flight region ------------------ */

struct vu_mapping {
    uint8_t *at;         /* the first byte that was asked for */
    struct vu_span span; /* what is mapped, page aligned */
};

/* Maps [offset, offset + size) shared and writable: 0, VU_E_SIZE, VU_E_OVERFLOW, VU_E_FILE, VU_E_SHORT or VU_E_SYS. */
int vu_mapping_open(struct vu_mapping *mapping, int fd, uint64_t offset, uint64_t size);
void vu_mapping_close(struct vu_mapping *mapping);

/* vu_log_mark for those who are inside a guard that has the log's span. */
int vu_log_set(vu_log *log, uint64_t guest, uint64_t length);
/* Signals the log's event if it was marked since the last time. */
void vu_log_tell(vu_log *log);
/* 0, or why pages of this range could not be marked. */
int vu_log_check(const vu_log *log, uint64_t guest, uint64_t length);
struct vu_span vu_log_span(const vu_log *log);

/* ---- queues -------------------------------------------------------------------------------------------------- */

const vu_map *vu_queue_map(const vu_queue *queue);
/* Whether the queue is broken, but what was taken before can still be returned. */
bool vu_queue_drains(const vu_queue *queue);
/* Chains under way need not be returned before a stop: the in-flight region has them. */
bool vu_queue_leaves(const vu_queue *queue);
uint32_t vu_queue_size(const vu_queue *queue); /* entries */
/* The device only ever reads what is offered here. */
void vu_queue_only_reads(vu_queue *queue);
/* The pool between LISTEN and END, else NULL. vu_queue_set_touch (touch.c) stores it with vu_queue_keep_touch. */
vu_touch *vu_queue_touch(const vu_queue *queue);
void vu_queue_keep_touch(vu_queue *queue, vu_touch *touch);
/* The three parts of the ring itself, for vu_queue_touch_ring. */
void vu_queue_spans(const vu_queue *queue, struct vu_span spans[3]);
/* What touch.c keeps per queue, made by vu_queue_set_touch and freed with the queue. */
struct vu_ahead;
struct vu_ahead **vu_queue_ahead(vu_queue *queue);
void vu_ahead_free(struct vu_ahead *ahead);
/* Free for touch.c while a chain is submitted. */
struct vu_ahead_link { struct vu_chain *next; _Atomic uint32_t missing; };
struct vu_ahead_link *vu_chain_link(struct vu_chain *chain);

/* ---- io_uring (uring.c) ------------------------------------------------------------------------------------------
 * Of one thread. The caller keeps no more than `entries` requests between vu_uring_move or _sync and vu_uring_next. */

struct vu_uring;
/* NULL where the kernel, a sysctl or a seccomp filter does not let us have one. entries: a power of two. */
struct vu_uring *vu_uring_new(uint32_t entries);
/* Waits for the requests that the kernel has, however long they take; those not submitted are forgotten. */
void vu_uring_free(struct vu_uring *uring);
/* Readable when vu_uring_next has something that a submit did not leave behind. */
int vu_uring_fd(const struct vu_uring *uring);
/* Prepares one preadv2 or pwritev2. iov is kept until vu_uring_submit, the memory that it names until vu_uring_next. */
void vu_uring_move(struct vu_uring *uring, bool write, int fd, const struct iovec *iov, int count, uint64_t position,
                   int flags, uint64_t cookie);
/* Prepares one fdatasync. */
void vu_uring_sync(struct vu_uring *uring, int fd, uint64_t cookie);
/* Hands over what was prepared; false if that was nothing. What the kernel refused ends with -EAGAIN. */
bool vu_uring_submit(struct vu_uring *uring);
/* Takes one that has ended, in any order, and what its system call would have returned or -errno; false: none. */
bool vu_uring_next(struct vu_uring *uring, uint64_t *cookie, int *result);
/* Asks the kernel to give up what it has. All of it still comes through vu_uring_next, as done or with an error. */
void vu_uring_cancel(struct vu_uring *uring);

/* ---- fault-ahead ------------------------------------------------------------------------------------------------ */

/* Touches the missing ones among these spans, several at once, and returns when all are there: 0 or VU_E_FAULT.
 * For indirect tables and rings, from inside pop. [touches] */
int vu_touch_spans(vu_touch *touch, const vu_map *map, const struct vu_span *spans, uint32_t count);

#endif
