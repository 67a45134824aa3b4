/*
 * The network engine as a plain program, for the sanitizers.
 *
 *     net SEED ROUNDS
 *
 * Random chains and random headers go through two ports of a hub, part of guest memory being lost in some rounds; a tap,
 * played by a socket, is full or gets frames that are lost; frames are cut; a stream's connection is replaced under its
 * threads, while what passes is recorded. What is right frame by frame is judged by the tests in Python; here that no
 * input touches memory that is not ours, and that every buffer comes back.
 * Exit status 0, or a line on stderr and 1.
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

enum { RING = 64, SAFE = 1 << 20, FRAGILE = 1 << 17, FRAGILE_AT = 1 << 24, BUFFERS = 1 << 18 };

/* ---- random chains ------------------------------------------------------------------------------------------------------ */

struct guest {
    int fds[2];
    vu_map *map;
    vu_driver *driver;
    vu_queue *queue;
};

static void open_guest(struct guest *guest, uint64_t features)
{
    static const uint64_t at[2] = {0, FRAGILE_AT}, size[2] = {SAFE, FRAGILE};
    vu_region *regions[2];
    int error;
    for (int i = 0; i < 2; i++) {
        guest->fds[i] = memfd_create("guest", MFD_CLOEXEC);
        CHECK(ftruncate(guest->fds[i], (off_t)size[i]) == 0);
        regions[i] = vu_region_map(guest->fds[i], at[i], size[i], at[i], 0, 0, &error);
        CHECK(regions[i]);
    }
    CHECK(guest->map = vu_map_new(regions, 2, &error));
    for (int i = 0; i < 2; i++)
        vu_region_put(regions[i]);
    unsigned indirect = features & 1 ? VU_DRIVER_INDIRECT : 0, packed = features & 2;
    CHECK(guest->driver = vu_driver_new(guest->map, 0, RING, indirect | (packed ? VU_DRIVER_PACKED : 0), &error));
    struct vu_ring ring = {.size = RING,
                           .flags = VU_RING_GUEST_ADDR | VU_RING_INDIRECT | (packed ? VU_RING_PACKED : 0),
                           .base = packed ? 1u << 15 | 1u << 31 : 0,
                           .desc = vu_driver_desc(guest->driver),
                           .avail = vu_driver_avail(guest->driver),
                           .used = vu_driver_used(guest->driver)};
    CHECK(guest->queue = vu_queue_new(guest->map, &ring, NULL, NULL, NULL, &error));
}

static void close_guest(struct guest *guest)
{
    vu_queue_free(guest->queue);
    vu_driver_free(guest->driver);
    vu_map_put(guest->map);
    close(guest->fds[0]);
    close(guest->fds[1]);
}

/* Somewhere in memory: mostly in the region that stays. */
static uint64_t somewhere(uint32_t length)
{
    if (below(8) == 0 && length < FRAGILE)
        return FRAGILE_AT + below(FRAGILE - length);
    return BUFFERS + below(SAFE - BUFFERS - length);
}

static uint32_t some_length(void)
{
    static const uint32_t limits[] = {1, 3, 16, 100, 2000, 70000};
    return (uint32_t)below(limits[below(6)]);
}

static bool offer(struct guest *guest, bool transmit)
{
    vu_buffer buffers[8];
    uint32_t count = 1 + (uint32_t)below(8), writable = transmit ? count - (below(16) == 0) : (uint32_t)(below(16) == 0);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = some_length();
        buffers[i] = (vu_buffer){somewhere(length), length, i >= writable};
    }
    return vu_driver_add(guest->driver, buffers, count) >= 0;
}

/* A header like those that drivers write, so that frames get further than the first check. */
static void put_header(struct guest *guest)
{
    struct virtio_net_hdr header = {.flags = (uint8_t)below(2), .gso_type = (uint8_t)(below(3) ? 0 : any())};
    header.gso_size = (uint16_t)below(3000);
    header.csum_start = (uint16_t)below(200);
    header.csum_offset = (uint16_t)below(40);
    for (uint64_t at = BUFFERS; at + 64 < SAFE; at += 1 + below(200))
        vu_map_write(guest->map, at, &header, sizeof header);
}

