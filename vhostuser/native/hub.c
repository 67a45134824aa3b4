/*
 * Ports between which frames go: a loop, two peers, a learning bridge.
 *
 * What belongs here: to which ports a frame goes (IEEE 802.1D, 7.7 and 7.8, without the spanning tree). What does not: who is
 * where (stations.c), how a frame gets to a port (mailbox.c).
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mailbox.h"

enum {
    EVERYBODY = UINT16_MAX, /* but the sender */
    COPIES = 16384,         /* bytes copied out of guest memory at once, or one frame: the nearest cache holds them */
};

struct port {
    vu_end end;
    vu_hub *hub;
    uint32_t number;
    struct vu_mailbox *boxes; /* of each pair */
};

struct vu_hub {
    uint32_t flags, count;
    struct port *ports;
    vu_stations *stations; /* NULL: nothing is learnt */
};

/* ---- where to ------------------------------------------------------------------------------------------------------------- */

static uint32_t now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint32_t)now.tv_sec;
}

/* The group bit is the first on the wire, the lowest of the first byte; and 0 is the address of nobody. */
static bool is_station(const uint8_t *address)
{
    static const uint8_t nobody[6];
    return !(address[0] & 1) && memcmp(address, nobody, sizeof nobody);
}

/* 7.12.6: these sixteen are between neighbours on one wire. A guest's bridge finds loops by those that do not pass. */
static bool is_for_a_neighbour(const uint8_t *address)
{
    static const uint8_t reserved[5] = {0x01, 0x80, 0xC2, 0x00, 0x00};
    return !memcmp(address, reserved, sizeof reserved) && address[5] < 16;
}

/* The port of the frame, which is marked if it may not pass. The sender's own: it goes nowhere, as the station that it is
 * for hears it on its own side. */
static uint32_t destination(const struct port *from, struct vu_packet *packet, uint32_t now)
{
    const vu_hub *hub = from->hub;
    const uint8_t *to = packet->ether, *source = packet->ether + 6;
    if (!hub->stations)
        return hub->flags & VU_HUB_REFLECT ? from->number : EVERYBODY;
    if (!is_station(source) || is_for_a_neighbour(to)) {
        packet->drop = VU_DROP_REFUSED;
        return from->number;
    }
    vu_stations_learn(hub->stations, source, from->number, now);
    int known = is_station(to) ? vu_stations_find(hub->stations, to, now) : -1;
    return known < 0 ? EVERYBODY : (uint32_t)known;
}

/* The pair of the same number if somebody receives there: frames of one ring stay in order. */
static struct vu_mailbox *box_of(const struct port *port, uint32_t pair)
{
    for (uint32_t i = 0; i < port->end.pairs; i++) {
        struct vu_mailbox *box = &port->boxes[(pair + i) % port->end.pairs];
        if (atomic_load_explicit(&box->attended, memory_order_relaxed))
            return box;
    }
    return &port->boxes[0];
}

/* ---- forwarding ------------------------------------------------------------------------------------------------------------ */

/* False if a port had no room for all of them. */
static bool deliver(const struct port *from, uint32_t to, uint32_t pair, const struct vu_frame *frames, uint32_t count)
{
    const vu_hub *hub = from->hub;
    bool all = true;
    if (to != EVERYBODY)
        return vu_mailbox_put(box_of(&hub->ports[to], pair), frames, count);
    for (uint32_t i = 0; i < hub->count; i++)
        if (i != from->number)
            all &= vu_mailbox_put(box_of(&hub->ports[i], pair), frames, count);
    return all;
}

/* The first packets, copied for good: what is learnt from and what is forwarded are the same bytes, for every port. How many
 * packets; in *copied how many frames, without those whose memory is lost. */
static uint32_t copy_some(const vu_map *map, struct vu_packet *packets, uint32_t count, uint8_t *copies,
                          struct vu_frame *frames, uint32_t *copied)
{
    uint8_t *to[VU_NET_BATCH];
    uint32_t used = 0, n = 0;
    for (; n < count && n < VU_NET_BATCH && (!n || used + packets[n].length <= COPIES); used += packets[n++].length)
        to[n] = copies + used;
    vu_packets_copy(map, packets, to, n);
    *copied = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (packets[i].drop != VU_DROP_NONE)
            continue;
        memcpy(to[i], packets[i].ether, VU_NET_ETHER);
        frames[(*copied)++] = (struct vu_frame){packets[i].header, to[i], packets[i].length};
    }
    return n;
}

/* Whatever keeps us from the sender's memory, nothing of a receiver's is held meanwhile. */
static void forward(const struct port *from, uint32_t to, uint32_t pair, const vu_map *map, struct vu_packet *packets,
                    uint32_t count)
{
    uint8_t copies[VU_NET_FRAME_MOST];
    struct vu_frame frames[VU_NET_BATCH];
    if (to == from->number && !(from->hub->flags & VU_HUB_REFLECT))
        return;
    for (uint32_t n, copied; count; packets += n, count -= n) {
        n = copy_some(map, packets, count, copies, frames, &copied);
        deliver(from, to, pair, frames, copied);
    }
}

static uint32_t send(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    const struct port *from = (struct port *)end;
    uint32_t now = from->hub->stations ? now_seconds() : 0, first = 0;
    uint32_t to = count ? destination(from, packets, now) : EVERYBODY;

    for (uint32_t i = 1; i <= count; i++) {
        uint32_t next = i < count ? destination(from, &packets[i], now) : EVERYBODY;
        if (i < count && next == to)
            continue;
        forward(from, to, pair, map, packets + first, i - first);
        first = i;
        to = next;
    }
    return count;
}

