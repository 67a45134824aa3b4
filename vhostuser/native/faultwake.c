/*
 * Waking clients, merged where their pages are neighbours.
 *
 * What belongs here: the three ways to wake (by the client's userfaultfd, by a message of the wake channel, by mapping
 * the page for it) and the counters of it. What does not: who has to be woken (faultpages.c).
 *
 * A wake by the channel that finds no room in the socket is made by the descriptor instead, so a slow back-end holds up
 * nobody and loses nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "fault.h"

/* As protocol/wake.py lays them out. */
enum { KIND_WAKE = 2, KIND_ACK = 3 };

struct wake_message {
    uint32_t kind, count;
    uint64_t id;
    struct vu_fault_range ranges[VU_FAULT_BATCH];
};

struct ack_message {
    uint32_t kind, status;
    uint64_t id, issued;
};

/* Neighbouring pages of one client. */
struct run {
    struct vu_fault_client *client;
    uint32_t number;
    const struct vu_fault_part *part;
    uint64_t first, count, host;
};

static uint64_t length_of(const struct run *run)
{
    return run->count << run->part->shift;
}

/* ---- by its userfaultfd ------------------------------------------------------------------------------------------ */

typedef int64_t placing(int uffd, uint64_t host, uint64_t length);

static int64_t map_page(int uffd, uint64_t host, uint64_t length)
{
    return vu_uffd_continue(uffd, host, length, 1);
}

/* What wakes as it places, page after page; for a page that has something already, and where the kernel refuses, a
 * plain wake: the thread looks again. */
static int place_for(const struct run *run, placing *place)
{
    uint64_t at = run->host, end = at + length_of(run), page_size = run->part->region.page_size;
    while (at < end) {
        int64_t done = place(run->client->uffd, at, end - at);
        if (done < 0 && errno == EAGAIN)
            continue;
        if (done < 0 && errno == ESRCH)
            return VU_E_SYS;
        if (done < 0) {
            VU_CLIENT_COUNT(run->client, refused, errno != EEXIST);
            vu_uffd_wake(run->client->uffd, at, page_size);
            done = (int64_t)page_size;
        }
        at += (uint64_t)done;
    }
    return 0;
}

static void wake_run(struct vu_faults *server, const struct run *run, enum vu_wake_kind kind)
{
    int code = 0;
    if (kind == VU_WAKE_LOST)
        code = place_for(run, vu_uffd_poison);
    else if (server->config.put == VU_PUT_CONTINUE)
        code = place_for(run, map_page);
    else
        VU_CLIENT_COUNT(run->client, refused, vu_uffd_wake(run->client->uffd, run->host, length_of(run)) < 0);
    if (code < 0)
        vu_client_gone(server, run->number);
}

void vu_wake_everything(struct vu_fault_client *client)
{
    for (uint32_t i = 0; i < client->span_count; i++)
        vu_uffd_wake(client->uffd, client->spans[i].host, client->spans[i].pages << client->spans[i].part->shift);
}

/* ---- by the wake channel ----------------------------------------------------------------------------------------- */

static bool uses_channel(const struct vu_faults *server, const struct vu_fault_client *client, enum vu_wake_kind kind)
{
    return client->channel >= 0 && kind == VU_WAKE_PRESENT && server->config.put != VU_PUT_CONTINUE &&
           !atomic_load_explicit(&client->silent, memory_order_relaxed);
}

