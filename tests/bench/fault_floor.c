/*
 * What a missing page costs: the least that it can cost, and what it costs a request of our block engine.
 *
 *     fault_floor PAGES DELAY_US THREADS CLIENT_CPU SERVER_CPU ROUNDS
 *
 * Two processes share a file. The server, the front-end of postcopy, reads faults from the client's userfaultfd, places
 * the page by its own (UFFDIO_COPY) DELAY_US later, as if it came over a network, and wakes the client by the client's
 * (UFFDIO_WAKE). The client does three things in each round: it touches one missing page, which is the floor; the block
 * engine of this project serves one write of PAGES missing pages, with THREADS touch threads; and the same write again,
 * now that its pages are there. All in one process, in turn: how long a sleeping CPU takes to wake differs by a third
 * from process to process on virtual machines, and would drown what is to be compared.
 * Prints in nanoseconds: of floor and engine the median and the 90th percentile, and the median of the second write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum { PAGE = 4096, RING = 64, HEAD_PAGES = 16, PENDING = 1024, BATCH = 64 };

static void must(bool good, const char *what)
{
    if (good)
        return;
    perror(what);
    _exit(1);
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    must(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* ---- the front-end ------------------------------------------------------------------------------------------------- */

/* What the client tells the server, beside its userfaultfd. */
struct hello {
    uint64_t base;
};

static int receive(int sock, struct hello *hello)
{
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec iov = {hello, sizeof *hello};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    must(recvmsg(sock, &message, 0) == (ssize_t)sizeof *hello && CMSG_FIRSTHDR(&message), "recvmsg");
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static void greet(int sock, int fd, uint64_t base)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct hello hello = {base};
    struct iovec iov = {&hello, sizeof hello};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    must(sendmsg(sock, &message, 0) == (ssize_t)sizeof hello, "sendmsg");
}

struct server {
    int theirs, ours;
    uint64_t their_base, our_base, delay;
    struct { uint64_t due, address; } pending[PENDING];
    uint32_t head, tail;
};

static void take_faults(struct server *server)
{
    uint64_t addresses[BATCH], flags[BATCH];
    int count = vu_uffd_read(server->theirs, addresses, flags, BATCH);
    uint64_t due = clock_ns() + server->delay;
    for (int i = 0; i < count; i++, server->tail++) {
        server->pending[server->tail % PENDING].due = due;
        server->pending[server->tail % PENDING].address = addresses[i] & ~(uint64_t)(PAGE - 1);
    }
}

static void place_what_is_due(struct server *server)
{
    static const char page[PAGE] = "page";
    for (; server->head != server->tail && server->pending[server->head % PENDING].due <= clock_ns(); server->head++) {
        uint64_t address = server->pending[server->head % PENDING].address;
        int64_t placed = vu_uffd_copy(server->ours, address - server->their_base + server->our_base, page, PAGE, 1);
        must(placed == PAGE || errno == EEXIST, "UFFDIO_COPY");
        must(vu_uffd_wake(server->theirs, address, PAGE) == 0, "UFFDIO_WAKE");
    }
}

static void serve(int file, uint64_t size, int sock, uint64_t delay)
{
    struct server server = {.delay = delay};
    struct hello hello;
    uint64_t ioctls;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    must(memory != MAP_FAILED, "mmap");
    prctl(PR_SET_TIMERSLACK, 1);
    server.our_base = (uint64_t)memory;
    server.ours = vu_uffd_open(-1, 0);
    must(server.ours >= 0 && vu_uffd_register(server.ours, server.our_base, size, VU_UFFD_MISSING, &ioctls) == 0, "uffd");
    server.theirs = receive(sock, &hello);
    server.their_base = hello.base;

    struct pollfd fds[2] = {{.fd = server.theirs, .events = POLLIN}, {.fd = sock, .events = POLLIN}};
    while (!fds[1].revents) {
        uint64_t now = clock_ns(), due = server.pending[server.head % PENDING].due;
        struct timespec pause = {.tv_nsec = due > now ? (long)(due - now) : 0};
        ppoll(fds, 2, server.head != server.tail ? &pause : NULL, NULL);
        if (fds[0].revents)
            take_faults(&server);
        place_what_is_due(&server);
    }
}

/* ---- the client ------------------------------------------------------------------------------------------------------ */

struct client {
    uint32_t pages, rounds; /* pages of a write */
    uint64_t size;
    int file;
    vu_map *driver_map, *map;
    vu_region *region;
    vu_driver *driver;
    vu_queue *queue;
    vu_touch *touch;
    vu_blk *blk;
    int stop;
};

static vu_map *map_file(int file, uint64_t size, int flags, vu_region **region)
{
    int error;
    *region = vu_region_map(file, 0, size, 1ull << 40, 0, flags, &error);
    must(*region != NULL, "vu_region_map");
    vu_map *map = vu_map_new(region, 1, &error);
    must(map != NULL, "vu_map_new");
    return map;
}

/* Shows the file's pages to the client, all but the ones in front missing, and tells the server. */
static uint64_t register_client(struct client *client, int sock)
{
    struct vu_region_info info;
    uint64_t ioctls;
    client->map = map_file(client->file, client->size, VU_REGION_HIDDEN, &client->region);
    vu_region_describe(client->region, &info);
    int uffd = vu_uffd_open(-1, 0);
    must(uffd >= 0 && vu_region_no_huge(client->region) == 0, "uffd");
    must(vu_uffd_register(uffd, info.base, info.length, VU_UFFD_MISSING, &ioctls) == 0, "UFFDIO_REGISTER");
    must(vu_region_reveal(client->region) == 0, "vu_region_reveal");
    greet(sock, uffd, info.base);
    return info.base;
}

