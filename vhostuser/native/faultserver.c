/*
 * The fault server: reads the faults of many userfaultfds, places their pages in one memory, wakes those who wait.
 *
 * What belongs here: its making, and the loop, which is entered by one thread. What does not: pages that come, which any
 * number of threads bring meanwhile (faultplace.c); the state and the argument why no wake-up is lost (faultpages.c).
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

/* Before the next client is looked at: what it would fault for may be there by then. */
static void bring(struct vu_faults *server)
{
    if (server->mapped)
        vu_fault_place_wanted(server);
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
        vu_fault_lose(server, pages[i], pages[i] + 1);
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

void vu_faults_ask_again(vu_faults *server)
{
    vu_pages_ask_again(server->pages);
    vu_fault_ask(server);
}

void vu_faults_pause(vu_faults *server, int on)
{
    atomic_store(&server->paused, on != 0);
    if (on)
        return;
    atomic_store(&server->error, 0);
    vu_faults_ask_again(server);
}

void vu_faults_stats(vu_faults *server, struct vu_server_stats *stats)
{
    *stats = (struct vu_server_stats){
        .placed = server->placed, .demanded = server->demanded, .zero = server->zero, .duplicates = server->duplicates,
        .present = server->present, .requests = server->requests, .paused = server->paused, .error = server->error,
    };
    vu_pages_counts(server->pages, &stats->pages);
}
