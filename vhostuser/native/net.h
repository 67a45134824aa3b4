/*
 * The inside of the network engine: what its rings (net_transmit.c, net_receive.c), the rules for frames (net.c) and the
 * ends (end_*.c) share.
 *
 * Directions are the guest's: it transmits to the end and receives from it.
 */
#ifndef VHOSTUSER_NET_H
#define VHOSTUSER_NET_H

#include <linux/virtio_net.h>

#include "engine.h"

enum {
    VU_NET_HEADER = sizeof(struct virtio_net_hdr), /* without num_buffers, which only stands between us and the guest */
    VU_NET_ETHER = VU_FRAME_LEAST,
    VU_NET_VERSION_1 = 32, /* the feature bit VIRTIO_F_VERSION_1 */
    VU_NET_FRAME_MOST = VU_FRAME_MOST,
    VU_NET_VECTORS = 1024,                        /* the kernel's UIO_MAXIOV */
    VU_NET_BATCH = 64,                            /* frames moved at once */
    VU_NET_HELD = 1024,                           /* chains that a ring's thread has at once; a power of two */
    VU_NET_COUNTERS = sizeof(struct vu_net_stats) / sizeof(uint64_t),
};

#define VU_NET_COUNTER(name) (offsetof(struct vu_net_stats, name) / sizeof(uint64_t))

/* Why a frame was dropped, in the order of the counters behind dropped_header. */
enum vu_drop {
    VU_DROP_HEADER,
    VU_DROP_RUNT,
    VU_DROP_OVERSIZE,
    VU_DROP_CHECKSUM,
    VU_DROP_SEGMENTATION,
    VU_DROP_FAULT,
    VU_DROP_REFUSED,
    VU_DROP_FULL,
    VU_DROP_ROOM,
    VU_DROPS,
    VU_DROP_NONE = VU_DROPS,
};

/* A frame on its way from the guest, judged. Its bytes are still guest memory, which may change or go at any time. */
struct vu_packet {
    struct virtio_net_hdr header;  /* ours */
    uint8_t ether[VU_NET_ETHER];   /* ours: the frame's first bytes as they were when it was judged */
    uint8_t drop;                  /* of the end: VU_DROP_NONE, or why it did not take the frame */
    uint16_t chain;                /* of the transmitter: which of the chains it came in */
    uint32_t count;                /* segments */
    uint32_t skip;                 /* bytes of segments[0] in front of the frame: less than its length */
    uint32_t length;               /* bytes of the frame */
    const vu_segment *segments;
};

/* A frame on its way to the guest, in memory of the end. */
struct vu_frame {
    struct virtio_net_hdr header;
    uint8_t *bytes;
    uint32_t length;
};

/* What an end does. Of each pair one thread receives and one thread sends, both at once; and any thread may inject. */
struct vu_end_kind {
    /* The frames that are there, the oldest first: how many. They stay until they are taken. Never blocks. */
    uint32_t (*look)(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max);
    /* The first `count` of those are done with. */
    void (*take)(vu_end *end, uint32_t pair, uint32_t count);
    /* The receiver is about to sleep on its descriptor: true if a frame has come meanwhile. After the sleep, woken. */
    bool (*arm)(vu_end *end, uint32_t pair);
    void (*woken)(vu_end *end, uint32_t pair);
    /* Readable when a frame has come; -1: frames never come, or always are there. */
    int (*receive_fd)(const vu_end *end, uint32_t pair);
    /* Frames for this pair that were lost for want of room, since last asked. From any thread. */
    uint64_t (*lost)(vu_end *end, uint32_t pair);
    /* A thread receives for the pair from here on, or no longer. */
    void (*attend)(vu_end *end, uint32_t pair, bool on);
    /* Sends frames, in their order: how many were taken, dropped ones among them; fewer where there is no room now. */
    uint32_t (*send)(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count);
    /* Something of what was taken is still to be sent: call send again when there is room, be it for no frame. */
    bool (*unsent)(vu_end *end, uint32_t pair);
    /* What tells that there is room again; fd -1: send takes everything. */
    struct pollfd (*room)(const vu_end *end, uint32_t pair);
    /* A frame of our own, without offloads: false if it was not taken. Never blocks. */
    bool (*inject)(vu_end *end, const uint8_t *bytes, uint32_t length);
    /* What the guest's driver accepts from here on. */
    int (*accept)(vu_end *end, uint64_t features);
    /* Forgets frames that are there. Nobody receives meanwhile. */
    void (*flush)(vu_end *end);
    void (*free)(vu_end *end);
};

/* For kinds that have nothing to do there. */
bool vu_end_never_arms(vu_end *end, uint32_t pair);
void vu_end_is_woken(vu_end *end, uint32_t pair);
int vu_end_has_no_receive_fd(const vu_end *end, uint32_t pair);
uint64_t vu_end_loses_none(vu_end *end, uint32_t pair);
void vu_end_is_attended(vu_end *end, uint32_t pair, bool on);
bool vu_end_sends_at_once(vu_end *end, uint32_t pair);
struct pollfd vu_end_has_room(const vu_end *end, uint32_t pair);
int vu_end_accepts_all(vu_end *end, uint64_t features);
void vu_end_flushes_none(vu_end *end);
void vu_end_flushes_what_comes(vu_end *end); /* of one pair */
void vu_end_is_memory(vu_end *end); /* and nothing else: frees that */

struct vu_end {
    const struct vu_end_kind *kind;
    uint32_t pairs;
};