static uint32_t take_all(struct guest *guest)
{
    uint32_t count = 0, length;
    uint16_t head;
    int code;
    while ((code = vu_driver_take(guest->driver, &head, &length)) > 0)
        count++;
    CHECK(code == 0);
    return count;
}

static uint64_t some_features(void)
{
    uint64_t features = any() & (any() | any());
    return below(2) ? features | UINT64_C(1) << 32 | 1 << VIRTIO_NET_F_MRG_RXBUF : features;
}

static void judge(const struct guest *guest, const vu_chain *chain)
{
    for (uint32_t i = 0; i < chain->readable_count + chain->writable_count; i++)
        CHECK(vu_map_guest(guest->map, chain->segments[i].guest, chain->segments[i].length) == chain->segments[i].host);
}

static void exchange(int stop)
{
    uint64_t features = some_features();
    struct guest one, other;
    int error;
    uint32_t sent = 0, posted = 0;
    vu_chain *chains[RING];
    vu_hub *hub = vu_hub_new(2, 1, below(2) ? VU_HUB_LEARN : 0, (uint32_t)below(2), &error);
    CHECK(hub);
    vu_net *from = vu_net_new(&(struct vu_net_config){vu_hub_port(hub, 0), features, 1, 0, 0}, &error);
    vu_net *to = vu_net_new(&(struct vu_net_config){vu_hub_port(hub, 1), some_features(), 1, 0, 0}, &error);
    CHECK(from && to);
    open_guest(&one, any());
    open_guest(&other, any());
    put_header(&one);
    while (sent < RING && offer(&one, true))
        sent++;
    while (posted < RING && offer(&other, false))
        posted++;
    vu_driver_publish(one.driver);
    vu_driver_publish(other.driver);
    if (below(4) == 0) /* what was mapped is gone */
        CHECK(ftruncate(one.fds[1], 0) == 0 && ftruncate(other.fds[1], 4096) == 0);
    CHECK(vu_net_transmit(from, 0, one.queue, -1, stop) == 0);
    CHECK(take_all(&one) == sent && vu_queue_out(one.queue) == 0);
    CHECK(vu_net_receive(to, 0, other.queue, -1, stop) == 0);
    CHECK(vu_queue_out(other.queue) == 0);
    uint32_t used = take_all(&other); /* what was not used was given back: it comes again, and nothing else */
    CHECK(vu_queue_pop(other.queue, chains, RING) == (int)(posted - used));
    for (uint32_t i = 0; i < posted - used; i++)
        judge(&other, chains[i]);
    CHECK(vu_queue_unpop(other.queue, chains, posted - used) == 0);
    CHECK(vu_net_discard(other.queue, -1, stop) == 0);
    close_guest(&one);
    close_guest(&other);
    vu_net_free(from);
    vu_net_free(to);
    vu_hub_free(hub);
}

/* ---- a tap, played by a socket that keeps frames apart -------------------------------------------------------------------- */

struct wire {
    int ours, theirs;
    vu_end *end;
};

static void open_wire(struct wire *wire)
{
    int fds[2], error;
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, fds) == 0);
    wire->ours = fds[0];
    wire->theirs = fds[1];
    CHECK(wire->end = vu_end_tap(&wire->ours, 1, 0, &error));
}

static uint32_t drain(struct wire *wire)
{
    static uint8_t bytes[VU_NET_FRAME_MOST];
    uint32_t count = 0;
    while (read(wire->theirs, bytes, sizeof bytes) > 0)
        count++;
    return count;
}

static void close_wire(struct wire *wire)
{
    vu_end_free(wire->end);
    close(wire->ours);
    close(wire->theirs);
}

