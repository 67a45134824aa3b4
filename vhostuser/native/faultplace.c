/*
 * Pages that come, from whoever brings them: claimed, put where clients find them, settled, and who waits is woken.
 *
 * What belongs here: the order of these steps, from any thread. What does not: who sees that a page is missing
 * (faultserver.c), the state and the argument why no wake-up is lost (faultpages.c), how a page is put (faultput.c) and
 * a client woken (faultwake.c), sources that are not mapped: those ask vu_faults_wanted what to bring and bring it with
 * vu_faults_place.
 */
#include <errno.h>
#include <sys/eventfd.h>

#include "fault.h"

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

void vu_fault_ask(struct vu_faults *server)
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
            vu_fault_ask(server);
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

uint64_t vu_fault_lose(struct vu_faults *server, uint64_t from, uint64_t end)
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
    return (int64_t)vu_fault_lose(server, from, from + (length >> part->shift));
}

void vu_fault_place_wanted(struct vu_faults *server)
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