static void *touch_pages(void *touch)
{
    vu_touch_run(touch);
    return NULL;
}

static void start_engine(struct client *client, uint32_t threads)
{
    int error, image = memfd_create("image", 0);
    must(ftruncate(image, client->pages * PAGE) == 0, "ftruncate");
    struct vu_blk_config config = {.fd = image, .flags = VU_BLK_WRITEBACK, .sectors = client->pages * PAGE / 512,
                                   .block_size = 512, .max_segments = 64};
    struct vu_ring ring = {.size = RING, .flags = VU_RING_GUEST_ADDR, .desc = vu_driver_desc(client->driver),
                           .avail = vu_driver_avail(client->driver), .used = vu_driver_used(client->driver)};
    client->stop = eventfd(1, 0); /* set already: the engine serves what is there and returns */
    client->blk = vu_blk_new(&config, &error);
    client->queue = vu_queue_new(client->map, &ring, NULL, NULL, NULL, &error);
    client->touch = vu_touch_new(4096);
    must(client->blk && client->queue && client->touch, "the engine");
    must(vu_queue_set_touch(client->queue, client->touch) == 0, "vu_queue_set_touch");
    for (uint32_t i = 0; i < threads; i++) {
        pthread_t thread;
        must(pthread_create(&thread, NULL, touch_pages, client->touch) == 0, "pthread_create");
    }
}

/* One write of `pages` pages from guest address `data`: the time until it is completed. */
static uint64_t write_request(struct client *client, uint64_t data)
{
    struct { uint32_t type, reserved; uint64_t sector; } header = {.type = 1};
    uint64_t at = (HEAD_PAGES - 1) * PAGE;
    uint16_t head;
    uint32_t length;
    uint8_t status = 0xff;
    vu_map_write(client->driver_map, at, &header, sizeof header);
    vu_buffer buffers[] = {{at, sizeof header, 0}, {data, client->pages * PAGE, 0}, {at + 16, 1, 1}};
    must(vu_driver_add(client->driver, buffers, 3) >= 0, "vu_driver_add");
    vu_driver_publish(client->driver);
    uint64_t start = clock_ns();
    must(vu_blk_run(client->blk, client->queue, -1, client->stop) == 0, "vu_blk_run");
    uint64_t time = clock_ns() - start;
    must(vu_driver_take(client->driver, &head, &length) == 1, "vu_driver_take");
    vu_map_read(client->driver_map, at + 16, &status, 1);
    must(status == 0, "the status of a request");
    return time;
}

static uint64_t touch_page(uint64_t base, uint64_t page)
{
    uint64_t start = clock_ns();
    (void)*(volatile const char *)(base + page * PAGE);
    return clock_ns() - start;
}

static uint64_t *times_of(const struct client *client)
{
    uint64_t *times = calloc(client->rounds, sizeof *times);
    must(times != NULL, "calloc");
    return times;
}

static void print(uint64_t *times, uint32_t count, bool slow)
{
    qsort(times, count, sizeof *times, by_value);
    printf("%lu ", (unsigned long)times[count / 2]);
    if (slow)
        printf("%lu ", (unsigned long)times[count * 9 / 10]);
}

static void measure(struct client *client, int sock, uint32_t threads)
{
    int error;
    vu_region *region;
    uint64_t *floor = times_of(client), *engine = times_of(client), *again = times_of(client);
    client->driver_map = map_file(client->file, client->size, 0, &region);
    client->driver = vu_driver_new(client->driver_map, 0, RING, 0, &error);
    must(client->driver != NULL, "vu_driver_new");
    uint64_t base = register_client(client, sock);
    start_engine(client, threads);
    for (uint32_t i = 0; i < client->rounds; i++) {
        uint64_t page = HEAD_PAGES + (uint64_t)i * (client->pages + 1);
        floor[i] = touch_page(base, page);
        engine[i] = write_request(client, (page + 1) * PAGE);
        again[i] = write_request(client, (page + 1) * PAGE);
    }
    print(floor, client->rounds, true);
    print(engine, client->rounds, true);
    print(again, client->rounds, false);
}

int main(int count, char **words)
{
    must(count == 7, "fault_floor PAGES DELAY_US THREADS CLIENT_CPU SERVER_CPU ROUNDS");
    struct client client = {.pages = (uint32_t)atoi(words[1]), .rounds = (uint32_t)atoi(words[6])};
    int pair[2];
    client.size = (HEAD_PAGES + (uint64_t)client.rounds * (client.pages + 1)) * PAGE;
    client.file = memfd_create("guest", 0);
    must(ftruncate(client.file, (off_t)client.size) == 0, "ftruncate");
    must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0, "socketpair");
    pid_t child = fork();
    must(child >= 0, "fork");
    pin(atoi(words[child ? 4 : 5]));
    if (!child) {
        close(pair[0]);
        serve(client.file, client.size, pair[1], (uint64_t)atoi(words[2]) * 1000);
        _exit(0);
    }
    close(pair[1]);
    measure(&client, pair[0], (uint32_t)atoi(words[3]));
    fflush(stdout);
    close(pair[0]);
    waitpid(child, NULL, 0);
    _exit(0); /* the touch threads are not waited for */
}