static bool send_wake(struct vu_fault_client *client, const struct run *runs, uint32_t count)
{
    struct wake_message message = {.kind = KIND_WAKE, .count = count};
    for (uint32_t i = 0; i < count; i++)
        message.ranges[i] = (struct vu_fault_range){vu_fault_guest(runs[i].part, runs[i].first), length_of(&runs[i])};
    message.id = atomic_fetch_add_explicit(&client->messages, 1, memory_order_relaxed) + 1;
    size_t size = offsetof(struct wake_message, ranges) + count * sizeof *message.ranges;
    if (send(client->channel, &message, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return false;
    VU_CLIENT_COUNT(client, channel, 1);
    return true;
}

/* A back-end that closes the channel, or breaks its rules, may have left messages unread: from now on, and for all that
 * is under way, its userfaultfd. */
bool vu_wake_acknowledged(struct vu_fault_client *client)
{
    struct ack_message ack;
    for (;;) {
        ssize_t size = recv(client->channel, &ack, sizeof ack, MSG_DONTWAIT | MSG_TRUNC);
        if (size < 0 && (errno == EAGAIN || errno == EINTR))
            return true;
        if (size != (ssize_t)sizeof ack || ack.kind != KIND_ACK) {
            atomic_store(&client->silent, true);
            vu_wake_everything(client);
            return false;
        }
        VU_CLIENT_COUNT(client, acknowledged, ack.issued);
    }
}

/* ---- whom -------------------------------------------------------------------------------------------------------- */

static void wake_runs(struct vu_faults *server, const struct run *runs, uint32_t count, enum vu_wake_kind kind)
{
    struct vu_fault_client *client = runs->client;
    uint32_t sent = 0;
    VU_CLIENT_COUNT(client, wakes, count);
    while (uses_channel(server, client, kind) && sent < count) {
        uint32_t some = count - sent < client->ranges ? count - sent : client->ranges;
        if (!send_wake(client, runs + sent, some))
            break;
        sent += some;
    }
    for (uint32_t i = sent; i < count; i++)
        wake_run(server, &runs[i], kind);
}

static void count_wait(struct vu_fault_client *client, uint64_t ns)
{
    VU_CLIENT_COUNT(client, woken, 1);
    VU_CLIENT_COUNT(client, blocked_ns, ns);
    VU_CLIENT_COUNT(client, histogram[vu_bucket(ns)], 1);
}

static struct run run_of(struct vu_faults *server, const struct vu_wait *wait)
{
    struct vu_fault_client *client = &server->clients[wait->client];
    const struct vu_fault_part *part = vu_fault_part_of(server, wait->page);
    return (struct run){client, wait->client, part, wait->page, 1, vu_client_address(client, wait->page)};
}

/* The waits of one client, in the order of their pages, become runs: their number. */
static uint32_t merge(struct vu_faults *server, const struct vu_wait *waits, uint32_t count, struct run *runs)
{
    struct run *last = runs;
    *last = run_of(server, waits);
    for (uint32_t i = 1; i < count; i++) {
        struct run next = run_of(server, &waits[i]);
        if (server->config.wake == VU_WAKE_BATCH && next.part == last->part &&
            next.first == last->first + last->count && next.host == last->host + length_of(last))
            last->count++;
        else
            *++last = next;
    }
    return (uint32_t)(last - runs) + 1;
}

/* Counted before it is done: whoever sees that a thread goes on finds its wake in the counters. */
static void wake_client(struct vu_faults *server, const struct vu_wait *waits, uint32_t count, enum vu_wake_kind kind)
{
    struct run runs[VU_FAULT_BATCH];
    struct vu_fault_client *client = &server->clients[waits->client];
    uint32_t made = merge(server, waits, count, runs);
    uint64_t now = vu_clock_ns();
    VU_CLIENT_COUNT(client, merged_wakes, count - made);
    for (uint32_t i = 0; i < count; i++)
        count_wait(client, now - waits[i].since);
    for (uint32_t i = 0; i < made; i++)
        vu_record_add(server, VU_EVENT_WOKEN, waits->client, runs[i].first, runs[i].count, now);
    wake_runs(server, runs, made, kind);
}

static bool comes_before(const struct vu_wait *a, const struct vu_wait *b)
{
    return a->client != b->client ? a->client < b->client : a->page < b->page;
}

/* Few, and mostly in order. */
static void sort(struct vu_wait *waits, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++) {
        struct vu_wait wait = waits[i];
        uint32_t at = i;
        for (; at > 0 && comes_before(&wait, &waits[at - 1]); at--)
            waits[at] = waits[at - 1];
        waits[at] = wait;
    }
}

void vu_wake_waits(struct vu_faults *server, struct vu_wait *waits, uint32_t count, enum vu_wake_kind kind)
{
    sort(waits, count);
    for (uint32_t start = 0, end; start < count; start = end) {
        for (end = start + 1; end < count && waits[end].client == waits[start].client; end++)
            ;
        wake_client(server, waits + start, end - start, kind);
    }
    for (uint32_t i = 0; i < count; i++)
        vu_client_release(server, waits[i].client);
}

void vu_wake_all(struct vu_faults *server, uint64_t first, uint64_t count, const struct vu_wait *waits, uint32_t waited)
{
    uint64_t held = vu_pages_hold_all(server->pages), idle = held;
    for (uint32_t i = 0; i < waited; i++)
        idle &= ~(1ull << waits[i].client);
    for (; held; held &= held - 1) {
        uint32_t number = (uint32_t)__builtin_ctzll(held);
        struct vu_fault_client *client = &server->clients[number];
        uint64_t host = vu_client_address(client, first);
        if (idle >> number & 1 && host) {
            struct run run = {client, number, vu_fault_part_of(server, first), first, count, host};
            VU_CLIENT_COUNT(client, spurious, 1);
            wake_runs(server, &run, 1, VU_WAKE_PRESENT);
        }
        vu_client_release(server, number);
    }
}
