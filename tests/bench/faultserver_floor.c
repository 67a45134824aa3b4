/*
 * Clients that fault, and the least that a server for them has to do.
 *
 *     faultserver_floor client SOCKET FILE SIZE PAGE_SIZE THREADS MODE FROM TO
 *     faultserver_floor server FILE SIZE PAGE_SIZE IMAGE SOCKET...
 *
 * SOCKET, FILE and IMAGE are descriptors. A client maps the file, registers it with a userfaultfd of its own for faults of MODE
 * (1: missing, 3: minor too) and sends that and its address. After a byte has come its threads touch one of the pages
 * FROM to TO after the other, each thread those of its own share, in an order without neighbours. It prints the number of faults, the
 * nanoseconds that all took, and the median and 90th percentile of one. The server, for as many clients as there are sockets,
 * reads faults, places each page by its own userfaultfd (UFFDIO_COPY) from the mapped image, wakes the client by its own
 * (UFFDIO_WAKE), keeps no books, and ends when the first socket is closed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core.h"

enum { BATCH = 64, CLIENTS = 64, STRIDE = 7 };

static void must(bool good, const char *what)
{
    if (good)
        return;
    perror(what);
    _exit(1);
}

static uint64_t map_file(int file, uint64_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    must(at != MAP_FAILED, "mmap");
    madvise(at, size, MADV_NOHUGEPAGE);
    return (uint64_t)at;
}

static int watch(uint64_t base, uint64_t size, int mode)
{
    uint64_t ioctls;
    int uffd = vu_uffd_open(-1, 0);
    must(uffd >= 0 && vu_uffd_register(uffd, base, size, mode, &ioctls) == 0, "userfaultfd");
    return uffd;
}

/* ---- the client ------------------------------------------------------------------------------------------------------ */

struct thread {
    pthread_t id;
    uint64_t base, page_size, pages, *times;
};

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static void *touch(void *argument)
{
    struct thread *thread = argument;
    for (uint64_t i = 0; i < thread->pages; i++) {
        uint64_t page = i * STRIDE % thread->pages, start = vu_clock_ns();
        (void)*(volatile const char *)(thread->base + page * thread->page_size);
        thread->times[i] = vu_clock_ns() - start;
    }
    return NULL;
}

static void greet(int sock, int fd, uint64_t base)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&base, sizeof base};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    must(sendmsg(sock, &message, 0) == (ssize_t)sizeof base, "sendmsg");
}

static void run_client(int sock, int file, uint64_t size, uint64_t page_size, uint32_t count, int mode, uint64_t from,
                       uint64_t to)
{
    char go;
    struct thread threads[CLIENTS];
    uint64_t base = map_file(file, size), share = (to - from) / count;
    share -= share % STRIDE == 0; /* or the stride would not reach every page */
    uint64_t *times = calloc(share * count, sizeof *times);
    greet(sock, watch(base, size, mode), base);
    must(times && read(sock, &go, 1) == 1, "start");
    uint64_t start = vu_clock_ns();
    for (uint32_t i = 0; i < count; i++) {
        threads[i] = (struct thread){0, base + (from + i * share) * page_size, page_size, share, times + i * share};
        must(pthread_create(&threads[i].id, NULL, touch, &threads[i]) == 0, "pthread_create");
    }
    for (uint32_t i = 0; i < count; i++)
        pthread_join(threads[i].id, NULL);
    uint64_t end = vu_clock_ns(), faults = share * count;
    qsort(times, faults, sizeof *times, by_value);
    printf("%lu %lu %lu %lu\n", (unsigned long)faults, (unsigned long)(end - start), (unsigned long)times[faults / 2],
           (unsigned long)times[faults * 9 / 10]);
}

/* ---- the server ------------------------------------------------------------------------------------------------------ */

struct server {
    uint64_t base, page_size;
    int uffd;
    const char *image;
    struct { int uffd; uint64_t base; } clients[CLIENTS];
};

static int receive(int sock, uint64_t *base)
{
    int fd;
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec iov = {base, sizeof *base};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    must(recvmsg(sock, &message, 0) == (ssize_t)sizeof *base && CMSG_FIRSTHDR(&message), "recvmsg");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static void serve_faults(struct server *server, int client)
{
    uint64_t addresses[BATCH], flags[BATCH];
    int uffd = server->clients[client].uffd, count = vu_uffd_read(uffd, addresses, flags, BATCH);
    for (int i = 0; i < count; i++) {
        uint64_t address = addresses[i] & ~(server->page_size - 1);
        uint64_t at = address - server->clients[client].base;
        int64_t placed = vu_uffd_copy(server->uffd, server->base + at, server->image + at, server->page_size, 1);
        must(placed == (int64_t)server->page_size || errno == EEXIST, "UFFDIO_COPY");
        must(vu_uffd_wake(uffd, address, server->page_size) == 0, "UFFDIO_WAKE");
    }
}

static void run_server(int file, uint64_t size, uint64_t page_size, int image, char **sockets, int count)
{
    struct server server = {.base = map_file(file, size), .page_size = page_size};
    struct pollfd fds[CLIENTS + 1];
    server.image = mmap(NULL, size, PROT_READ, MAP_SHARED, image, 0);
    must(count < CLIENTS && server.image != MAP_FAILED, "clients");
    server.uffd = watch(server.base, size, VU_UFFD_MISSING);
    for (int i = 0; i < count; i++) {
        server.clients[i].uffd = receive(atoi(sockets[i]), &server.clients[i].base);
        fds[i] = (struct pollfd){.fd = server.clients[i].uffd, .events = POLLIN};
        must(write(atoi(sockets[i]), "", 1) == 1, "write"); /* heard */
    }
    fds[count] = (struct pollfd){.fd = atoi(sockets[0]), .events = POLLIN};
    while (!fds[count].revents) {
        poll(fds, (nfds_t)count + 1, -1);
        for (int i = 0; i < count; i++)
            if (fds[i].revents)
                serve_faults(&server, i);
    }
}

int main(int count, char **words)
{
    must(count > 6, "arguments");
    if (strcmp(words[1], "client") == 0 && count == 10)
        run_client(atoi(words[2]), atoi(words[3]), strtoull(words[4], NULL, 0), strtoull(words[5], NULL, 0),
                   (uint32_t)atoi(words[6]), atoi(words[7]), strtoull(words[8], NULL, 0), strtoull(words[9], NULL, 0));
    else
        run_server(atoi(words[2]), strtoull(words[3], NULL, 0), strtoull(words[4], NULL, 0), atoi(words[5]), words + 6,
                   count - 6);
    fflush(stdout);
    _exit(0);
}
