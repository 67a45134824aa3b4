/*
 * The fault server: reads the faults of many userfaultfds, places their pages in one memory, wakes those who wait.
 *
 * What belongs here: the loop, and the order of the steps. What does not: the state and the argument why no wake-up is
 * lost (faultpages.c), how a page is placed (faultput.c) and a client woken (faultwake.c), sources that are not mapped:
 * those ask vu_faults_wanted what to bring and bring it with vu_faults_place.
 *
 * The loop is entered by one thread. Pages may be placed by any number of others meanwhile.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fault.h"

enum { EVENTS = 16, TICK_MS = 100 };

static const uint64_t CONTROL_EVENT = ~0ull;

/* ---- making ------------------------------------------------------------------------------------------------------ */

static int fill_parts(struct vu_faults *server, const struct vu_fault_region *regions)
{
    uint64_t first = 0;
    for (uint32_t i = 0; i < server->part_count; i++) {
        const struct vu_fault_region *region = &regions[i];
        struct vu_fault_part *part = &server->parts[i];
        if (!region->page_size || (region->page_size & (region->page_size - 1)))
            return VU_E_SIZE;
        if (!region->size || (region->guest | region->size | region->host) & (region->page_size - 1))
            return VU_E_ALIGN;
        part->region = *region;
        part->shift = (unsigned)__builtin_ctzll(region->page_size);
        part->pages = region->size >> part->shift;
        part->first = first;
        server->total += part->pages;
        first += (part->pages + 63) & ~63ull;
    }
    return 0;
}

static int make_pages(struct vu_faults *server)
{
    int error;
    uint64_t *sizes = calloc(server->part_count, sizeof *sizes);
    if (!sizes)
        return VU_E_NOMEM;
    for (uint32_t i = 0; i < server->part_count; i++)
        sizes[i] = server->parts[i].pages;
    server->pages = vu_pages_new(sizes, server->part_count, &error);
    free(sizes);
    return server->pages ? 0 : error;
}

static int make_loop(struct vu_faults *server)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = CONTROL_EVENT};
    server->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (server->epoll < 0)
        return VU_E_SYS;
    return epoll_ctl(server->epoll, EPOLL_CTL_ADD, server->config.control, &event) < 0 ? VU_E_SYS : 0;
}

static int make(struct vu_faults *server, const struct vu_fault_region *regions, uint32_t count)
{
    int code;
    if (!count || server->config.batch < 1 || server->config.batch > VU_FAULT_BATCH)
        return VU_E_SIZE;
    server->parts = calloc(count, sizeof *server->parts);
    if (!server->parts)
        return VU_E_NOMEM;
    server->part_count = count;
    server->mapped = regions->source != 0;
    code = fill_parts(server, regions);
    if (code == 0)
        code = make_pages(server);
    if (code == 0)
        code = vu_put_open(server);
    if (code == 0)
        code = vu_record_open(&server->record, server->config.events);
    return code == 0 ? make_loop(server) : code;
}

vu_faults *vu_faults_new(const struct vu_fault_config *config, const struct vu_fault_region *regions, uint32_t count,
                         int *error)
{
    struct vu_faults *server = calloc(1, sizeof *server);
    *error = VU_E_NOMEM;
    if (!server)
        return NULL;
    server->config = *config;
    server->epoll = -1;
    *error = make(server, regions, count);
    if (*error == 0 && (*error = vu_guard_install()) == 0)
        return server;
    int saved = errno;
    vu_faults_free(server);
    errno = saved;
    return NULL;
}

void vu_faults_free(vu_faults *server)
{
    for (uint32_t number = 0; server->pages && number < VU_PAGES_CLIENTS; number++)
        vu_faults_remove(server, number);
    if (server->parts)
        vu_put_close(server);
    if (server->pages)
        vu_pages_free(server->pages);
    if (server->epoll >= 0)
        close(server->epoll);
    vu_record_close(&server->record);
    free(server->parts);
    free(server);
}

vu_pages *vu_faults_pages(vu_faults *server)
{
    return server->pages;
}

/* ---- addresses --------------------------------------------------------------------------------------------------- */

const struct vu_fault_part *vu_fault_part_of(const struct vu_faults *server, uint64_t page)
{
    const struct vu_fault_part *part = server->parts;
    while (page - part->first >= part->pages)
        part++;
    return part;
}

/* The part that holds all of a range of whole pages, or NULL. */
static const struct vu_fault_part *find_part(const struct vu_faults *server, uint64_t guest, uint64_t length)
{
    for (uint32_t i = 0; i < server->part_count; i++) {
        const struct vu_fault_region *region = &server->parts[i].region;
        if (guest >= region->guest && guest - region->guest < region->size)
            return length <= region->size - (guest - region->guest) && !((guest | length) & (region->page_size - 1))
                       ? &server->parts[i] : NULL;
    }
    return NULL;
}

