/*
 * Frames between threads: any number put some in, one takes them out, nobody waits for anybody (mailbox.c).
 */
#ifndef VHOSTUSER_MAILBOX_H
#define VHOSTUSER_MAILBOX_H

#include "net.h"

enum {
    VU_MAILBOX_SLOT = 256,   /* bytes: a frame takes as many neighbouring slots as it needs */
    VU_MAILBOX_SLOTS = 4096, /* a power of two: 15 of the longest frames, or 4096 short ones */
};

/* What is known of the frame that begins in a slot. */
struct vu_mail {
    _Atomic uint64_t turn; /* one more than the slot's number, counted from the beginning, once the frame is whole */
    uint32_t length;       /* bytes, at least one */
    uint32_t slots;
    struct virtio_net_hdr header;
};

struct vu_mailbox {
    uint8_t *bytes; /* mapped twice, one behind the other, so that every frame is in one piece */
    struct vu_mail *mail;
    int event;            /* readable when a frame has come for one who sleeps */
    _Atomic bool attended;
    _Atomic uint64_t full; /* frames that there was no room for */
    _Alignas(64) _Atomic uint64_t head; /* of the receiver: slots before it are free */
    _Atomic bool asleep;
    _Alignas(64) _Atomic uint64_t tail; /* of the senders: slots from it on are free */
};

/* 0, VU_E_NOMEM or VU_E_SYS. */
int vu_mailbox_open(struct vu_mailbox *box);
void vu_mailbox_close(struct vu_mailbox *box);

/* From any thread, never waiting. What there is no room for is counted and gone: false if that was so. */
bool vu_mailbox_put(struct vu_mailbox *box, const struct vu_frame *frames, uint32_t count);

/* By the receiver: as the functions of struct vu_end_kind. */
uint32_t vu_mailbox_look(struct vu_mailbox *box, struct vu_frame *frames, uint32_t max);
void vu_mailbox_take(struct vu_mailbox *box, uint32_t count);
bool vu_mailbox_arm(struct vu_mailbox *box);
void vu_mailbox_woken(struct vu_mailbox *box);
void vu_mailbox_flush(struct vu_mailbox *box);

#endif
