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

enum { BYTES = VU_MAILBOX_SLOTS * VU_MAILBOX_SLOT };

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

/* Slots for as many of the frames as there is room for: how many, and in *first where they begin. */
static uint32_t reserve(struct vu_mailbox *box, const struct vu_frame *frames, uint32_t count, uint64_t *first)
{
    uint64_t tail = atomic_load_explicit(&box->tail, memory_order_relaxed);
    for (;;) {
        uint64_t limit = atomic_load_explicit(&box->head, memory_order_acquire) + VU_MAILBOX_SLOTS, end = tail;
        uint32_t n = 0;
        while (n < count && end + slots_for(frames[n].length) <= limit)
            end += slots_for(frames[n++].length);
        *first = tail;
        if (!n || atomic_compare_exchange_weak_explicit(&box->tail, &tail, end, memory_order_relaxed, memory_order_relaxed))
            return n;
    }
}

/* The fence pairs with the one in arm: either the sender sees that the receiver sleeps, or that sees the frame.
 * noinline: where it is inlined gcc warns that ThreadSanitizer does not know fences. */
__attribute__((noinline)) static void rouse(struct vu_mailbox *box)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&box->asleep, memory_order_relaxed) && atomic_exchange(&box->asleep, false))
        eventfd_write(box->event, 1);
}

static void seal(struct vu_mailbox *box, uint64_t slot, const struct vu_frame *frame)
{
    struct vu_mail *mail = mail_of(box, slot);
    mail->length = frame->length;
    mail->slots = slots_for(frame->length);
    mail->header = frame->header;
    atomic_store_explicit(&mail->turn, slot + 1, memory_order_release);
}

/* Frames are in memory of ours already: nothing keeps a sender between its reservation and the turns, which others that
 * send to this box, and the one who receives from it, wait for. */
bool vu_mailbox_put(struct vu_mailbox *box, const struct vu_frame *frames, uint32_t count)
{
    uint64_t slot;
    uint32_t n = reserve(box, frames, count, &slot);
    for (uint32_t i = 0; i < n; slot += slots_for(frames[i++].length)) {
        memcpy(bytes_of(box, slot), frames[i].bytes, frames[i].length);
        seal(box, slot, &frames[i]);
    }
    if (n < count)
        atomic_fetch_add_explicit(&box->full, count - n, memory_order_relaxed);
    if (n)
        rouse(box);
    return n == count;
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
        frames[count++] = (struct vu_frame){mail->header, bytes_of(box, slot), mail->length};
    }
    return count;
}

void vu_mailbox_take(struct vu_mailbox *box, uint32_t count)
{
    uint64_t slot = atomic_load_explicit(&box->head, memory_order_relaxed);
    while (count--)
        slot += mail_of(box, slot)->slots;
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
