/*
 * userfaultfd: opening, registering, placing pages, waking.
 *
 * What belongs here: one function per kernel request, with the kernel's own structures and numbers. What does not:
 * touching missing pages (touch.c), and deciding who places and who wakes (Python).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* Kernel 6.6 and 6.8 brought these two, headers of 6.1 lack them; a kernel that lacks them answers EINVAL, and says so
 * beforehand in vu_uffd_features. */
#ifndef UFFDIO_POISON
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

#ifndef UFFDIO_MOVE
struct uffdio_move {
    __u64 dst, src, len, mode;
    __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#endif

enum { BATCH = 64 };

static int new_descriptor(int device_fd)
{
    int flags = O_CLOEXEC | O_NONBLOCK;
    return device_fd >= 0 ? ioctl(device_fd, USERFAULTFD_IOC_NEW, flags)
                          : (int)syscall(SYS_userfaultfd, flags);
}

/* The handshake can be done once per descriptor. Closes nothing. */
static int handshake(int uffd, uint64_t wanted, uint64_t *offered)
{
    struct uffdio_api api = {.api = UFFD_API, .features = wanted};
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        return VU_E_SYS;
    *offered = api.features;
    return 0;
}

static void close_keeping_errno(int fd)
{
    int saved = errno;
    close(fd);
    errno = saved;
}

static int open_offering(int device_fd, uint64_t wanted, uint64_t *offered)
{
    int uffd = new_descriptor(device_fd);
    if (uffd < 0)
        return VU_E_SYS;
    if (handshake(uffd, wanted, offered) < 0) {
        close_keeping_errno(uffd);
        return VU_E_SYS;
    }
    return uffd;
}

int vu_uffd_open(int device_fd, uint64_t features)
{
    uint64_t offered;
    return open_offering(device_fd, features, &offered);
}

int vu_uffd_features(int device_fd, uint64_t *features)
{
    int uffd = open_offering(device_fd, 0, features);
    if (uffd < 0)
        return VU_E_SYS;
    close(uffd);
    return 0;
}

int vu_uffd_register(int uffd, uint64_t host, uint64_t length, int mode, uint64_t *ioctls)
{
    struct uffdio_register request = {.range = {host, length}};
    if (mode & VU_UFFD_MISSING)
        request.mode |= UFFDIO_REGISTER_MODE_MISSING;
    if (mode & VU_UFFD_MINOR)
        request.mode |= UFFDIO_REGISTER_MODE_MINOR;
    if (ioctl(uffd, UFFDIO_REGISTER, &request) < 0)
        return VU_E_SYS;
    *ioctls = request.ioctls;
    return 0;
}

int vu_uffd_unregister(int uffd, uint64_t host, uint64_t length)
{
    struct uffdio_range range = {host, length};
    return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? VU_E_SYS : 0;
}

int vu_uffd_wake(int uffd, uint64_t host, uint64_t length)
{
    struct uffdio_range range = {host, length};
    return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? VU_E_SYS : 0;
}

/* A request that stopped half-way fails with EAGAIN and says how far it came; one that placed nothing says either 0 or a
 * negative errno in the same field. */
static int64_t placed(int result, int64_t done)
{
    if (done > 0)
        return done;
    if (result < 0 && done < 0)
        errno = (int)-done;
    return result < 0 ? VU_E_SYS : 0;
}

int64_t vu_uffd_copy(int uffd, uint64_t host, const void *from, uint64_t length, int wake)
{
    struct uffdio_copy request = {host, (uintptr_t)from, length, wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE, 0};
    int result = ioctl(uffd, UFFDIO_COPY, &request);
    return placed(result, request.copy);
}

int64_t vu_uffd_zeropage(int uffd, uint64_t host, uint64_t length, int wake)
{
    struct uffdio_zeropage request = {{host, length}, wake ? 0 : UFFDIO_ZEROPAGE_MODE_DONTWAKE, 0};
    int result = ioctl(uffd, UFFDIO_ZEROPAGE, &request);
    return placed(result, request.zeropage);
}

int64_t vu_uffd_continue(int uffd, uint64_t host, uint64_t length, int wake)
{
    struct uffdio_continue request = {{host, length}, wake ? 0 : UFFDIO_CONTINUE_MODE_DONTWAKE, 0};
    int result = ioctl(uffd, UFFDIO_CONTINUE, &request);
    return placed(result, request.mapped);
}

int64_t vu_uffd_poison(int uffd, uint64_t host, uint64_t length)
{
    struct uffdio_poison request = {{host, length}, 0, 0};
    int result = ioctl(uffd, UFFDIO_POISON, &request);
    return placed(result, request.updated);
}

int64_t vu_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t length, int wake)
{
    struct uffdio_move request = {to, from, length, wake ? 0 : UFFDIO_MOVE_MODE_DONTWAKE, 0};
    int result = ioctl(uffd, UFFDIO_MOVE, &request);
    return placed(result, request.move);
}

/* A copy from address 0 gets as far as asking for the address space, and no further. */
int vu_uffd_alive(int uffd, uint64_t host)
{
    struct uffdio_copy request = {host, 0, (uint64_t)sysconf(_SC_PAGESIZE), UFFDIO_COPY_MODE_DONTWAKE, 0};
    return !(ioctl(uffd, UFFDIO_COPY, &request) < 0 && errno == ESRCH);
}

/* Events that are not faults are read and dropped: they come only to those who asked for them, which nobody here does. */
int vu_uffd_read(int uffd, uint64_t *addresses, uint64_t *flags, uint32_t max)
{
    struct uffd_msg messages[BATCH];
    uint32_t faults = 0;

    if (max == 0)
        return 0;
    ssize_t size = read(uffd, messages, (max < BATCH ? max : BATCH) * sizeof *messages);
    if (size < 0)
        return errno == EAGAIN ? 0 : VU_E_SYS;
    for (size_t i = 0; i < (size_t)size / sizeof *messages; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        addresses[faults] = messages[i].arg.pagefault.address;
        flags[faults++] = messages[i].arg.pagefault.flags;
    }
    return (int)faults;
}