static uint64_t page_of(const struct vu_fault_part *part, uint64_t guest)
{
    return part->first + ((guest - part->region.guest) >> part->shift);
}

int64_t vu_faults_page(const vu_faults *server, uint64_t guest)
{
    const struct vu_fault_part *part = find_part(server, guest, 0);
    return part ? (int64_t)page_of(part, guest) : VU_E_RANGE;
}

/* ---- placing ----------------------------------------------------------------------------------------------------- */

static void kick(struct vu_faults *server)
{
    eventfd_write(server->mapped ? server->config.control : server->config.wanted, 1);
}

static void fail(struct vu_faults *server, int number)
{
    atomic_store(&server->error, (uint64_t)number);
    atomic_store(&server->paused, true);
    eventfd_write(server->config.notice, 1);
}

static uint64_t distinct_pages(const struct vu_wait *waits, uint32_t count)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < count; i++)
        pages += i == 0 || waits[i].page != waits[i - 1].page;
    return pages;
}

/* Claimed pages of one part are settled, and whoever waits for them is woken. */
static void settle(struct vu_faults *server, uint64_t first, uint64_t count, bool lost)
{
    struct vu_wait waits[VU_FAULT_BATCH];
    enum vu_wake_kind kind = lost ? VU_WAKE_LOST : VU_WAKE_PRESENT;
    uint32_t taken = vu_pages_settle(server->pages, first, count, lost, waits, VU_FAULT_BATCH);
    if (!lost)
        vu_fault_count(&server->demanded, distinct_pages(waits, taken));
    if (server->config.wake == VU_WAKE_BROADCAST && !lost)
        vu_wake_all(server, first, count, waits, taken);
    while (taken) {
        vu_wake_waits(server, waits, taken, kind);
        taken = taken < VU_FAULT_BATCH ? 0 : vu_pages_take(server->pages, first, count, waits, VU_FAULT_BATCH);
    }
    if (atomic_fetch_add(&server->settled, count) + count == server->total)
        eventfd_write(server->config.notice, 1);
}

static int place_claimed(struct vu_faults *server, const struct vu_fault_part *part, uint64_t first, uint64_t count,
                         const uint8_t *data)
{
    if (vu_put_pages(server, part, first, count, data) < 0) {
        int saved = errno;
        fail(server, saved);
        if (vu_pages_unclaim(server->pages, first, count))
            kick(server);
        errno = saved;
        return VU_E_SYS;
    }
    vu_fault_count(&server->placed, count);
    vu_record_add(server, VU_EVENT_PLACED, 0, first, count, server->record.size ? vu_clock_ns() : 0);
    settle(server, first, count, false);
    return 0;
}

static const uint8_t *mapped_bytes(const struct vu_fault_part *part, uint64_t page)
{
    return (const uint8_t *)part->region.source + ((page - part->first) << part->shift);
}

static uint32_t most_at_once(const struct vu_faults *server)
{
    return server->config.wake == VU_WAKE_BATCH ? server->config.batch : 1;
}

int64_t vu_faults_fill(vu_faults *server, uint64_t guest, uint64_t length)
{
    const struct vu_fault_part *part = find_part(server, guest, length);
    if (!part || !server->mapped)
        return VU_E_RANGE;
    uint64_t from = page_of(part, guest), end = from + (length >> part->shift), first;
    uint32_t count, most = most_at_once(server);
    int64_t placed = 0;
    while (!atomic_load(&server->paused) && !atomic_load(&server->stopping) &&
           (count = vu_pages_claim(server->pages, from, end, most, &first)) > 0) {
        if (place_claimed(server, part, first, count, mapped_bytes(part, first)) < 0)
            return VU_E_SYS;
        placed += count;
        from = first + count;
    }
    return placed;
}

int64_t vu_faults_place(vu_faults *server, uint64_t guest, uint64_t length, const void *data)
{
    const struct vu_fault_part *part = find_part(server, guest, length);
    if (!part)
        return VU_E_RANGE;
    uint64_t start = page_of(part, guest), end = start + (length >> part->shift), from = start, first;
    uint32_t count, most = most_at_once(server);
    int64_t placed = 0;
    while ((count = vu_pages_claim(server->pages, from, end, most, &first)) > 0) {
        const uint8_t *bytes = data ? (const uint8_t *)data + ((first - start) << part->shift) : NULL;
        if (place_claimed(server, part, first, count, bytes) < 0)
            return VU_E_SYS;
        placed += count;
        from = first + count;
    }
    vu_fault_count(&server->duplicates, end - start - (uint64_t)placed);
    return placed;
}

