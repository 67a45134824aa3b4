/*
 * Signalling an eventfd of the front-end's from a thread that must not wait.
 *
 * What belongs here: that one thing. What does not: calls from the data path (queue.c), whose threads may wait.
 *
 * The front-end shares an eventfd with its flags: it can fill it and have it block at any moment, also between our look
 * and our write, and a write to an eventfd heeds no RWF_NOWAIT. The kernel's own signals never wait, whatever the flags:
 * they stop at the largest count. The end of an asynchronous request is such a signal, and to poll an eventfd for room or
 * content is a request that ends at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

static _Atomic aio_context_t context;

int vu_event_open(void)
{
    aio_context_t mine = 0, none = 0;
    if (syscall(SYS_io_setup, 1, &mine) < 0)
        return VU_E_SYS;
    if (!atomic_compare_exchange_strong(&context, &none, mine))
        syscall(SYS_io_destroy, mine); /* another thread was quicker */
    return 0;
}

/* Where the kernel or a filter has no asynchronous requests: waits if the front-end is quicker than these two calls. */
static int write_one(int fd)
{
    uint64_t one = 1;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return VU_E_SYS;
    return write(fd, &one, sizeof one) < 0 && errno != EAGAIN ? VU_E_SYS : 0;
}

int vu_event_signal(int fd)
{
    struct iocb poll_itself = {
        .aio_fildes = (uint32_t)fd,
        .aio_lio_opcode = IOCB_CMD_POLL,
        .aio_buf = POLLIN | POLLOUT,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)fd,
    };
    struct iocb *requests[] = {&poll_itself};
    struct io_event ended;
    struct timespec now = {0};
    aio_context_t mine = atomic_load(&context);
    if (!mine || syscall(SYS_io_submit, mine, 1, requests) < 1)
        return write_one(fd);
    syscall(SYS_io_getevents, mine, 0, 1, &ended, &now);
    return 0;
}