static bool inject(vu_end *end, const uint8_t *bytes, uint32_t length)
{
    const struct port *from = (struct port *)end;
    struct vu_packet packet = {.drop = VU_DROP_NONE, .length = length};
    struct vu_frame frame = {.bytes = (uint8_t *)bytes, .length = length};
    memcpy(packet.ether, bytes, VU_NET_ETHER);
    uint32_t to = destination(from, &packet, from->hub->stations ? now_seconds() : 0);
    if (to == from->number && !(from->hub->flags & VU_HUB_REFLECT))
        return packet.drop == VU_DROP_NONE;
    return deliver(from, to, 0, &frame, 1);
}

/* ---- a port as an end -------------------------------------------------------------------------------------------------------- */

static struct vu_mailbox *own_box(const vu_end *end, uint32_t pair)
{
    return &((struct port *)end)->boxes[pair];
}

static uint32_t look(vu_end *end, uint32_t pair, struct vu_frame *frames, uint32_t max)
{
    return vu_mailbox_look(own_box(end, pair), frames, max);
}

static void take(vu_end *end, uint32_t pair, uint32_t count)
{
    vu_mailbox_take(own_box(end, pair), count);
}

static bool arm(vu_end *end, uint32_t pair)
{
    return vu_mailbox_arm(own_box(end, pair));
}

static void woken(vu_end *end, uint32_t pair)
{
    vu_mailbox_woken(own_box(end, pair));
}

static int receive_fd(const vu_end *end, uint32_t pair)
{
    return own_box(end, pair)->event;
}

static uint64_t lost(vu_end *end, uint32_t pair)
{
    struct vu_mailbox *box = own_box(end, pair);
    if (!atomic_load_explicit(&box->full, memory_order_relaxed))
        return 0;
    return atomic_exchange_explicit(&box->full, 0, memory_order_relaxed);
}

static void attend(vu_end *end, uint32_t pair, bool on)
{
    atomic_store(&own_box(end, pair)->attended, on);
}

/* Also who was behind the port: the next to use it may be another guest. */
static void flush(vu_end *end)
{
    const struct port *port = (struct port *)end;
    for (uint32_t i = 0; i < end->pairs; i++)
        vu_mailbox_flush(own_box(end, i));
    if (port->hub->stations)
        vu_stations_forget(port->hub->stations, port->number);
}

static void keep(vu_end *end)
{
    (void)end; /* the hub's */
}

static const struct vu_end_kind kind = {
    .look = look,
    .take = take,
    .arm = arm,
    .woken = woken,
    .receive_fd = receive_fd,
    .lost = lost,
    .attend = attend,
    .send = send,
    .unsent = vu_end_sends_at_once,
    .room = vu_end_has_room,
    .inject = inject,
    .accept = vu_end_accepts_all,
    .flush = flush,
    .free = keep,
};

/* ---- life ------------------------------------------------------------------------------------------------------------------------ */

void vu_hub_free(vu_hub *hub)
{
    if (!hub)
        return;
    for (uint32_t i = 0; hub->ports && i < hub->count; i++) {
        struct port *port = &hub->ports[i];
        for (uint32_t pair = 0; port->boxes && pair < port->end.pairs; pair++)
            vu_mailbox_close(&port->boxes[pair]);
        free(port->boxes);
    }
    free(hub->ports);
    vu_stations_free(hub->stations);
    free(hub);
}

static int open_port(vu_hub *hub, uint32_t number, uint32_t pairs)
{
    struct port *port = &hub->ports[number];
    port->boxes = aligned_alloc(_Alignof(struct vu_mailbox), pairs * sizeof *port->boxes);
    if (!port->boxes)
        return VU_E_NOMEM;
    *port = (struct port){.end = {&kind, 0}, .hub = hub, .number = number, .boxes = port->boxes};
    int code = 0;
    while (!code && port->end.pairs < pairs)
        code = vu_mailbox_open(&port->boxes[port->end.pairs++]);
    return code;
}

static int open_hub(vu_hub *hub, uint32_t ports, uint32_t pairs, uint32_t flags, uint32_t ageing)
{
    int code = 0;
    hub->flags = flags;
    if (!(hub->ports = calloc(ports, sizeof *hub->ports)))
        return VU_E_NOMEM;
    if (flags & VU_HUB_LEARN && !(hub->stations = vu_stations_new(ageing, &code)))
        return code;
    while (!code && hub->count < ports) {
        code = open_port(hub, hub->count, pairs);
        hub->count++;
    }
    return code;
}

vu_hub *vu_hub_new(uint32_t ports, uint32_t pairs, uint32_t flags, uint32_t ageing, int *error)
{
    if (!ports || !pairs || ports >= EVERYBODY) {
        *error = VU_E_SIZE;
        return NULL;
    }
    vu_hub *hub = calloc(1, sizeof *hub);
    *error = hub ? open_hub(hub, ports, pairs, flags, ageing) : VU_E_NOMEM;
    if (!*error)
        return hub;
    vu_hub_free(hub);
    return NULL;
}

vu_end *vu_hub_port(vu_hub *hub, uint32_t port)
{
    return port < hub->count ? &hub->ports[port].end : NULL;
}

uint32_t vu_hub_stations(const vu_hub *hub, uint32_t port)
{
    return hub->stations ? vu_stations_count(hub->stations, port, now_seconds()) : 0;
}
