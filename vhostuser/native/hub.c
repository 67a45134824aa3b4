/*
 * Ports between which frames go: a loop, two peers, a learning bridge.
 *
 * What belongs here: to which ports a frame goes (IEEE 802.1D, 7.7 and 7.8, without the spanning tree). What does not: how
 * it gets there (mailbox.c).
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mailbox.h"

enum {
    WAYS = 4,
    SETS = 1024,     /* a power of two: 4096 stations */
    AGE_SECONDS = 300, /* 802.1D, table 7-5: the recommended ageing time */
    NOWHERE = UINT16_MAX,
};

struct port {
    vu_end end;
    vu_hub *hub;
    uint32_t number;
    struct vu_mailbox *boxes; /* of each pair */
};

/* Who is where. One word is one fact, so that threads need not agree: at worst a frame goes to more ports than it must. */
struct station {
    _Atomic uint64_t known; /* address << 16 | port + 1; 0: nobody */
    _Atomic uint32_t seen;  /* when, in seconds */
};

struct vu_hub {
    uint32_t flags, count;
    struct port *ports;
    struct station (*stations)[WAYS]; /* NULL: nothing is learnt */
};

/* ---- stations ------------------------------------------------------------------------------------------------------------ */

static uint64_t address_at(const uint8_t *bytes)
{
    uint64_t address = 0;
    memcpy((uint8_t *)&address, bytes, 6);
    return address;
}

/* The group bit is the first on the wire, the lowest of the first byte. */
static bool is_group(uint64_t address)
{
    return address & 1;
}

static uint32_t now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint32_t)now.tv_sec;
}

static struct station *set_of(const vu_hub *hub, uint64_t address)
{
    return hub->stations[(address * 0x9E3779B97F4A7C15u) >> 54 & (SETS - 1)];
}

static bool fresh(const struct station *station, uint32_t now)
{
    return now - atomic_load_explicit(&station->seen, memory_order_relaxed) < AGE_SECONDS;
}

/* The place of the address, or the one that it may have: an empty one, or that of who was silent for longest. */
static struct station *place_for(struct station *set, uint64_t address)
{
    struct station *oldest = set;
    for (struct station *station = set; station < set + WAYS; station++) {
        uint64_t known = atomic_load_explicit(&station->known, memory_order_relaxed);
        if (known >> 16 == address)
            return station;
        if ((int32_t)(atomic_load_explicit(&station->seen, memory_order_relaxed) -
                      atomic_load_explicit(&oldest->seen, memory_order_relaxed)) < 0)
            oldest = station;
    }
    return oldest;
}

/* Only what changes is written: ports that talk at the same time share these lines. */
static void learn(const vu_hub *hub, uint64_t address, uint32_t port, uint32_t now)
{
    if (is_group(address) || !address)
        return;
    struct station *station = place_for(set_of(hub, address), address);
    uint64_t known = address << 16 | (port + 1);
    if (atomic_load_explicit(&station->known, memory_order_relaxed) != known)
        atomic_store_explicit(&station->known, known, memory_order_relaxed);
    if (atomic_load_explicit(&station->seen, memory_order_relaxed) != now)
        atomic_store_explicit(&station->seen, now, memory_order_relaxed);
}

static uint32_t find(const vu_hub *hub, uint64_t address, uint32_t now)
{
    struct station *set = is_group(address) || !address ? NULL : set_of(hub, address); /* 0 is that of nobody */
    for (int i = 0; set && i < WAYS; i++) {
        uint64_t known = atomic_load_explicit(&set[i].known, memory_order_relaxed);
        if (known >> 16 == address && fresh(&set[i], now))
            return (uint32_t)(known & 0xffff) - 1;
    }
    return NOWHERE;
}

/* ---- forwarding ------------------------------------------------------------------------------------------------------------ */

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

static uint32_t destination(const struct port *from, const struct vu_packet *packet, uint32_t now)
{
    const vu_hub *hub = from->hub;
    if (hub->flags & VU_HUB_REFLECT)
        return from->number;
    if (!hub->stations)
        return NOWHERE;
    learn(hub, address_at(packet->ether + 6), from->number, now);
    return find(hub, address_at(packet->ether), now);
}

/* To one port, or to all but the sender's. A station that is on the sender's own side gets its frames there. */
static void forward(const struct port *from, uint32_t to, uint32_t pair, const vu_map *map, struct vu_packet *packets,
                    uint32_t count)
{
    const vu_hub *hub = from->hub;
    if (to == from->number && !(hub->flags & VU_HUB_REFLECT))
        return;
    for (uint32_t i = to == NOWHERE ? 0 : to; i < hub->count; i++) {
        if (i != from->number || hub->flags & VU_HUB_REFLECT)
            vu_mailbox_put(box_of(&hub->ports[i], pair), map, packets, count);
        if (to != NOWHERE)
            break;
    }
}

static uint32_t send(vu_end *end, uint32_t pair, const vu_map *map, struct vu_packet *packets, uint32_t count)
{
    const struct port *from = (struct port *)end;
    uint32_t now = from->hub->stations ? now_seconds() : 0, first = 0;
    uint32_t to = count ? destination(from, packets, now) : NOWHERE;

    for (uint32_t i = 1; i <= count; i++) {
        uint32_t next = i < count ? destination(from, &packets[i], now) : NOWHERE;
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
    struct vu_packet packet = {.length = length};
    memcpy(packet.ether, bytes, VU_NET_ETHER);
    uint32_t to = destination(from, &packet, from->hub->stations ? now_seconds() : 0);
    bool taken = true;
    for (uint32_t i = 0; i < from->hub->count; i++)
        if (i == to || (to == NOWHERE && i != from->number))
            taken &= vu_mailbox_put_own(box_of(&from->hub->ports[i], 0), bytes, length);
    return taken;
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

static void flush(vu_end *end)
{
    for (uint32_t i = 0; i < end->pairs; i++)
        vu_mailbox_flush(own_box(end, i));
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
    free(hub->stations);
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

static int open_hub(vu_hub *hub, uint32_t ports, uint32_t pairs, uint32_t flags)
{
    int code = 0;
    hub->flags = flags;
    hub->ports = calloc(ports, sizeof *hub->ports);
    if (flags & VU_HUB_LEARN)
        hub->stations = calloc(SETS, sizeof *hub->stations);
    if (!hub->ports || (flags & VU_HUB_LEARN && !hub->stations))
        return VU_E_NOMEM;
    while (!code && hub->count < ports) {
        code = open_port(hub, hub->count, pairs);
        hub->count++;
    }
    return code;
}

vu_hub *vu_hub_new(uint32_t ports, uint32_t pairs, uint32_t flags, int *error)
{
    if (!ports || !pairs || ports >= NOWHERE) {
        *error = VU_E_SIZE;
        return NULL;
    }
    vu_hub *hub = calloc(1, sizeof *hub);
    *error = hub ? open_hub(hub, ports, pairs, flags) : VU_E_NOMEM;
    if (!*error)
        return hub;
    vu_hub_free(hub);
    return NULL;
}

vu_end *vu_hub_port(vu_hub *hub, uint32_t port)
{
    return port < hub->count ? &hub->ports[port].end : NULL;
}