struct vu_net {
    struct vu_net_config config;
    uint32_t header; /* bytes in front of each frame in guest memory: 10 or 12 */
    _Atomic uint32_t most; /* bytes of a frame to the guest that is no segment */
    bool mergeable;
    _Atomic uint64_t (*counters)[VU_NET_COUNTERS]; /* of each ring, in the order of struct vu_net_stats */
};

static inline bool vu_net_has(const vu_net *net, unsigned feature)
{
    return net->config.features >> feature & 1;
}

/* ---- frames cut into segments (net_cut.c) --------------------------------------------------------------------------- */

/* Of one frame. Places are bytes from its beginning. */
struct vu_cut {
    uint32_t network, transport; /* where these headers begin */
    uint32_t headers;            /* and where they end: each segment begins with them */
    uint32_t size, count;        /* bytes of payload in each but the last, and segments */
    bool ipv6, udp;
};

/* False if the frame's headers do not say how, or contradict each other. */
bool vu_cut_plan(const struct vu_frame *frame, struct vu_cut *cut);
/* Segment n of those, which leaves its checksum to the receiver, made at `to`: bytes for the headers and `size`. */
void vu_cut_segment(const struct vu_frame *frame, const struct vu_cut *cut, uint32_t n, uint8_t *to,
                    struct vu_frame *segment);

/* ---- rules for frames (net.c) -------------------------------------------------------------------------------------- */

/* Reads the header of what the guest transmits, and judges it: VU_DROP_NONE, or why it is dropped. Inside a guard. */
enum vu_drop vu_net_parse(const vu_net *net, const vu_chain *chain, struct vu_packet *packet);
/* Why a frame cannot be made into one that the guest's driver accepts, or VU_DROP_NONE. Changes nothing. */
enum vu_drop vu_net_refuse(const vu_net *net, const struct vu_frame *frame);
/* Whether it has to be cut into segments for that driver, and can be: how, in *cut. */
bool vu_net_cuts(const vu_net *net, const struct vu_frame *frame, struct vu_cut *cut);
/* Makes it into one. Once only, just before it is filled in: the bytes are the end's, and there once more for the next
 * look as long as they are not taken. */
void vu_net_fit(const vu_net *net, struct vu_frame *frame);
/* The Internet checksum (RFC 1071) of bytes, of which the first two are one word. */
uint16_t vu_internet_checksum(const uint8_t *bytes, uint32_t length);
/* Adds the tally to the ring's counters, and clears it. */
void vu_net_settle(vu_net *net, uint32_t ring, struct vu_net_stats *tally);
static inline void vu_net_count_drop(struct vu_net_stats *tally, enum vu_drop why)
{
    ((uint64_t *)tally)[VU_NET_COUNTER(dropped_header) + why]++;
}

/* ---- chains that a thread has taken and not yet used (net_held.c) --------------------------------------------------- */

/* In the order in which they were taken, and used in that order too: nothing else can be given back at a stop. */
struct vu_held {
    uint32_t first, count;
    uint32_t ready; /* how many of them, from the first on, have all their pages */
    vu_chain *chains[VU_NET_HELD];
};

static inline vu_chain *vu_held_at(const struct vu_held *held, uint32_t n)
{
    return held->chains[(held->first + n) & (VU_NET_HELD - 1)];
}

/* Takes more, at most so many, and those whose pages have come: how many of both, or a negative code. [touches] */
int vu_held_fill(struct vu_held *held, struct vu_engine *engine, uint32_t most);
/* Forgets the first n, which have been returned. */
void vu_held_drop(struct vu_held *held, uint32_t n);
/* Gives back all that are left. [touches] */
int vu_held_give_back(struct vu_held *held, vu_queue *queue);

/* ---- for ends (end.c) ------------------------------------------------------------------------------------------------ */

/* Copies each packet out of guest memory to where `to` says; a packet that is gone is marked as dropped. [touches] */
void vu_packets_copy(const vu_map *map, struct vu_packet *packets, uint8_t *const *to, uint32_t count);

/* Of one sender: a packet as one system call takes it. */
struct vu_gathered {
    struct iovec iov[VU_NET_VECTORS];
    uint8_t copy[VU_NET_FRAME_MOST]; /* of a packet in more pieces */
};

/* Vectors of a packet's bytes, from number `first` on: the count with those before; or -1 and EFAULT, as a system call says
 * it that finds memory lost. [touches] */
int vu_packet_gather(const vu_map *map, struct vu_packet *packet, struct vu_gathered *gathered, int first);

/* Of one receiver: frames that were read from a descriptor which keeps them apart, and are not taken. They are read into
 * memory of ours: their length is not known before, so that guest buffers for the longest would have to be held ready for
 * every read, and none of them may be missing. */
struct vu_inbox {
    uint32_t first, count;
    struct vu_frame frames[VU_NET_BATCH];
    uint8_t received[4 * VU_NET_FRAME_MOST];
};

/* Reads a frame to frame->bytes: false if none is there. Of a longer one than VU_NET_FRAME_MOST the beginning, and
 * frame->length says so. */
typedef bool vu_read_frame(void *of, struct vu_frame *frame);
/* As look and take of an end. */
uint32_t vu_inbox_look(struct vu_inbox *inbox, vu_read_frame *read_frame, void *of, struct vu_frame *frames, uint32_t max);
void vu_inbox_take(struct vu_inbox *inbox, uint32_t count);

#endif
