/*
 * The mailbox between threads as a plain program, for the sanitizers.
 *
 *     mailbox SEED
 *
 * Threads fill one mailbox while another empties it: nothing is lost, torn or out of order; and one that is kept from its
 * guest's memory keeps nobody else. Exit status 0, or a line on stderr and 1.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "mailbox.h"

enum { SENDERS = 3, FRAMES = 20000 };

struct sender {
    struct vu_mailbox *box;
    uint32_t number;
    uint64_t seed;
};

/* Waits for its turn rather than lose frames, so that the receiver can tell that none is missing. */
static bool has_room(struct vu_mailbox *box)
{
    return atomic_load(&box->tail) - atomic_load(&box->head) < VU_MAILBOX_SLOTS / 2;
}

static void *send_all(void *of)
{
    struct sender *sender = of;
    uint32_t words[512];
    uint64_t dice = sender->seed;
    for (uint32_t n = 0; n < FRAMES;) {
        if (!has_room(sender->box)) {
            sched_yield();
            continue;
        }
        dice = dice * UINT64_C(6364136223846793005) + 1;
        uint32_t length = 8 + 4 * (uint32_t)(dice >> 33) % 500 / 4 * 4;
        for (uint32_t i = 0; i < length / 4; i++)
            words[i] = i == 0 ? sender->number : n;
        struct vu_frame frame = {.bytes = (uint8_t *)words, .length = length};
        CHECK(vu_mailbox_put(sender->box, &frame, 1));
        n++;
    }
    return NULL;
}

static void receive_all(struct vu_mailbox *box)
{
    uint32_t next[SENDERS] = {0}, total = 0;
    struct vu_frame frames[VU_NET_BATCH];
    while (total < SENDERS * FRAMES) {
        uint32_t count = vu_mailbox_look(box, frames, 1 + (uint32_t)below(VU_NET_BATCH));
        for (uint32_t i = 0; i < count; i++) {
            uint32_t words[512];
            memcpy(words, frames[i].bytes, frames[i].length);
            CHECK(words[0] < SENDERS);
            for (uint32_t n = 1; n < frames[i].length / 4; n++)
                CHECK(words[n] == next[words[0]]);
            next[words[0]]++;
        }
        vu_mailbox_take(box, count);
        total += count;
        struct pollfd fd = {.fd = box->event, .events = POLLIN};
        if (!count && !vu_mailbox_arm(box)) {
            CHECK(poll(&fd, 1, 60000) == 1); /* a lost wake-up would be seen here */
            vu_mailbox_woken(box);
        }
    }
    CHECK(atomic_load(&box->full) == 0);
}

/* ThreadSanitizer keeps signals back, also those that a thread cannot go on without. */
#ifdef __has_feature
#define KEEPS_SIGNALS __has_feature(thread_sanitizer)
#elif defined(__SANITIZE_THREAD__)
#define KEEPS_SIGNALS 1
#else
#define KEEPS_SIGNALS 0
#endif

/* While a sender is kept from its guest's memory, by a page that is not there, others send and the receiver receives. */
static vu_hub *slow_hub;
static uint8_t *slow_page;

static void receive_one(uint8_t first)
{
    vu_end *port = vu_hub_port(slow_hub, 1);
    struct vu_frame found[2];
    CHECK(port->kind->look(port, 0, found, 2) == 1 && found[0].length == 100 && found[0].bytes[6] == first);
    port->kind->take(port, 0, 1);
}

static void meanwhile(int number, siginfo_t *info, void *context)
{
    static const uint8_t frame[100] = {[6] = 2};
    (void)context;
    if (info->si_addr != slow_page) {
        signal(number, SIG_DFL);
        return;
    }
    CHECK(vu_end_inject(vu_hub_port(slow_hub, 2), frame, sizeof frame));
    receive_one(2);
    CHECK(mprotect(slow_page, 4096, PROT_READ) == 0);
}

static void kept_sender(void)
{
    struct sigaction action = {.sa_sigaction = meanwhile, .sa_flags = SA_SIGINFO};
    int error;
    slow_page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(slow_page != MAP_FAILED && sigaction(SIGSEGV, &action, NULL) == 0);
    vu_map *map = vu_map_new(NULL, 0, &error); /* puts the guard's handler on top */
    CHECK(map && (slow_hub = vu_hub_new(3, 1, VU_HUB_LEARN, 300, &error)));
    vu_segment segment = {slow_page, 100, 0};
    struct vu_packet packet = {.ether = {[6] = 4}, .drop = VU_DROP_NONE, .count = 1, .length = 100, .segments = &segment};
    vu_end *from = vu_hub_port(slow_hub, 0);
    CHECK(from->kind->send(from, 0, map, &packet, 1) == 1 && packet.drop == VU_DROP_NONE);
    receive_one(4);
    vu_hub_free(slow_hub);
    vu_map_put(map);
    munmap(slow_page, 4096);
}

static void crowd(void)
{
    static struct vu_mailbox box;
    struct sender senders[SENDERS];
    pthread_t threads[SENDERS];
    CHECK(vu_mailbox_open(&box) == 0);
    for (uint32_t i = 0; i < SENDERS; i++) {
        senders[i] = (struct sender){&box, i, any()};
        CHECK(pthread_create(&threads[i], NULL, send_all, &senders[i]) == 0);
    }
    receive_all(&box);
    for (uint32_t i = 0; i < SENDERS; i++)
        pthread_join(threads[i], NULL);
    vu_mailbox_close(&box);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    state = strtoull(argv[1], NULL, 0) | 1;
    if (!KEEPS_SIGNALS)
        kept_sender();
    crowd();
    puts("ok");
    return 0;
}
