/*
 * The virtio-net engine: which frames may pass, and the engine's own life.
 *
 * What belongs here: the header in front of a frame (virtio 1.3, 5.1.6), judged against what was negotiated; what a frame
 * needs to be accepted by a driver that negotiated less. What does not: the threads of the rings (net_transmit.c,
 * net_receive.c), where frames go (end.c and the files of the ends).
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "net.h"

/* Newer than the headers of some distributions (virtio 1.3, 5.1.3 and 5.1.6). */
#ifndef VIRTIO_NET_F_HOST_USO
#define VIRTIO_NET_F_GUEST_USO4 54
#define VIRTIO_NET_F_GUEST_USO6 55
#define VIRTIO_NET_F_HOST_USO 56
#endif
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

/* ---- what the guest transmits ------------------------------------------------------------------------------------- */

static void load_pieces(const vu_segment *segment, uint64_t offset, uint8_t *to, uint64_t length)
{
    for (; offset >= segment->length; segment++)
        offset -= segment->length;
    while (length) {
        uint64_t part = vu_least(segment->length - offset, length);
        memcpy(to, segment->host + offset, part);
        to += part;
        length -= part;
        offset = 0;
        segment++;
    }
}

/* Of a length that the compiler knows, which needs no call where it is in one piece. What is judged is what was loaded:
 * the fence keeps the compiler from loading it a second time. */
static inline void load(const vu_segment *segment, uint64_t offset, uint8_t *to, uint64_t length)
{
    if (segment->length >= offset + length)
        memcpy(to, segment->host + offset, length);
    else
        load_pieces(segment, offset, to, length);
    atomic_signal_fence(memory_order_seq_cst);
}

/* Where the frame begins, behind the header. */
static void locate(const vu_net *net, const vu_chain *chain, struct vu_packet *packet)
{
    const vu_segment *segment = chain->segments;
    uint64_t skip = net->header;
    for (; skip >= segment->length; segment++)
        skip -= segment->length;
    packet->segments = segment;
    packet->skip = (uint32_t)skip;
    packet->count = chain->readable_count - (uint32_t)(segment - chain->segments);
    packet->length = (uint32_t)(chain->readable - net->header);
}

/* 5.1.6.2: the offset must be inside of the frame, and so must the two bytes that are filled in. */
static bool checksum_fits(const struct virtio_net_hdr *header, uint32_t length)
{
    uint32_t start = le16toh(header->csum_start), offset = le16toh(header->csum_offset);
    return start >= VU_NET_ETHER && start + offset + 2 <= length;
}

static bool sends_kind(const vu_net *net, uint8_t kind)
{
    if (kind & VIRTIO_NET_HDR_GSO_ECN && !vu_net_has(net, VIRTIO_NET_F_HOST_ECN))
        return false;
    switch (kind & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return vu_net_has(net, VIRTIO_NET_F_HOST_TSO4);
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return vu_net_has(net, VIRTIO_NET_F_HOST_TSO6);
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        return kind == VIRTIO_NET_HDR_GSO_UDP_L4 && vu_net_has(net, VIRTIO_NET_F_HOST_USO);
    default:
        return false;
    }
}

/* What of the header matters to whoever gets the frame; the rest is cleared. */
static enum vu_drop judge(const vu_net *net, struct virtio_net_hdr *header, uint32_t length)
{
    struct virtio_net_hdr clean = {.flags = header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM};
    if (clean.flags) {
        if (!vu_net_has(net, VIRTIO_NET_F_CSUM) || !checksum_fits(header, length))
            return VU_DROP_CHECKSUM;
        clean.csum_start = header->csum_start;
        clean.csum_offset = header->csum_offset;
    }
    if (header->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
        /* 5.1.6.2: segments are made of a frame whose checksum is left to the device. hdr_len is a hint, no more: what
         * comes with the checksum's place is behind all headers but the transport's own. */
        if (!clean.flags || !header->gso_size || !sends_kind(net, header->gso_type))
            return VU_DROP_SEGMENTATION;
        clean.gso_type = header->gso_type;
        clean.gso_size = header->gso_size;
        clean.hdr_len = le16toh(header->hdr_len) <= length ? header->hdr_len : 0;
    }
    *header = clean;
    return VU_DROP_NONE;
}

enum vu_drop vu_net_parse(const vu_net *net, const vu_chain *chain, struct vu_packet *packet)
{
    packet->drop = VU_DROP_NONE;
    if (chain->fault)
        return VU_DROP_FAULT;
    if (chain->readable < net->header)
        return VU_DROP_HEADER;
    if (chain->readable < net->header + VU_NET_ETHER)
        return VU_DROP_RUNT;
    if (chain->readable > net->header + VU_NET_FRAME_MOST)
        return VU_DROP_OVERSIZE;
    locate(net, chain, packet);
    load(chain->segments, 0, (uint8_t *)&packet->header, VU_NET_HEADER);
    load(packet->segments, packet->skip, packet->ether, VU_NET_ETHER);
    return judge(net, &packet->header, packet->length);
}

/* ---- what the guest receives --------------------------------------------------------------------------------------- */