/* A frame in too many pieces is copied; what is lost meanwhile is not sent, and nor is what lay there from another. */
static void lost_pieces(void)
{
    enum { PIECES = 1100 };
    static vu_segment segments[PIECES];
    struct guest guest;
    struct wire wire;
    open_guest(&guest, 0);
    open_wire(&wire);
    for (uint32_t i = 0; i < PIECES; i++)
        segments[i] = (vu_segment){vu_map_guest(guest.map, FRAGILE_AT + 4096 + i, 1), 1, 0};
    for (int lost = 0; lost < 2; lost++) {
        struct vu_packet packet = {.drop = VU_DROP_NONE, .count = PIECES, .length = PIECES, .segments = segments};
        CHECK(wire.end->kind->send(wire.end, 0, guest.map, &packet, 1) == 1);
        CHECK(packet.drop == (lost ? VU_DROP_FAULT : VU_DROP_NONE) && drain(&wire) == (lost ? 0 : 1));
        CHECK(ftruncate(guest.fds[1], 0) == 0);
    }
    close_wire(&wire);
    close_guest(&guest);
}

/* A bad frame behind one that waits for room is counted once, however often it is looked at. */
static void counted_once(int stop)
{
    static const uint8_t frame[60];
    struct vu_net_stats stats;
    struct guest guest;
    struct wire wire;
    int error;
    open_guest(&guest, 0);
    open_wire(&wire);
    vu_net *net = vu_net_new(&(struct vu_net_config){wire.end, 0, 1, 0, 0}, &error);
    CHECK(net);
    while (vu_end_inject(wire.end, frame, sizeof frame))
        ;
    CHECK(vu_driver_add(guest.driver, &(vu_buffer){BUFFERS, 70, 0}, 1) >= 0);
    CHECK(vu_driver_add(guest.driver, &(vu_buffer){BUFFERS, 12, 0}, 1) >= 0);
    vu_driver_publish(guest.driver);
    for (int look = 0; look < 3; look++)
        CHECK(vu_net_transmit(net, 0, guest.queue, -1, stop) == 0 && take_all(&guest) == 0);
    drain(&wire);
    CHECK(vu_net_transmit(net, 0, guest.queue, -1, stop) == 0 && take_all(&guest) == 2 && drain(&wire) == 1);
    vu_net_get_stats(net, 1, &stats);
    CHECK(stats.frames == 1 && stats.dropped_runt == 1);
    vu_net_free(net);
    close_wire(&wire);
    close_guest(&guest);
}

/* ---- a frame that is cut ------------------------------------------------------------------------------------------------ */

enum { HEADERS = 66 };
static const uint8_t ipv4_tcp[HEADERS] = {[12] = 0x08, 0x00, 0x45, [20] = 0x40, [23] = 6, [46] = 0x50};
static const uint8_t tagged_ipv6_udp[HEADERS] = {[12] = 0x81, 0x00, [16] = 0x86, 0xDD, 0x60, [24] = 17};

/* Each in memory of exactly its size, so that a byte too far is seen. */
static void cut_once(void)
{
    bool udp = below(2);
    uint32_t length = VU_NET_ETHER + (uint32_t)below(below(2) ? 200 : 9000), size = length < HEADERS ? length : HEADERS;
    struct vu_frame whole = {.length = length, .bytes = calloc(1, length)}, segment;
    struct vu_cut cut;
    uint32_t total = 0;
    CHECK(whole.bytes);
    memcpy(whole.bytes, udp ? tagged_ipv6_udp : ipv4_tcp, size);
    for (uint64_t wrong = below(4); wrong; wrong--)
        whole.bytes[below(size)] = (uint8_t)any();
    whole.header = (struct virtio_net_hdr){.flags = 1, .gso_type = udp ? 5 : 1, .gso_size = (uint16_t)(1 + below(2000))};
    whole.header.csum_start = (uint16_t)(below(8) ? (udp ? 58 : 34) : below(length));
    whole.header.csum_offset = udp ? 6 : 16;
    bool cuts = vu_cut_plan(&whole, &cut);
    for (uint32_t n = 0; cuts && n < cut.count; n++) {
        uint32_t left = length - cut.headers - n * cut.size, part = left < cut.size ? left : cut.size;
        uint8_t *exactly = malloc(cut.headers + part);
        CHECK(exactly);
        vu_cut_segment(&whole, &cut, n, exactly, &segment);
        CHECK(segment.length == cut.headers + part && !memcmp(exactly + cut.headers, whole.bytes + length - left, part));
        total += part;
        free(exactly);
    }
    CHECK(!cuts || total == length - cut.headers);
    free(whole.bytes);
}

