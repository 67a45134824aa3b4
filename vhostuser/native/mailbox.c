/*
 * Frames between threads.
 *
 * What belongs here: a ring of frames in memory of ours, without a lock: senders copy, reserve slots by moving the tail,
 * fill them, and say so in the slot's turn; the receiver takes what is whole, in order, and moves the head. What does not:
 * who sends to whom (hub.c).
 *
 * Turns and lengths are beside the bytes and not among them: what a guest puts into a frame is never taken for either.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mailbox.h"

enum {
    BYTES = VU_MAILBOX_SLOTS * VU_MAILBOX_SLOT,
    COPIES = 16384, /* bytes copied out of guest memory at once, or one frame: the nearest cache holds them */
};

static uint32_t slots_for(uint32_t length)
{
    return (length + VU_MAILBOX_SLOT - 1) / VU_MAILBOX_SLOT;
}

static uint8_t *bytes_of(const struct vu_mailbox *box, uint64_t slot)
{
    return box->bytes + (slot & (VU_MAILBOX_SLOTS - 1)) * VU_MAILBOX_SLOT;
}

static struct vu_mail *mail_of(const struct vu_mailbox *box, uint64_t slot)
{
    return &box->mail[slot & (VU_MAILBOX_SLOTS - 1)];
}

static bool whole(const struct vu_mailbox *box, uint64_t slot)
{
    return atomic_load_explicit(&mail_of(box, slot)->turn, memory_order_acquire) == slot + 1;
}

/* ---- life ---------------------------------------------------------------------------------------------------------------- */

static uint8_t *map_twice(void)
{
    int fd = memfd_create("frames", MFD_CLOEXEC);
    uint8_t *at = fd < 0 ? MAP_FAILED : mmap(NULL, 2 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool mapped = at != MAP_FAILED && ftruncate(fd, BYTES) == 0;
    for (int i = 0; mapped && i < 2; i++)
        mapped = mmap(at + i * BYTES, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
    int error = errno;
    if (fd >= 0)
        close(fd);
    if (!mapped && at != MAP_FAILED)
        munmap(at, 2 * BYTES);
    errno = error;
    return mapped ? at : NULL;
}

int vu_mailbox_open(struct vu_mailbox *box)
{
    memset(box, 0, sizeof *box);
    box->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    box->bytes = map_twice();
    if (box->event < 0 || !box->bytes)
        return VU_E_SYS;
    box->mail = calloc(VU_MAILBOX_SLOTS, sizeof *box->mail);
    return box->mail ? 0 : VU_E_NOMEM;
}

void vu_mailbox_close(struct vu_mailbox *box)
{
    if (box->bytes)
        munmap(box->bytes, 2 * BYTES);
    if (box->event >= 0)
        close(box->event);
    free(box->mail);
}

/* ---- senders --------------------------------------------------------------------------------------------------------------- */

/* Slots for as many of the packets as there is room for: how many, and in *first where they begin. */
static uint32_t reserve(struct vu_mailbox *box, const struct vu_packet *packets, uint32_t count, uint64_t *first)
{
    uint64_t tail = atomic_load_explicit(&box->tail, memory_order_relaxed);
    for (;;) {
        uint64_t limit = atomic_load_explicit(&box->head, memory_order_acquire) + VU_MAILBOX_SLOTS, end = tail;
        uint32_t n = 0;
        while (n < count && end + slots_for(packets[n].length) <= limit)
            end += slots_for(packets[n++].length);
        *first = tail;
        if (!n || atomic_compare_exchange_weak_explicit(&box->tail, &tail, end, memory_order_relaxed, memory_order_relaxed))
            return n;
    }
}

/* The fence pairs with the one in arm: either the sender sees that the receiver sleeps, or that sees the frame. */
static void rouse(struct vu_mailbox *box)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&box->asleep, memory_order_relaxed) && atomic_exchange(&box->asleep, false))
        eventfd_write(box->event, 1);
}