static uint64_t lose_pages(struct vu_faults *server, uint64_t from, uint64_t end)
{
    uint64_t first, lost = 0;
    uint32_t count;
    while ((count = vu_pages_claim(server->pages, from, end, VU_FAULT_BATCH, &first)) > 0) {
        vu_record_add(server, VU_EVENT_LOST, 0, first, count, vu_clock_ns());
        settle(server, first, count, true);
        lost += count;
        from = first + count;
    }
    return lost;
}

int64_t vu_faults_lose(vu_faults *server, uint64_t guest, uint64_t length)
{
    const struct vu_fault_part *part = find_part(server, guest, length);
    if (!part)
        return VU_E_RANGE;
    uint64_t from = page_of(part, guest);
    return (int64_t)lose_pages(server, from, from + (length >> part->shift));
}

/* ---- what others bring ------------------------------------------------------------------------------------------- */

int vu_faults_wanted(vu_faults *server, struct vu_fault_range *ranges, uint32_t max)
{
    uint64_t pages[VU_FAULT_BATCH];
    uint32_t count = vu_pages_wanted(server->pages, pages, max < VU_FAULT_BATCH ? max : VU_FAULT_BATCH);
    for (uint32_t i = 0; i < count; i++) {
        const struct vu_fault_part *part = vu_fault_part_of(server, pages[i]);
        ranges[i] = (struct vu_fault_range){vu_fault_guest(part, pages[i]), part->region.page_size};
    }
    return (int)count;
}

int vu_faults_missing(vu_faults *server, uint64_t guest, uint64_t length, uint64_t most, struct vu_fault_range *run)
{
    const struct vu_fault_part *part = find_part(server, guest, length);
    if (!part)
        return VU_E_RANGE;
    uint64_t from = page_of(part, guest), first, pages = most >> part->shift;
    uint32_t limit = pages > VU_FAULT_BATCH ? VU_FAULT_BATCH : pages ? (uint32_t)pages : 1;
    uint32_t count = vu_pages_missing(server->pages, from, from + (length >> part->shift), limit, &first);
    if (!count)
        return 0;
    *run = (struct vu_fault_range){vu_fault_guest(part, first), (uint64_t)count << part->shift};
    return 1;
}

