/*
 * Clients of a fault server: whose descriptors, where each has the memory, and how one leaves.
 *
 * What belongs here: making and closing a client, translating its addresses. What does not: reading its faults
 * (faultserver.c), waking it (faultwake.c), what it waits for (faultpages.c).
 *
 * A client's descriptors are used by whoever holds its number and closed by the one who learns that nobody does any
 * more. Its number becomes free when they are closed and vu_faults_remove was called, so its counters can be read until
 * then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fault.h"

enum { CLOSED = 1, REMOVED = 2 };

static int watch(const struct vu_faults *server, int fd, uint64_t data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};
    return epoll_ctl(server->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? VU_E_SYS : 0;
}

/* Others have duplicates, so closing alone would not end the watch. */
static void unwatch(const struct vu_faults *server, struct vu_fault_client *client)
{
    epoll_ctl(server->epoll, EPOLL_CTL_DEL, client->uffd, NULL);
    if (client->channel >= 0)
        epoll_ctl(server->epoll, EPOLL_CTL_DEL, client->channel, NULL);
}

static void mark(struct vu_faults *server, uint32_t number, unsigned flag)
{
    unsigned before = atomic_fetch_or(&server->clients[number].state, flag);
    if ((before | flag) == (CLOSED | REMOVED) && before != (CLOSED | REMOVED))
        vu_pages_vacate(server->pages, number);
}

static void close_client(struct vu_faults *server, uint32_t number)
{
    struct vu_fault_client *client = &server->clients[number];
    close(client->uffd);
    if (client->channel >= 0)
        close(client->channel);
    free(client->spans);
    client->spans = NULL;
    client->uffd = client->channel = -1;
    mark(server, number, CLOSED);
}

/* ---- coming ------------------------------------------------------------------------------------------------------ */

static int translate_span(const struct vu_faults *server, const struct vu_fault_span *span, struct vu_client_span *made)
{
    int64_t first = vu_faults_page(server, span->guest);
    if (first < 0)
        return VU_E_RANGE;
    const struct vu_fault_part *part = vu_fault_part_of(server, (uint64_t)first);
    uint64_t page_size = part->region.page_size;
    if ((span->guest | span->size | span->host) & (page_size - 1))
        return VU_E_ALIGN;
    *made = (struct vu_client_span){span->host, (uint64_t)first, span->size >> part->shift, part};
    return made->pages > part->first + part->pages - made->first ? VU_E_RANGE : 0;
}

static int fill_client(struct vu_faults *server, struct vu_fault_client *client, const struct vu_fault_span *spans,
                       uint32_t count)
{
    memset(client, 0, sizeof *client);
    client->spans = calloc(count ? count : 1, sizeof *client->spans);
    if (!client->spans)
        return VU_E_NOMEM;
    for (client->span_count = 0; client->span_count < count; client->span_count++) {
        uint32_t i = client->span_count;
        int code = translate_span(server, &spans[i], &client->spans[i]);
        if (code < 0)
            return code;
    }
    return 0;
}

int vu_faults_add(vu_faults *server, int uffd, int channel, uint32_t ranges, const struct vu_fault_span *spans,
                  uint32_t count)
{
    int number = vu_pages_join(server->pages);
    if (number < 0) {
        close(uffd);
        if (channel >= 0)
            close(channel);
        return number;
    }
    struct vu_fault_client *client = &server->clients[number];
    int code = fill_client(server, client, spans, count);
    client->uffd = uffd;
    client->channel = channel;
    client->ranges = ranges;
    vu_pages_admit(server->pages, (uint32_t)number); /* before its faults can be read */
    if (code == 0)
        code = watch(server, uffd, (uint64_t)number);
    if (code == 0 && channel >= 0)
        code = watch(server, channel, (uint64_t)number | VU_CHANNEL_EVENT);
    if (code == 0)
        return number;
    int saved = errno;
    vu_faults_remove(server, (uint32_t)number);
    errno = saved;
    return code;
}

/* ---- going ------------------------------------------------------------------------------------------------------- */

void vu_client_release(struct vu_faults *server, uint32_t number)
{
    if (vu_pages_release(server->pages, number))
        close_client(server, number);
}

void vu_client_gone(struct vu_faults *server, uint32_t number)
{
    struct vu_fault_client *client = &server->clients[number];
    if (atomic_exchange(&client->counters[VU_CLIENT_COUNTER(gone)], 1))
        return;
    unwatch(server, client);
    vu_pages_leave(server->pages, number);
    vu_record_add(server, VU_EVENT_GONE, number, 0, 0, vu_clock_ns());
    eventfd_write(server->config.notice, 1);
}

int vu_faults_remove(vu_faults *server, uint32_t number)
{
    if (vu_pages_hold(server->pages, number)) {
        struct vu_fault_client *client = &server->clients[number];
        unwatch(server, client);
        vu_wake_everything(client);
        vu_pages_leave(server->pages, number);
        vu_client_release(server, number);
    }
    mark(server, number, REMOVED);
    return 0;
}

/* ---- addresses --------------------------------------------------------------------------------------------------- */

int64_t vu_client_page(const struct vu_fault_client *client, uint64_t address)
{
    for (uint32_t i = 0; i < client->span_count; i++) {
        const struct vu_client_span *span = &client->spans[i];
        uint64_t page = (address - span->host) >> span->part->shift;
        if (address >= span->host && page < span->pages)
            return (int64_t)(span->first + page);
    }
    return -1;
}

uint64_t vu_client_address(const struct vu_fault_client *client, uint64_t page)
{
    for (uint32_t i = 0; i < client->span_count; i++) {
        const struct vu_client_span *span = &client->spans[i];
        if (page >= span->first && page - span->first < span->pages)
            return span->host + ((page - span->first) << span->part->shift);
    }
    return 0;
}

void vu_faults_client_stats(const vu_faults *server, uint32_t number, struct vu_client_stats *stats)
{
    uint64_t *out = (uint64_t *)stats;
    for (size_t i = 0; i < VU_FAULT_COUNTERS; i++)
        out[i] = atomic_load_explicit(&server->clients[number].counters[i], memory_order_relaxed);
}
