/*
 * One ring behind an IOMMU whose mappings come and go while it is served, for the sanitizers.
 *
 *     translations SEED ROUNDS
 *
 * Behind each page of I/O virtual addresses is one of two pages of memory. One thread takes chains, and keeps them for a
 * little: they must lie in the page that is the right one, from first to last. The other takes mappings back, waits until
 * nothing uses them, and only then makes the other page the right one. Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
#include <sched.h>

#include "guest.h"

enum { PAGES = 8, BUFFERS = 0x100000, SIZE = 16 };

struct scene {
    struct guest guest;
    vu_driver *driver;
    vu_queue *queue;
    vu_iotlb *iotlb;
    _Atomic bool over;
    _Atomic uint32_t turns[PAGES]; /* odd: the second page is the right one; moves on only while nothing uses either */
    uint64_t served;
};

static void map_page(struct scene *scene, uint32_t page)
{
    uint64_t iova = BUFFERS + page * 4096, guest = FAR_GUEST + (2 * page + (atomic_load(&scene->turns[page]) & 1)) * 4096;
    CHECK(vu_iotlb_update(scene->iotlb, scene->guest.map, iova, 4096, USER + guest, 3) == 0);
}

static void use(struct scene *scene, vu_chain *chain, uint64_t stamp)
{
    uint32_t at = (uint32_t)((chain->segments[0].guest - FAR_GUEST) / 4096), page = at / 2;
    uint32_t turn = atomic_load(&scene->turns[page]);
    CHECK((turn & 1) == (at & 1));
    for (uint64_t i = stamp % 4; i; i--)
        sched_yield();
    CHECK(atomic_load(&scene->turns[page]) == turn);
    CHECK(vu_chain_write(scene->queue, chain, 0, &stamp, sizeof stamp) == sizeof stamp);
}

static void *serve_ring(void *argument)
{
    struct scene *scene = argument;
    vu_chain *chains[4];
    uint32_t lengths[4] = {8, 8, 8, 8};
    uint64_t stamp = 0;
    while (!atomic_load(&scene->over)) {
        int popped = vu_queue_pop(scene->queue, chains, 4);
        CHECK(popped >= 0);
        for (int i = 0; i < popped; i++)
            use(scene, chains[i], stamp++);
        if (popped)
            CHECK(vu_queue_push(scene->queue, chains, lengths, (uint32_t)popped) == 0);
        else
            sched_yield();
    }
    return NULL;
}

static void offer(struct scene *scene)
{
    vu_returned taken[SIZE];
    for (int got; (got = vu_driver_take_many(scene->driver, taken, SIZE)) > 0;)
        scene->served += (uint64_t)got;
    for (;;) {
        vu_buffer buffer = {BUFFERS + below(PAGES) * 4096 + below(4000), 8, 1};
        if (vu_driver_add(scene->driver, &buffer, 1) < 0)
            break;
    }
    vu_driver_publish(scene->driver);
}

/* As the control thread does, which halts the ring where we wait. */
static void take_back(struct scene *scene, uint32_t page)
{
    uint64_t iova = BUFFERS + page * 4096;
    CHECK(vu_iotlb_invalidate(scene->iotlb, iova, 4096) == 0);
    while (vu_queue_uses(scene->queue, iova, 4096))
        sched_yield();
    atomic_fetch_add(&scene->turns[page], 1);
}

static void answer_questions(struct scene *scene)
{
    struct vu_iotlb_question questions[8];
    uint32_t count = vu_iotlb_take(scene->iotlb, questions, 8);
    for (uint32_t i = 0; i < count; i++)
        map_page(scene, (uint32_t)((questions[i].iova - BUFFERS) / 4096));
}

static void open_scene(struct scene *scene, uint32_t flags)
{
    int error;
    open_guest(&scene->guest);
    CHECK(scene->iotlb = vu_iotlb_new(1, &error));
    CHECK(scene->driver = vu_driver_new(scene->guest.map, 0, SIZE, flags, &error));
    CHECK(vu_iotlb_update(scene->iotlb, scene->guest.map, 0, NEAR_SIZE, USER, 3) == 0);
    struct vu_ring ring = {.size = SIZE, .flags = flags & VU_DRIVER_PACKED ? VU_RING_PACKED : 0};
    ring.base = flags & VU_DRIVER_PACKED ? 0x80008000 : 0;
    ring.desc = vu_driver_desc(scene->driver);
    ring.avail = vu_driver_avail(scene->driver);
    ring.used = vu_driver_used(scene->driver);
    CHECK(scene->queue = vu_queue_new(scene->guest.map, &ring, NULL, NULL, scene->iotlb, &error));
}

static void run(uint32_t flags, uint32_t rounds)
{
    struct scene scene = {0};
    pthread_t thread;
    open_scene(&scene, flags);
    CHECK(pthread_create(&thread, NULL, serve_ring, &scene) == 0);
    for (uint32_t round = 0; round < rounds || scene.served < rounds; round++) {
        offer(&scene);
        answer_questions(&scene);
        take_back(&scene, (uint32_t)(round % PAGES));
    }
    atomic_store(&scene.over, true);
    pthread_join(thread, NULL);
    vu_queue_free(scene.queue);
    vu_driver_free(scene.driver);
    vu_iotlb_put(scene.iotlb);
    close_guest(&scene.guest);
}

int main(int count, char **words)
{
    CHECK(count == 3);
    state = strtoull(words[1], NULL, 0);
    run(0, (uint32_t)strtoul(words[2], NULL, 0));
    run(VU_DRIVER_PACKED, (uint32_t)strtoul(words[2], NULL, 0));
    puts("ok");
    return 0;
}
