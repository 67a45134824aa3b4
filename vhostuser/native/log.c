/*
 * The dirty log: a bit for each page of guest memory that was written.
 *
 * What belongs here: its life, marking pages, and taking the marks away as a front-end does. What does not: who has
 * written what (queue.c, split.c), mapping files (memory.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

#define LOG_PAGE 4096

struct vu_log {
    _Atomic uint32_t references;
    uint64_t size; /* bytes */
    struct vu_mapping mapping;
    int event;             /* told of changes, or -1 */
    _Atomic bool untold; /* marked since that was signalled */
};

vu_log *vu_log_map(int fd, uint64_t size, uint64_t offset, int *error)
{
    vu_log *log = calloc(1, sizeof *log);
    *error = log ? vu_guard_install() : VU_E_NOMEM;
    if (!*error)
        *error = vu_mapping_open(&log->mapping, fd, offset, size);
    if (*error) {
        int number = errno;
        free(log);
        errno = number;
        return NULL;
    }
    atomic_init(&log->references, 1);
    atomic_init(&log->untold, false);
    log->size = size;
    log->event = -1;
    return log;
}

void vu_log_get(vu_log *log)
{
    atomic_fetch_add(&log->references, 1);
}

void vu_log_put(vu_log *log)
{
    if (!log || atomic_fetch_sub(&log->references, 1) != 1)
        return;
    vu_mapping_close(&log->mapping);
    free(log);
}

void vu_log_set_event(vu_log *log, int fd)
{
    log->event = fd;
}

void vu_log_tell(vu_log *log)
{
    if (log->event >= 0 && atomic_exchange(&log->untold, false))
        vu_event_signal(log->event);
}

struct vu_span vu_log_span(const vu_log *log)
{
    return log->mapping.span;
}

int vu_log_check(const vu_log *log, uint64_t guest, uint64_t length)
{
    if (vu_wraps(guest, length))
        return VU_E_OVERFLOW;
    return length && (guest + length - 1) / LOG_PAGE / 8 >= log->size ? VU_E_RANGE : 0;
}

/* A locked or even where the bit is set already: the reader takes bits away by an exchange, and a plain look could be
 * answered before our data is visible, the page copied without it, and the bit gone. */
int vu_log_set(vu_log *log, uint64_t guest, uint64_t length)
{
    int code = vu_log_check(log, guest, length);
    if (code || !length)
        return code;
    uint64_t page = guest / LOG_PAGE, last = (guest + length - 1) / LOG_PAGE;
    while (page <= last) {
        uint64_t end = page | 7; /* the last page of this byte of the log */
        end = end < last ? end : last;
        uint8_t bits = (uint8_t)((0xffu >> (7 - (end - page))) << (page & 7));
        __atomic_fetch_or(&log->mapping.at[page / 8], bits, __ATOMIC_SEQ_CST);
        page = end + 1;
    }
    if (log->event >= 0)
        atomic_store_explicit(&log->untold, true, memory_order_relaxed);
    return 0;
}

/* Pages of one byte of the log, as runs; the last run goes on where it can. Returns how many runs there are then. */
static uint32_t append(vu_range *ranges, uint32_t count, uint64_t first, uint8_t bits)
{
    for (uint64_t page = first; bits; page++, bits >>= 1) {
        if (!(bits & 1))
            continue;
        if (count && ranges[count - 1].guest + ranges[count - 1].length == page * LOG_PAGE)
            ranges[count - 1].length += LOG_PAGE;
        else
            ranges[count++] = (vu_range){page * LOG_PAGE, LOG_PAGE};
    }
    return count;
}

static uint32_t take_marks(vu_log *log, uint64_t *page, vu_range *ranges, uint32_t max)
{
    uint8_t *at = log->mapping.at;
    uint32_t count = 0;
    uint64_t byte = *page / 8, word;
    while (byte < log->size && count + VU_LOG_RANGES <= max) {
        if (log->size - byte >= sizeof word && (memcpy(&word, at + byte, sizeof word), !word)) {
            byte += sizeof word;
            continue;
        }
        uint8_t bits = __atomic_load_n(at + byte, __ATOMIC_RELAXED);
        if (bits)
            count = append(ranges, count, byte * 8, __atomic_exchange_n(at + byte, 0, __ATOMIC_SEQ_CST));
        byte++;
    }
    *page = byte * 8;
    return count;
}

int vu_log_take(vu_log *log, uint64_t *page, vu_range *ranges, uint32_t max)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, NULL))
        return VU_E_FAULT;
    guard.extra[0] = log->mapping.span;
    int count = (int)take_marks(log, page, ranges, max);
    vu_guard_leave(&guard);
    return count;
}

int vu_log_mark(vu_log *log, uint64_t guest, uint64_t length)
{
    struct vu_guard guard;
    if (VU_GUARD(&guard, NULL))
        return VU_E_FAULT;
    guard.extra[0] = log->mapping.span;
    int code = vu_log_set(log, guest, length);
    vu_guard_leave(&guard);
    vu_log_tell(log);
    return code;
}