/* In words of four bytes, which comes to the same: the halves are added up at the end. */
uint16_t vu_internet_checksum(const uint8_t *bytes, uint32_t length)
{
    uint64_t sum = 0;
    uint32_t word;
    for (; length >= sizeof word; bytes += sizeof word, length -= sizeof word) {
        memcpy(&word, bytes, sizeof word);
        sum += word;
    }
    word = 0;
    memcpy(&word, bytes, length);
    sum += word;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

/* Where the checksum goes. */
static uint32_t checksum_at(const struct vu_frame *frame)
{
    return (uint32_t)le16toh(frame->header.csum_start) + le16toh(frame->header.csum_offset);
}

static void complete_checksum(struct vu_frame *frame)
{
    uint32_t start = le16toh(frame->header.csum_start);
    uint16_t sum = vu_internet_checksum(frame->bytes + start, frame->length - start);
    sum = sum ? sum : 0xffff; /* in UDP zero means that there is none, to TCP both are the same */
    memcpy(frame->bytes + checksum_at(frame), &sum, 2);
}

static bool needs_checksum(const vu_net *net, const struct vu_frame *frame)
{
    return frame->header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && !vu_net_has(net, VIRTIO_NET_F_GUEST_CSUM);
}

static bool takes_kind(const vu_net *net, const struct vu_frame *frame)
{
    uint8_t kind = frame->header.gso_type;
    if (kind & VIRTIO_NET_HDR_GSO_ECN && !vu_net_has(net, VIRTIO_NET_F_GUEST_ECN))
        return false;
    switch (kind & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return vu_net_has(net, VIRTIO_NET_F_GUEST_TSO4);
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return vu_net_has(net, VIRTIO_NET_F_GUEST_TSO6);
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        /* Which of the two it is only the frame tells; drivers take both or none. */
        return vu_net_has(net, VIRTIO_NET_F_GUEST_USO4) && vu_net_has(net, VIRTIO_NET_F_GUEST_USO6);
    default:
        return false;
    }
}

bool vu_net_cuts(const vu_net *net, const struct vu_frame *frame, struct vu_cut *cut)
{
    return frame->header.gso_type != VIRTIO_NET_HDR_GSO_NONE && !takes_kind(net, frame) && vu_cut_plan(frame, cut);
}

enum vu_drop vu_net_refuse(const vu_net *net, const struct vu_frame *frame)
{
    if (frame->length < VU_NET_ETHER)
        return VU_DROP_RUNT;
    if (frame->length > VU_NET_FRAME_MOST)
        return VU_DROP_OVERSIZE;
    if (frame->header.gso_type != VIRTIO_NET_HDR_GSO_NONE && !takes_kind(net, frame))
        return VU_DROP_SEGMENTATION;
    if (frame->header.gso_type == VIRTIO_NET_HDR_GSO_NONE &&
        frame->length > atomic_load_explicit(&net->most, memory_order_relaxed))
        return VU_DROP_OVERSIZE;
    return needs_checksum(net, frame) && checksum_at(frame) + 2 > frame->length ? VU_DROP_CHECKSUM : VU_DROP_NONE;
}

void vu_net_fit(const vu_net *net, struct vu_frame *frame)
{
    if (needs_checksum(net, frame))
        complete_checksum(frame);
    if (frame->header.flags && !vu_net_has(net, VIRTIO_NET_F_GUEST_CSUM))
        memset(&frame->header, 0, sizeof frame->header);
}

/* ---- counters -------------------------------------------------------------------------------------------------------- */

void vu_net_settle(vu_net *net, uint32_t ring, struct vu_net_stats *tally)
{
    const uint64_t *counts = (const uint64_t *)tally;
    for (size_t i = 0; i < VU_NET_COUNTERS; i++)
        if (counts[i])
            atomic_fetch_add_explicit(&net->counters[ring][i], counts[i], memory_order_relaxed);
    memset(tally, 0, sizeof *tally);
}

/* Also what a ring's thread, which may wait for its guest for long, has not fetched from the end yet. */
void vu_net_get_stats(vu_net *net, uint32_t ring, struct vu_net_stats *stats)
{
    uint64_t *copy = (uint64_t *)stats;
    struct vu_net_stats lost = {0};
    if (ring < 2 * net->config.pairs && ring % 2 == 0)
        lost.dropped_full = net->config.end->kind->lost(net->config.end, ring / 2);
    if (lost.dropped_full)
        vu_net_settle(net, ring, &lost);
    for (size_t i = 0; i < VU_NET_COUNTERS; i++)
        copy[i] = ring < 2 * net->config.pairs ? atomic_load_explicit(&net->counters[ring][i], memory_order_relaxed) : 0;
}

/* ---- the engine's own life --------------------------------------------------------------------------------------------- */

vu_net *vu_net_new(const struct vu_net_config *config, int *error)
{
    if (!config->pairs || config->pairs > config->end->pairs) {
        *error = VU_E_SIZE;
        return NULL;
    }
    vu_net *net = calloc(1, sizeof *net);
    if (net)
        net->counters = calloc(2 * config->pairs, sizeof *net->counters);
    if (!net || !net->counters) {
        free(net);
        *error = VU_E_NOMEM;
        return NULL;
    }
    net->config = *config;
    net->mergeable = vu_net_has(net, VIRTIO_NET_F_MRG_RXBUF);
    vu_net_set_mtu(net, config->mtu);
    /* 5.1.6.1: num_buffers is there in the modern interface, whether buffers are merged or not. */
    net->header = VU_NET_HEADER + (net->mergeable || vu_net_has(net, VU_NET_VERSION_1) ? 2 : 0);
    return net;
}

/* 5.1.4.1: a driver that negotiated an MTU gets no more; two VLAN tags are no part of it. */
void vu_net_set_mtu(vu_net *net, uint32_t mtu)
{
    bool told = mtu && vu_net_has(net, VIRTIO_NET_F_MTU);
    atomic_store_explicit(&net->most, told ? mtu + VU_NET_ETHER + 8 : VU_NET_FRAME_MOST, memory_order_relaxed);
}

void vu_net_free(vu_net *net)
{
    if (net)
        free(net->counters);
    free(net);
}