static void seal(struct vu_mailbox *box, uint64_t slot, const struct virtio_net_hdr *header, uint32_t length, uint32_t slots)
{
    struct vu_mail *mail = mail_of(box, slot);
    mail->length = length;
    mail->slots = slots;
    mail->header = *header;
    atomic_store_explicit(&mail->turn, slot + 1, memory_order_release);
}

/* Into slots that are reserved only now: whatever keeps a sender from guest memory, others that send to this box and the
 * one who receives from it are not kept. */
static void deliver(struct vu_mailbox *box, const struct vu_packet *packets, uint8_t *const *from, uint32_t count)
{
    uint64_t slot;
    uint32_t n = reserve(box, packets, count, &slot);
    for (uint32_t i = 0; i < n; slot += slots_for(packets[i++].length)) {
        bool lost = packets[i].drop != VU_DROP_NONE;
        if (!lost)
            memcpy(bytes_of(box, slot), from[i], packets[i].length);
        seal(box, slot, &packets[i].header, lost ? 0 : packets[i].length, slots_for(packets[i].length));
    }
    if (n < count)
        atomic_fetch_add_explicit(&box->full, count - n, memory_order_relaxed);
    if (n)
        rouse(box);
}

void vu_mailbox_put(struct vu_mailbox *box, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    uint8_t copies[VU_NET_FRAME_MOST], *to[VU_NET_BATCH];
    for (uint32_t n; count; packets += n, count -= n) {
        uint32_t used = 0;
        for (n = 0; n < count && n < VU_NET_BATCH && (!n || used + packets[n].length <= COPIES); used += packets[n++].length)
            to[n] = copies + used;
        vu_packets_copy(map, packets, to, n);
        deliver(box, packets, to, n);
    }
}

bool vu_mailbox_put_own(struct vu_mailbox *box, const uint8_t *bytes, uint32_t length)
{
    struct vu_packet packet = {.length = length};
    uint64_t slot;
    if (!reserve(box, &packet, 1, &slot))
        return false;
    memcpy(bytes_of(box, slot), bytes, length);
    seal(box, slot, &packet.header, length, slots_for(length));
    rouse(box);
    return true;
}

/* ---- the receiver ------------------------------------------------------------------------------------------------------------ */

static void free_up_to(struct vu_mailbox *box, uint64_t slot)
{
    atomic_store_explicit(&box->head, slot, memory_order_release);
}

uint32_t vu_mailbox_look(struct vu_mailbox *box, struct vu_frame *frames, uint32_t max)
{
    uint64_t slot = atomic_load_explicit(&box->head, memory_order_relaxed);
    uint32_t count = 0;
    for (; count < max && whole(box, slot); slot += mail_of(box, slot)->slots) {
        const struct vu_mail *mail = mail_of(box, slot);
        if (mail->length)
            frames[count++] = (struct vu_frame){mail->header, bytes_of(box, slot), mail->length};
    }
    if (!count)
        free_up_to(box, slot); /* lost frames alone */
    return count;
}

void vu_mailbox_take(struct vu_mailbox *box, uint32_t count)
{
    uint64_t slot = atomic_load_explicit(&box->head, memory_order_relaxed);
    for (; count; slot += mail_of(box, slot)->slots)
        count -= mail_of(box, slot)->length != 0;
    free_up_to(box, slot);
}

bool vu_mailbox_arm(struct vu_mailbox *box)
{
    atomic_store_explicit(&box->asleep, true, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (!whole(box, atomic_load_explicit(&box->head, memory_order_relaxed)))
        return false;
    vu_mailbox_woken(box);
    return true;
}

/* A sender that has found us asleep writes the event, before or after we look: then it wakes us once for nothing. */
void vu_mailbox_woken(struct vu_mailbox *box)
{
    eventfd_t seen;
    if (!atomic_exchange(&box->asleep, false))
        eventfd_read(box->event, &seen);
}

void vu_mailbox_flush(struct vu_mailbox *box)
{
    uint64_t slot = atomic_load_explicit(&box->head, memory_order_relaxed);
    while (whole(box, slot))
        slot += mail_of(box, slot)->slots;
    free_up_to(box, slot);
}