/* ---- a stream whose connection is replaced under its threads, and which is recorded ---------------------------------------- */

struct party {
    vu_end *end;
    vu_map *map;
    vu_capture *capture;
    int null, stop;
    _Atomic bool over;
};

static void *keeps_sending(void *of)
{
    static uint8_t bytes[3000];
    struct party *party = of;
    vu_segment segment = {bytes, sizeof bytes, 0};
    while (!atomic_load(&party->over)) {
        struct vu_packet packet = {.drop = VU_DROP_NONE, .count = 1, .length = sizeof bytes, .segments = &segment};
        party->end->kind->send(party->end, 0, party->map, &packet, 1);
        party->end->kind->unsent(party->end, 0);
    }
    return NULL;
}

static void *keeps_receiving(void *of)
{
    struct party *party = of;
    struct vu_frame frames[VU_NET_BATCH];
    while (!atomic_load(&party->over)) {
        uint32_t count = party->end->kind->look(party->end, 0, frames, VU_NET_BATCH);
        for (uint32_t i = 0; i < count; i++)
            CHECK(frames[i].length >= VU_FRAME_LEAST && frames[i].length <= VU_FRAME_MOST);
        party->end->kind->take(party->end, 0, count);
    }
    return NULL;
}

static void *keeps_writing(void *of)
{
    struct party *party = of;
    while (vu_capture_write(party->capture, party->null, party->stop))
        ;
    return NULL;
}

/* Frames, and sometimes a length that none has; or anything. */
static void speak(int fd)
{
    uint8_t bytes[5000];
    bool sane = below(2);
    for (int n = (int)below(8); n; n--) {
        uint32_t length = (uint32_t)(below(20) ? 14 + below(4000) : below(14)), prefix = htobe32(length);
        for (size_t i = 0; i < sizeof bytes; i++)
            bytes[i] = (uint8_t)any();
        if (sane)
            memcpy(bytes, &prefix, sizeof prefix);
        send(fd, bytes, sane ? length + 4 : 1 + below(sizeof bytes), MSG_NOSIGNAL);
        while (recv(fd, bytes, sizeof bytes, 0) > 0 && below(4))
            ;
    }
}

static void replaced(void)
{
    static void *(*const bodies[])(void *) = {keeps_sending, keeps_receiving, keeps_writing};
    struct party party = {.null = open("/dev/null", O_WRONLY), .stop = eventfd(0, 0)};
    pthread_t threads[3];
    int error;
    vu_end *stream = vu_end_stream(&error);
    CHECK(stream && (party.capture = vu_capture_new(1, 100, &error)) && (party.map = vu_map_new(NULL, 0, &error)));
    CHECK(party.end = vu_capture_end(party.capture, stream, 0, &error));
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, bodies[i], &party) == 0);
    for (int round = 0; round < 300; round++) {
        int fds[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
        CHECK(vu_stream_attach(stream, fds[0]) == 0);
        vu_end_inject(party.end, (uint8_t[60]){0}, 60);
        speak(fds[1]);
        close(fds[1]);
    }
    atomic_store(&party.over, true);
    CHECK(eventfd_write(party.stop, 1) == 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    vu_end_free(party.end);
    vu_end_free(stream);
    vu_capture_free(party.capture);
    vu_map_put(party.map);
    close(party.null);
    close(party.stop);
}

int main(int argc, char **argv)
{
    CHECK(argc == 3);
    state = strtoull(argv[1], NULL, 0) | 1;
    int stop = eventfd(1, 0);
    for (long round = 0; round < strtol(argv[2], NULL, 0); round++)
        exchange(stop), cut_once(), cut_once(), cut_once();
    lost_pieces();
    counted_once(stop);
    replaced();
    close(stop);
    puts("ok");
    return 0;
}