int vu_faults_withhold(vu_faults *server, uint64_t guest, uint64_t length, int on)
{
    const struct vu_fault_part *part = find_part(server, guest, length);
    if (!part)
        return VU_E_RANGE;
    vu_pages_withhold(server->pages, page_of(part, guest), length >> part->shift, on);
    return 0;
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

/* A page that was placed and is not in the file any more was punched out of it, by a balloon say: it holds zeros now, and
 * nobody else brings them. Without them its threads would be woken and fault again for ever. */
static void refill_hole(struct vu_faults *server, uint64_t page)
{
    unsigned char resident = 1;
    const struct vu_fault_part *part = vu_fault_part_of(server, page);
    uint64_t host = part->region.host + ((page - part->first) << part->shift);
    if (mincore((void *)host, 1, &resident) == 0 && !(resident & 1))
        vu_put_hole(server, part, page);
}

/* A fault that came for a page that is settled already: an answer at once. Holds the client for the wake to release. */
static void answer(struct vu_faults *server, uint32_t number, uint64_t page, uint64_t since, bool lost)
{
    struct vu_wait wait = {page, since, number, 0};
    VU_CLIENT_COUNT(&server->clients[number], late, 1);
    if (!lost)
        refill_hole(server, page);
    if (vu_pages_hold(server->pages, number))
        vu_wake_waits(server, &wait, 1, lost ? VU_WAKE_LOST : VU_WAKE_PRESENT);
}

/* True if its page has to be asked for. */
static bool take_fault(struct vu_faults *server, uint32_t number, uint64_t address, uint64_t now)
{
    struct vu_fault_client *client = &server->clients[number];
    int64_t page = vu_client_page(client, address);
    VU_CLIENT_COUNT(client, faults, 1);
    if (page < 0) {
        VU_CLIENT_COUNT(client, stray, 1);
        return false;
    }
    vu_record_add(server, VU_EVENT_FAULT, number, (uint64_t)page, 1, now);
    int found = vu_pages_fault(server->pages, number, (uint64_t)page, now);
    VU_CLIENT_COUNT(client, merged_faults, found == VU_PAGE_MERGED);
    if (found == VU_PAGE_RECEIVED || found == VU_PAGE_LOST)
        answer(server, number, (uint64_t)page, now, found == VU_PAGE_LOST);
    return found == VU_PAGE_MISSING;
}

/* What is read has to be recorded, so room comes first; without it the messages stay where they are. */
static bool read_faults(struct vu_faults *server, uint32_t number)
{
    uint64_t addresses[VU_FAULT_BATCH], flags[VU_FAULT_BATCH];
    bool wanted = false;
    if (vu_pages_reserve(server->pages, VU_FAULT_BATCH) < 0) {
        poll(NULL, 0, 1);
        return false;
    }
    int count = vu_uffd_read(server->clients[number].uffd, addresses, flags, VU_FAULT_BATCH);
    uint64_t now = vu_clock_ns();
    for (int i = 0; i < count; i++)
        wanted |= take_fault(server, number, addresses[i], now);
    return wanted;
}

static void place_wanted(struct vu_faults *server)
{
    uint64_t pages[VU_FAULT_BATCH], first;
    uint32_t count;
    while (!atomic_load(&server->paused) && (count = vu_pages_wanted(server->pages, pages, VU_FAULT_BATCH)) > 0) {
        for (uint32_t i = 0; i < count && !atomic_load(&server->paused); i++) {
            const struct vu_fault_part *part = vu_fault_part_of(server, pages[i]);
            if (vu_pages_claim(server->pages, pages[i], pages[i] + 1, 1, &first) &&
                place_claimed(server, part, first, 1, mapped_bytes(part, first)) < 0)
                return;
        }
    }
}

/* Before the next client is looked at: what it would fault for may be there by then. */
static void bring(struct vu_faults *server)
{
    if (server->mapped)
        place_wanted(server);
    else
        eventfd_write(server->config.wanted, 1);
}

static void read_channel(struct vu_faults *server, struct vu_fault_client *client)
{
    if (!vu_wake_acknowledged(client))
        epoll_ctl(server->epoll, EPOLL_CTL_DEL, client->channel, NULL);
}

/* True if pages have to be asked for. */
static bool look_at(struct vu_faults *server, uint64_t event)
{
    uint32_t number = (uint32_t)event;
    bool wanted = false;
    eventfd_t count;
    if (event == CONTROL_EVENT) {
        eventfd_read(server->config.control, &count);
        return true;
    }
    if (!vu_pages_hold(server->pages, number))
        return false;
    if (event & VU_CHANNEL_EVENT)
        read_channel(server, &server->clients[number]);
    else
        wanted = read_faults(server, number);
    vu_client_release(server, number);
    return wanted;
}

/* A client whose process has ended gives no sign of it but this error. */
static void look_for_the_dead(struct vu_faults *server)
{
    uint64_t held = vu_pages_hold_all(server->pages);
    for (; held; held &= held - 1) {
        uint32_t number = (uint32_t)__builtin_ctzll(held);
        struct vu_fault_client *client = &server->clients[number];
        if (client->span_count && !vu_uffd_alive(client->uffd, client->spans->host))
            vu_client_gone(server, number);
        vu_client_release(server, number);
    }
}

static void give_up_overdue(struct vu_faults *server, uint64_t now)
{
    uint64_t pages[VU_FAULT_BATCH], deadline = server->config.deadline_ns;
    uint32_t count = 0;
    if (deadline && now > deadline)
        count = vu_pages_overdue(server->pages, now - deadline, pages, VU_FAULT_BATCH);
    for (uint32_t i = 0; i < count; i++)
        lose_pages(server, pages[i], pages[i] + 1);
}

static int tick_of(const struct vu_faults *server)
{
    uint64_t eighth = server->config.deadline_ns / 8000000;
    return !server->config.deadline_ns || eighth > TICK_MS ? TICK_MS : eighth ? (int)eighth : 1;
}

int vu_faults_serve(vu_faults *server)
{
    struct epoll_event events[EVENTS];
    int tick = tick_of(server);
    uint64_t looked = 0;
    while (!atomic_load(&server->stopping)) {
        int count = epoll_wait(server->epoll, events, EVENTS, tick);
        if (count < 0 && errno != EINTR)
            return VU_E_SYS;
        for (int i = 0; i < count; i++)
            if (look_at(server, events[i].data.u64))
                bring(server);
        uint64_t now = vu_clock_ns();
        if (now - looked < (uint64_t)tick * 1000000)
            continue;
        looked = now;
        look_for_the_dead(server);
        give_up_overdue(server, now);
    }
    return 0;
}

void vu_faults_stop(vu_faults *server)
{
    atomic_store(&server->stopping, true);
    eventfd_write(server->config.control, 1);
}

void vu_faults_pause(vu_faults *server, int on)
{
    atomic_store(&server->paused, on != 0);
    if (on)
        return;
    atomic_store(&server->error, 0);
    vu_pages_ask_again(server->pages);
    kick(server);
}

void vu_faults_stats(vu_faults *server, struct vu_server_stats *stats)
{
    *stats = (struct vu_server_stats){
        .placed = server->placed, .demanded = server->demanded, .zero = server->zero, .duplicates = server->duplicates,
        .present = server->present, .requests = server->requests, .paused = server->paused, .error = server->error,
    };
    vu_pages_counts(server->pages, &stats->pages);
}
