/*
 * An io_uring of one thread: image requests that would block, several at once.
 *
 * What belongs here: the three system calls, the two rings that they share with the kernel, and that nothing of ours is
 * freed while the kernel may still write into it. What does not: which requests go this way (blk_transfer.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* The cookie of what is no request of others. */
#define CANCEL UINT64_MAX

struct vu_uring {
    int fd;
    uint32_t mask, completion_mask;
    uint32_t tail;              /* of the submission queue, as it will be at the next submit */
    uint32_t out;               /* with the kernel: consumed there and not seen as completed here */
    bool refused;               /* the kernel would not take what lies between its head and our tail */
    const uint32_t *head;       /* written by the kernel */
    uint32_t *published;        /* `tail` as the kernel sees it */
    uint32_t *completion_head;
    const uint32_t *completion_tail; /* written by the kernel */
    const struct io_uring_cqe *completions;
    struct io_uring_sqe *requests;
    void *rings;
    size_t rings_bytes, requests_bytes;
};

/* SUBMIT_STABLE: iovecs are copied at submission. SINGLE_MMAP, NODROP: one mapping, and no completion is ever lost. */
static const uint32_t needed = IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;

/* COOP_TASKRUN (Linux 5.19): a completion does not interrupt us, we come by. */
static int setup(uint32_t entries, struct io_uring_params *params)
{
    *params = (struct io_uring_params){.flags = IORING_SETUP_COOP_TASKRUN};
    int fd = (int)syscall(SYS_io_uring_setup, entries, params);
    if (fd >= 0 || errno != EINVAL)
        return fd;
    *params = (struct io_uring_params){0};
    return (int)syscall(SYS_io_uring_setup, entries, params);
}

static void *map_part(int fd, size_t bytes, off_t part)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, part);
    return at == MAP_FAILED ? NULL : at;
}

/* The array between the submission queue and its entries stays the identity. */
static void locate(struct vu_uring *uring, const struct io_uring_params *params)
{
    uint8_t *rings = uring->rings;
    uint32_t *array = (uint32_t *)(rings + params->sq_off.array);

    uring->mask = params->sq_entries - 1;
    uring->completion_mask = params->cq_entries - 1;
    uring->head = (uint32_t *)(rings + params->sq_off.head);
    uring->published = (uint32_t *)(rings + params->sq_off.tail);
    uring->completion_head = (uint32_t *)(rings + params->cq_off.head);
    uring->completion_tail = (uint32_t *)(rings + params->cq_off.tail);
    uring->completions = (struct io_uring_cqe *)(rings + params->cq_off.cqes);
    for (uint32_t i = 0; i < params->sq_entries; i++)
        array[i] = i;
}

static bool open_rings(struct vu_uring *uring, uint32_t entries)
{
    struct io_uring_params params;
    uring->fd = setup(entries, &params);
    if (uring->fd < 0 || (params.features & needed) != needed)
        return false;
    size_t submission = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    size_t completion = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    uring->rings_bytes = submission > completion ? submission : completion;
    uring->requests_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
    uring->rings = map_part(uring->fd, uring->rings_bytes, IORING_OFF_SQ_RING);
    uring->requests = map_part(uring->fd, uring->requests_bytes, IORING_OFF_SQES);
    if (!uring->rings || !uring->requests)
        return false;
    locate(uring, &params);
    return true;
}

struct vu_uring *vu_uring_new(uint32_t entries)
{
    struct vu_uring *uring = calloc(1, sizeof *uring);
    if (!uring || open_rings(uring, entries))
        return uring;
    vu_uring_free(uring);
    return NULL;
}

/* The descriptor alone is waited for: it works also where a seccomp filter came after us and io_uring_enter fails. */
static void await_all(struct vu_uring *uring)
{
    struct pollfd fd = {.fd = uring->fd, .events = POLLIN};
    uint64_t cookie;
    int result;

    uring->refused = false;
    while (uring->out)
        if (!vu_uring_next(uring, &cookie, &result))
            poll(&fd, 1, -1);
}

