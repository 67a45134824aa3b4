/*
 * Frames cut into segments, for a driver that takes none so long.
 *
 * What belongs here: what the headers of such a frame say, the headers of each segment (RFC 9293, RFC 768, as Linux's
 * net/ipv4/tcp_offload.c does it). What does not: whether a frame has to be cut, the checksum over a segment, which is
 * completed for those who want that (net.c).
 *
 * Frames are in memory of ours. What stands in them is the sender's word all the same: what does not agree is not cut.
 */
#include <endian.h>
#include <string.h>

#include "net.h"

enum {
    /* With these a frame becomes at most 700 KiB, whatever its sender says; and none that Linux sends is refused, whose
     * segments have 48 bytes or more (TCP_MIN_SND_MSS). */
    HEADERS_MOST = 512,
    SEGMENTS_MOST = 65535 / 48 + 1,
    TYPE_AT = 12,
    IPV4 = 0x0800,
    IPV6 = 0x86DD,
    VLAN = 0x8100,
    SERVICE_VLAN = 0x88A8,
    TCP = 6,
    UDP = 17,
    TCP_HEADER = 20,
    TCP_CHECKSUM = 16,
    UDP_HEADER = 8,
    UDP_CHECKSUM = 6,
    FIN = 0x01,
    PSH = 0x08,
    CWR = 0x80,
};

static uint16_t word_at(const uint8_t *at)
{
    uint16_t word;
    memcpy(&word, at, sizeof word);
    return be16toh(word);
}

static void put_word(uint8_t *at, uint32_t value)
{
    uint16_t word = htobe16((uint16_t)value);
    memcpy(at, &word, sizeof word);
}

static uint32_t folded(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* ---- what the headers say ------------------------------------------------------------------------------------------------ */

/* The type of what follows Ethernet's header and any tags, and in *at where that begins. */
static uint16_t network_type(const struct vu_frame *frame, uint32_t *at)
{
    uint32_t type_at = TYPE_AT;
    uint16_t type = word_at(frame->bytes + type_at);
    for (; (type == VLAN || type == SERVICE_VLAN) && type_at + 6 <= frame->length; type = word_at(frame->bytes + type_at))
        type_at += 4;
    *at = type_at + 2;
    return type;
}

/* A whole datagram whose options end where the transport begins. */
static bool is_ipv4(const uint8_t *at, uint32_t length, uint8_t protocol)
{
    return length >= 20 && at[0] >> 4 == 4 && (at[0] & 15) * 4u == length && !(word_at(at + 6) & 0x3fff) && at[9] == protocol;
}

/* RFC 8200, 4: hop by hop (0), routing (43) and destination options (60) may stand between. */
static bool is_ipv6(const uint8_t *at, uint32_t length, uint8_t protocol)
{
    uint32_t next = 40;
    uint8_t kind = length >= next ? at[6] : 255;
    if (kind == 255 || at[0] >> 4 != 6)
        return false;
    while ((kind == 0 || kind == 43 || kind == 60) && next + 8 <= length) {
        kind = at[next];
        next += (at[next + 1] + 1u) * 8;
    }
    return next == length && kind == protocol;
}

static uint32_t transport_header(const struct vu_frame *frame, uint32_t at, bool udp)
{
    if (udp)
        return UDP_HEADER;
    uint32_t length = at + TCP_HEADER <= frame->length ? (frame->bytes[at + 12] >> 4) * 4u : 0;
    return length < TCP_HEADER ? frame->length : length; /* the frame's: more than there is */
}

static bool network_agrees(const struct vu_frame *frame, struct vu_cut *cut, uint8_t kind)
{
    uint16_t type = network_type(frame, &cut->network);
    uint8_t protocol = cut->udp ? UDP : TCP;
    if (cut->network > cut->transport)
        return false;
    const uint8_t *at = frame->bytes + cut->network;
    uint32_t length = cut->transport - cut->network;
    cut->ipv6 = type == IPV6;
    if (type == IPV4)
        return kind != VIRTIO_NET_HDR_GSO_TCPV6 && is_ipv4(at, length, protocol);
    return cut->ipv6 && kind != VIRTIO_NET_HDR_GSO_TCPV4 && is_ipv6(at, length, protocol);
}

bool vu_cut_plan(const struct vu_frame *frame, struct vu_cut *cut)
{
    uint8_t kind = frame->header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
    cut->udp = kind != VIRTIO_NET_HDR_GSO_TCPV4 && kind != VIRTIO_NET_HDR_GSO_TCPV6;
    cut->transport = le16toh(frame->header.csum_start);
    cut->headers = cut->transport + transport_header(frame, cut->transport, cut->udp);
    cut->size = le16toh(frame->header.gso_size);
    if (le16toh(frame->header.csum_offset) != (cut->udp ? UDP_CHECKSUM : TCP_CHECKSUM) || !cut->size)
        return false;
    if (cut->headers > frame->length || cut->headers > HEADERS_MOST || !network_agrees(frame, cut, kind))
        return false;
    uint32_t payload = frame->length - cut->headers;
    cut->count = payload ? (payload + cut->size - 1) / cut->size : 1;
    return cut->count <= SEGMENTS_MOST;
}

/* ---- the headers of a segment -------------------------------------------------------------------------------------------- */

static void fit_network(const struct vu_cut *cut, uint32_t n, const struct vu_frame *segment)
{
    uint8_t *at = segment->bytes + cut->network;
    if (cut->ipv6) {
        put_word(at + 4, segment->length - cut->network - 40);
        return;
    }
    put_word(at + 2, segment->length - cut->network);
    put_word(at + 4, word_at(at + 4) + n);
    put_word(at + 10, 0);
    uint16_t sum = vu_internet_checksum(at, cut->transport - cut->network);
    memcpy(at + 10, &sum, sizeof sum);
}

static void fit_tcp(const struct vu_cut *cut, uint32_t n, uint8_t *at)
{
    uint32_t sequence;
    memcpy(&sequence, at + 4, sizeof sequence);
    sequence = htobe32(be32toh(sequence) + n * cut->size);
    memcpy(at + 4, &sequence, sizeof sequence);
    if (n + 1 < cut->count)
        at[13] &= (uint8_t)~(FIN | PSH);
    if (n)
        at[13] &= (uint8_t)~CWR;
}

/* What stands in the place of the checksum is the pseudo header's sum, in which the length changes. */
static void fit_pseudo_header(uint8_t *at, uint32_t before, uint32_t after)
{
    put_word(at, folded(word_at(at) + (0xffff - folded(before)) + after));
}

void vu_cut_segment(const struct vu_frame *frame, const struct vu_cut *cut, uint32_t n, uint8_t *to, struct vu_frame *segment)
{
    uint32_t from = cut->headers + n * cut->size, part = (uint32_t)vu_least(cut->size, frame->length - from);
    uint8_t *transport = to + cut->transport;
    *segment = (struct vu_frame){.header = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
                                            .csum_start = frame->header.csum_start,
                                            .csum_offset = frame->header.csum_offset},
                                 .bytes = to,
                                 .length = cut->headers + part};
    memcpy(to, frame->bytes, cut->headers);
    memcpy(to + cut->headers, frame->bytes + from, part);
    fit_network(cut, n, segment);
    if (cut->udp)
        put_word(transport + 4, UDP_HEADER + part);
    else
        fit_tcp(cut, n, transport);
    fit_pseudo_header(transport + (cut->udp ? UDP_CHECKSUM : TCP_CHECKSUM), frame->length - cut->transport,
                      segment->length - cut->transport);
}
