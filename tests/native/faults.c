/*
 * The fault server with everything at once: threads that touch missing pages, a loop that serves them, two threads that fill,
 * clients that come and go, pauses, and readers of counters and events. For the sanitizers: nothing may race, no byte
 * be out of place, nobody sleep for ever.
 *
 *     faults SEED ROUNDS PUT WAKE
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

enum { PAGE = 4096, PAGES = 256, READERS = 6, FILLERS = 2, SIZE = PAGE * PAGES };

struct world {
    vu_faults *server;
    uint8_t *memory, *image;
    int uffd, file, notice;
    unsigned seed;
    int mode;
    atomic_bool over;
};

static void must(bool good, const char *what)
{
    if (good)
        return;
    perror(what);
    _exit(1);
}

/* Each page holds its number, plus one, in every byte that is looked at. */
static void *read_pages(void *argument)
{
    struct world *world = argument;
    unsigned seed = world->seed + (unsigned)(uintptr_t)pthread_self();
    for (int i = 0; i < PAGES; i++) {
        unsigned page = (unsigned)rand_r(&seed) % PAGES, at = (unsigned)rand_r(&seed) % PAGE;
        uint8_t found = *(volatile uint8_t *)(world->memory + page * PAGE + at);
        must(found == (uint8_t)(page % 255 + 1), "a byte is wrong");
    }
    return NULL;
}

static void *fill(void *argument)
{
    struct world *world = argument;
    unsigned seed = world->seed + 7;
    while (!atomic_load(&world->over)) {
        unsigned first = (unsigned)rand_r(&seed) % PAGES, count = (unsigned)rand_r(&seed) % (PAGES - first) + 1;
        must(vu_faults_fill(world->server, (uint64_t)first * PAGE, (uint64_t)count * PAGE) >= 0, "vu_faults_fill");
        usleep(50);
    }
    return NULL;
}

static void *serve(void *argument)
{
    must(vu_faults_serve(((struct world *)argument)->server) == 0, "vu_faults_serve");
    return NULL;
}

/* A second client on the same descriptor: what it has is as good as any. */
static void come_and_go(struct world *world)
{
    struct vu_fault_span span = {.guest = 0, .size = SIZE, .host = (uintptr_t)world->memory};
    struct vu_client_stats stats;
    struct vu_server_stats all;
    struct vu_fault_event events[32];
    int number = vu_faults_add(world->server, dup(world->uffd), -1, 0, &span, 1);
    must(number >= 0, "vu_faults_add");
    vu_faults_client_stats(world->server, (uint32_t)number, &stats);
    vu_faults_stats(world->server, &all);
    for (uint64_t after = 0, count; (count = (uint64_t)vu_faults_events(world->server, after, events, 32)) > 0;)
        after = events[count - 1].sequence;
    must(vu_faults_remove(world->server, (uint32_t)number) == 0, "vu_faults_remove");
    vu_faults_pause(world->server, 1);
    vu_faults_pause(world->server, 0);
}

static void start(struct world *world, uint32_t put, uint32_t wake)
{
    int error;
    uint64_t ioctls;
    world->file = memfd_create("guest", 0);
    must(ftruncate(world->file, SIZE) == 0, "ftruncate");
    world->memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, world->file, 0);
    world->image = malloc(SIZE);
    must(world->memory != MAP_FAILED && world->image, "memory");
    madvise(world->memory, SIZE, MADV_NOHUGEPAGE);
    for (int page = 0; page < PAGES; page++)
        memset(world->image + page * PAGE, page % 255 + 1, PAGE);
    world->uffd = vu_uffd_open(-1, 0);
    world->mode = VU_UFFD_MISSING | (put == VU_PUT_CONTINUE ? VU_UFFD_MINOR : 0);
    must(vu_uffd_register(world->uffd, (uintptr_t)world->memory, SIZE, world->mode, &ioctls) == 0, "register");
    struct vu_fault_config config = {.uffd = world->uffd, .control = eventfd(0, EFD_NONBLOCK),
                                     .wanted = eventfd(0, EFD_NONBLOCK), .notice = eventfd(0, EFD_NONBLOCK),
                                     .put = put, .wake = wake, .batch = 16, .events = 64};
    struct vu_fault_region region = {.size = SIZE, .host = (uintptr_t)world->memory, .page_size = PAGE,
                                     .source = (uintptr_t)world->image, .fd = world->file};
    struct vu_fault_span span = {.size = SIZE, .host = (uintptr_t)world->memory};
    world->server = vu_faults_new(&config, &region, 1, &error);
    must(world->server != NULL, "vu_faults_new");
    must(vu_faults_add(world->server, dup(world->uffd), -1, 0, &span, 1) == 0, "vu_faults_add");
}

static void run(unsigned seed, uint32_t put, uint32_t wake)
{
    struct world world = {.seed = seed};
    pthread_t loop, readers[READERS], fillers[FILLERS];
    start(&world, put, wake);
    must(pthread_create(&loop, NULL, serve, &world) == 0, "pthread_create");
    for (int i = 0; i < READERS; i++)
        must(pthread_create(&readers[i], NULL, read_pages, &world) == 0, "pthread_create");
    for (int i = 0; i < FILLERS; i++)
        must(pthread_create(&fillers[i], NULL, fill, &world) == 0, "pthread_create");
    for (int i = 0; i < 20; i++)
        come_and_go(&world);
    for (int i = 0; i < READERS; i++)
        pthread_join(readers[i], NULL);
    atomic_store(&world.over, true);
    for (int i = 0; i < FILLERS; i++)
        pthread_join(fillers[i], NULL);
    vu_faults_stop(world.server);
    pthread_join(loop, NULL);
    vu_faults_free(world.server);
    close(world.uffd);
    close(world.file);
    munmap(world.memory, SIZE);
    free(world.image);
}

int main(int count, char **words)
{
    must(count == 5, "faults SEED ROUNDS PUT WAKE");
    alarm(60);
    for (int round = 0; round < atoi(words[2]); round++)
        run((unsigned)(atoi(words[1]) + round), (uint32_t)atoi(words[3]), (uint32_t)atoi(words[4]));
    printf("ok\n");
    return 0;
}