void vu_uring_free(struct vu_uring *uring)
{
    if (!uring)
        return;
    await_all(uring);
    if (uring->rings)
        munmap(uring->rings, uring->rings_bytes);
    if (uring->requests)
        munmap(uring->requests, uring->requests_bytes);
    if (uring->fd >= 0)
        close(uring->fd);
    free(uring);
}

int vu_uring_fd(const struct vu_uring *uring)
{
    return uring->fd;
}

static void add(struct vu_uring *uring, const struct io_uring_sqe *request)
{
    uring->requests[uring->tail++ & uring->mask] = *request;
}

void vu_uring_move(struct vu_uring *uring, bool write, int fd, const struct iovec *iov, int count, uint64_t position,
                   int flags, uint64_t cookie)
{
    add(uring, &(struct io_uring_sqe){
                   .opcode = write ? IORING_OP_WRITEV : IORING_OP_READV,
                   .fd = fd,
                   .off = position,
                   .addr = (uintptr_t)iov,
                   .len = (uint32_t)count,
                   .rw_flags = flags,
                   .user_data = cookie,
               });
}

void vu_uring_sync(struct vu_uring *uring, int fd, uint64_t cookie)
{
    add(uring, &(struct io_uring_sqe){
                   .opcode = IORING_OP_FSYNC,
                   .fd = fd,
                   .fsync_flags = IORING_FSYNC_DATASYNC,
                   .user_data = cookie,
               });
}

static uint32_t unsubmitted(const struct vu_uring *uring)
{
    return uring->tail - __atomic_load_n(uring->head, __ATOMIC_ACQUIRE);
}

bool vu_uring_submit(struct vu_uring *uring)
{
    uint32_t count = unsubmitted(uring);
    bool any = count;

    __atomic_store_n(uring->published, uring->tail, __ATOMIC_RELEASE);
    while (count) {
        long taken = syscall(SYS_io_uring_enter, uring->fd, count, 0, 0, NULL, 0);
        if (taken < 0 && errno == EINTR)
            continue;
        uint32_t left = unsubmitted(uring);
        uring->out += count - left;
        uring->refused = left && taken <= 0;
        if (uring->refused)
            break;
        count = left;
    }
    return any;
}

/* The newest first: the tail is ours alone while no kernel thread polls the queue. */
static bool take_back(struct vu_uring *uring, uint64_t *cookie, int *result)
{
    if (!uring->refused)
        return false;
    *cookie = uring->requests[--uring->tail & uring->mask].user_data;
    *result = -EAGAIN;
    __atomic_store_n(uring->published, uring->tail, __ATOMIC_RELEASE);
    uring->refused = unsubmitted(uring) > 0;
    return true;
}

static bool next(struct vu_uring *uring, uint64_t *cookie, int *result)
{
    uint32_t head = *uring->completion_head;
    if (head == __atomic_load_n(uring->completion_tail, __ATOMIC_ACQUIRE))
        return take_back(uring, cookie, result);
    const struct io_uring_cqe *completion = &uring->completions[head & uring->completion_mask];
    *cookie = completion->user_data;
    *result = completion->res;
    uring->out--;
    __atomic_store_n(uring->completion_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

bool vu_uring_next(struct vu_uring *uring, uint64_t *cookie, int *result)
{
    bool found;
    do
        found = next(uring, cookie, result);
    while (found && *cookie == CANCEL);
    return found;
}

/* Before Linux 5.19 the kernel does not know these flags, and gives nothing up. */
void vu_uring_cancel(struct vu_uring *uring)
{
    vu_uring_submit(uring);
    if (uring->refused)
        return;
    add(uring, &(struct io_uring_sqe){
                   .opcode = IORING_OP_ASYNC_CANCEL,
                   .cancel_flags = IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY,
                   .user_data = CANCEL,
               });
    vu_uring_submit(uring);
}
