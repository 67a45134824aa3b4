/*
 * The state of a fault server: which pages have been received, who waits for which, and the lock over both.
 *
 * What belongs here: the steps that change that state, each atomic. What does not: descriptors, addresses, system calls
 * that place or wake (faultput.c, faultwake.c), and the order in which they are made (faultplace.c).
 *
 * No lost wake-up. A thread T of client C sleeps on page P, in the kernel's queue of C's userfaultfd, and the page is
 * placed once. The server does, in any number of threads and in any interleaving:
 *
 *     fault:      read T's message
 *                 record: add (P, C) to the waits, unless P is settled: then the answer is "received"
 *                 wake C if it was
 *     placement:  put P where C can find it
 *                 settle: mark P, and take all waits for P
 *                 wake each client that was taken
 *
 * "record" and "settle" are each one step under the lock, so one of them is first.
 *   - record first: settle finds (P, C) and wakes C. T was in the kernel's queue before its message could be read, so
 *     before record, before settle, before this wake: the wake finds it.
 *   - settle first: record answers "received" and C is woken. That wake, too, comes after the message was read.
 * A message that nobody has read yet is in neither case lost: the descriptor stays readable until it is read or its
 * thread is woken. In both cases the wake comes after the put, so T, looking again, finds P. Several threads of C that
 * wait for P share one entry: whoever's message is read before settle is in the kernel's queue before it, and the one
 * wake takes all; a message read after settle makes its own wake. A page whose placement failed is not marked and keeps
 * its waits, which become wanted again. A client that leaves takes its waits with it and nobody else's.
 *
 * The claim keeps two placers off one page: for ways of placing in which the kernel does not (a write into the file),
 * the second would overwrite what the guest has written meanwhile.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

enum { WORD = 64, FRESH = 0, ASKED = 1, FIRST = 2, LEAST = 64 }; /* waits 0 and 1 are the ends of the two lists */

struct entry {
    uint64_t page, since;
    uint32_t client;
    uint32_t sibling;       /* another client's wait for the same page; 0: none */
    uint32_t before, after; /* in its list, or, by `after`, among the free ones */
    bool asked;
};

struct member {
    bool taken, active; /* taken and not active: not admitted yet, or has left and is still held or not vacated */
    uint32_t holds;
};

struct vu_pages {
    pthread_mutex_t lock; /* the lock: of everything below */
    uint64_t words, total, received_count, lost_count, waiting_count;
    _Atomic uint64_t *received; /* shared with whoever maps the memfd */
    uint64_t *claimed;          /* being placed, or settled, or between two regions */
    uint64_t *lost, *withheld;
    uint32_t *waiting;          /* by page: its first wait, or 0 */
    struct entry *waits;
    uint32_t capacity, free;    /* free: the first free wait, or 0 */
    struct member members[VU_PAGES_CLIENTS];
    int fd;
};

static bool bit(const uint64_t *words, uint64_t page)
{
    return words[page / WORD] >> page % WORD & 1;
}

/* The bits of [first, first + count), which lie in one word. */
static uint64_t span_mask(uint64_t first, uint64_t count)
{
    return (count == WORD ? ~0ull : (1ull << count) - 1) << first % WORD;
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

static void link_before(struct vu_pages *pages, uint32_t end, uint32_t number)
{
    struct entry *waits = pages->waits;
    waits[number].before = waits[end].before;
    waits[number].after = end;
    waits[waits[end].before].after = number;
    waits[end].before = number;
}

static void unlink_wait(struct vu_pages *pages, uint32_t number)
{
    struct entry *waits = pages->waits;
    waits[waits[number].before].after = waits[number].after;
    waits[waits[number].after].before = waits[number].before;
}

static void free_waits(struct vu_pages *pages, uint32_t from)
{
    for (uint32_t number = from; number < pages->capacity; number++) {
        pages->waits[number].after = pages->free;
        pages->free = number;
    }
}

static int grow(struct vu_pages *pages)
{
    uint32_t before = pages->capacity, capacity = before ? before * 2 : LEAST;
    struct entry *waits = realloc(pages->waits, capacity * sizeof *waits);
    if (!waits)
        return VU_E_NOMEM;
    pages->waits = waits;
    pages->capacity = capacity;
    if (!before) {
        waits[FRESH] = (struct entry){.before = FRESH, .after = FRESH};
        waits[ASKED] = (struct entry){.before = ASKED, .after = ASKED};
    }
    free_waits(pages, before ? before : FIRST);
    return 0;
}

/* Sealed before anybody else has it: our own mapping is the last that can write. */
static int share_received(struct vu_pages *pages)
{
    size_t size = pages->words * sizeof(uint64_t);
    pages->fd = memfd_create("received pages", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (pages->fd < 0 || ftruncate(pages->fd, (off_t)size) < 0)
        return VU_E_SYS;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, pages->fd, 0);
    if (at == MAP_FAILED)
        return VU_E_SYS;
    pages->received = at;
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    return fcntl(pages->fd, F_ADD_SEALS, seals) < 0 ? VU_E_SYS : 0;
}

static int make_arrays(struct vu_pages *pages)
{
    int code = share_received(pages);
    if (code < 0)
        return code;
    pages->claimed = calloc(pages->words, sizeof(uint64_t));
    pages->lost = calloc(pages->words, sizeof(uint64_t));
    pages->withheld = calloc(pages->words, sizeof(uint64_t));
    pages->waiting = calloc(pages->words * WORD, sizeof(uint32_t));
    if (!pages->claimed || !pages->lost || !pages->withheld || !pages->waiting)
        return VU_E_NOMEM;
    return grow(pages);
}

/* What lies between the last page of a region and the first of the next can never be claimed. */
static void close_gaps(struct vu_pages *pages, const uint64_t *sizes, uint32_t regions)
{
    uint64_t word = 0;
    for (uint32_t i = 0; i < regions; i++) {
        word += (sizes[i] + WORD - 1) / WORD;
        if (sizes[i] % WORD)
            pages->claimed[word - 1] = ~span_mask(0, sizes[i] % WORD);
    }
}

vu_pages *vu_pages_new(const uint64_t *sizes, uint32_t regions, int *error)
{
    struct vu_pages *pages = calloc(1, sizeof *pages);
    *error = VU_E_NOMEM;
    if (!pages)
        return NULL;
    pages->fd = -1;
    for (uint32_t i = 0; i < regions; i++) {
        pages->total += sizes[i];
        pages->words += (sizes[i] + WORD - 1) / WORD;
    }
    pthread_mutex_init(&pages->lock, NULL);
    *error = pages->words ? make_arrays(pages) : VU_E_SIZE;
    if (*error < 0) {
        vu_pages_free(pages);
        return NULL;
    }
    close_gaps(pages, sizes, regions);
    return pages;
}

void vu_pages_free(vu_pages *pages)
{
    if (pages->received)
        munmap((void *)pages->received, pages->words * sizeof(uint64_t));
    if (pages->fd >= 0)
        close(pages->fd);
    free(pages->claimed);
    free(pages->lost);
    free(pages->withheld);
    free(pages->waiting);
    free(pages->waits);
    pthread_mutex_destroy(&pages->lock);
    free(pages);
}

int vu_pages_fd(const vu_pages *pages)
{
    return pages->fd;
}

void vu_pages_counts(vu_pages *pages, struct vu_pages_count *counts)
{
    pthread_mutex_lock(&pages->lock);
    *counts = (struct vu_pages_count){pages->total, pages->received_count, pages->lost_count, pages->waiting_count};
    pthread_mutex_unlock(&pages->lock);
}

/* ---- waits, with the lock held ----------------------------------------------------------------------------------- */

static void set_asked(struct vu_pages *pages, uint32_t number, bool asked)
{
    if (pages->waits[number].asked == asked)
        return;
    unlink_wait(pages, number);
    /* What is asked for again has waited longest: to the front. */
    link_before(pages, asked ? ASKED : pages->waits[FRESH].after, number);
    pages->waits[number].asked = asked;
}

static void set_page_asked(struct vu_pages *pages, uint64_t page, bool asked)
{
    for (uint32_t number = pages->waiting[page]; number; number = pages->waits[number].sibling)
        set_asked(pages, number, asked);
}

/* A second client shares the question that was asked for the first. */
static int add_wait(struct vu_pages *pages, uint32_t client, uint64_t page, uint64_t now)
{
    if (!pages->free && grow(pages) < 0)
        return VU_E_NOMEM;
    uint32_t number = pages->free, sibling = pages->waiting[page];
    bool asked = sibling && pages->waits[sibling].asked;
    pages->free = pages->waits[number].after;
    pages->waits[number] =
        (struct entry){.page = page, .since = now, .client = client, .sibling = sibling, .asked = asked};
    link_before(pages, asked ? ASKED : FRESH, number);
    pages->waiting[page] = number;
    pages->waiting_count++;
    return VU_PAGE_MISSING;
}

static void drop_wait(struct vu_pages *pages, uint32_t number)
{
    struct entry *wait = &pages->waits[number];
    uint32_t *link = &pages->waiting[wait->page];
    while (*link != number)
        link = &pages->waits[*link].sibling;
    *link = wait->sibling;
    unlink_wait(pages, number);
    wait->after = pages->free;
    pages->free = number;
    pages->waiting_count--;
}

static bool waits_already(const struct vu_pages *pages, uint32_t client, uint64_t page)
{
    uint32_t number = pages->waiting[page];
    while (number && pages->waits[number].client != client)
        number = pages->waits[number].sibling;
    return number != 0;
}

static uint32_t take_waits(struct vu_pages *pages, uint64_t first, uint64_t count, struct vu_wait *waits, uint32_t max)
{
    uint32_t taken = 0;
    for (uint64_t page = first; page < first + count && pages->waiting_count; page++) {
        for (uint32_t number; taken < max && (number = pages->waiting[page]); taken++) {
            struct entry *wait = &pages->waits[number];
            waits[taken] = (struct vu_wait){page, wait->since, wait->client, wait->asked};
            pages->members[wait->client].holds++;
            drop_wait(pages, number);
        }
    }
    return taken;
}

/* ---- clients ----------------------------------------------------------------------------------------------------- */

int vu_pages_join(vu_pages *pages)
{
    int found = VU_E_SIZE;
    pthread_mutex_lock(&pages->lock);
    for (int client = 0; client < VU_PAGES_CLIENTS && found < 0; client++) {
        if (pages->members[client].taken)
            continue;
        pages->members[client] = (struct member){.taken = true};
        found = client;
    }
    pthread_mutex_unlock(&pages->lock);
    return found;
}

void vu_pages_admit(vu_pages *pages, uint32_t client)
{
    pthread_mutex_lock(&pages->lock);
    pages->members[client].active = true;
    pthread_mutex_unlock(&pages->lock);
}

int vu_pages_hold(vu_pages *pages, uint32_t client)
{
    pthread_mutex_lock(&pages->lock);
    int active = pages->members[client].active;
    pages->members[client].holds += (uint32_t)active;
    pthread_mutex_unlock(&pages->lock);
    return active;
}

uint64_t vu_pages_hold_all(vu_pages *pages)
{
    uint64_t held = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint32_t client = 0; client < VU_PAGES_CLIENTS; client++) {
        if (!pages->members[client].active)
            continue;
        pages->members[client].holds++;
        held |= 1ull << client;
    }
    pthread_mutex_unlock(&pages->lock);
    return held;
}

int vu_pages_leave(vu_pages *pages, uint32_t client)
{
    pthread_mutex_lock(&pages->lock);
    struct member *member = &pages->members[client];
    int last = member->active && member->holds == 0;
    member->active = false;
    for (uint32_t list = FRESH; list <= ASKED; list++) {
        for (uint32_t next, number = pages->waits[list].after; number != list; number = next) {
            next = pages->waits[number].after;
            if (pages->waits[number].client == client)
                drop_wait(pages, number);
        }
    }
    pthread_mutex_unlock(&pages->lock);
    return last;
}

int vu_pages_release(vu_pages *pages, uint32_t client)
{
    pthread_mutex_lock(&pages->lock);
    struct member *member = &pages->members[client];
    int last = --member->holds == 0 && !member->active;
    pthread_mutex_unlock(&pages->lock);
    return last;
}

void vu_pages_vacate(vu_pages *pages, uint32_t client)
{
    pthread_mutex_lock(&pages->lock);
    pages->members[client].taken = false;
    pthread_mutex_unlock(&pages->lock);
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

int vu_pages_reserve(vu_pages *pages, uint32_t count)
{
    int code = 0;
    pthread_mutex_lock(&pages->lock);
    while (code == 0 && pages->capacity - FIRST - pages->waiting_count < count)
        code = grow(pages);
    pthread_mutex_unlock(&pages->lock);
    return code;
}

/* "record". */
int vu_pages_fault(vu_pages *pages, uint32_t client, uint64_t page, uint64_t now)
{
    int answer;
    pthread_mutex_lock(&pages->lock);
    if (!pages->members[client].active)
        answer = VU_E_CLOSED;
    else if (atomic_load_explicit(&pages->received[page / WORD], memory_order_relaxed) >> page % WORD & 1)
        answer = VU_PAGE_RECEIVED;
    else if (bit(pages->lost, page))
        answer = VU_PAGE_LOST;
    else if (waits_already(pages, client, page))
        answer = VU_PAGE_MERGED;
    else
        answer = add_wait(pages, client, page, now);
    pthread_mutex_unlock(&pages->lock);
    return answer;
}

uint32_t vu_pages_wanted(vu_pages *pages, uint64_t *found, uint32_t max)
{
    uint32_t count = 0;
    pthread_mutex_lock(&pages->lock);
    for (; count < max && pages->waits[FRESH].after != FRESH; count++) {
        found[count] = pages->waits[pages->waits[FRESH].after].page;
        set_page_asked(pages, found[count], true);
    }
    pthread_mutex_unlock(&pages->lock);
    return count;
}

/* Which of these withheld pages, all of one word, nobody waits for. */
static uint64_t kept_back(const struct vu_pages *pages, uint64_t word, uint64_t withheld)
{
    uint64_t kept = withheld;
    for (; withheld; withheld &= withheld - 1) {
        int page = __builtin_ctzll(withheld);
        if (pages->waiting[word * WORD + (uint64_t)page])
            kept &= ~(1ull << page);
    }
    return kept;
}

/* A run never crosses a word: neither does it cross regions, since each begins with a word of its own. */
static uint32_t find_run(const struct vu_pages *pages, uint64_t from, uint64_t to, uint32_t most, uint64_t *first)
{
    while (from < to) {
        uint64_t word = from / WORD, count = WORD - from % WORD;
        uint64_t open = span_mask(from, to - from < count ? to - from : count) & ~pages->claimed[word];
        open &= ~kept_back(pages, word, open & pages->withheld[word]);
        if (open) {
            int start = __builtin_ctzll(open);
            uint64_t rest = ~(open >> start);
            uint32_t length = rest ? (uint32_t)__builtin_ctzll(rest) : WORD;
            *first = word * WORD + (uint64_t)start;
            return length < most ? length : most;
        }
        from += count;
    }
    return 0;
}

uint32_t vu_pages_missing(vu_pages *pages, uint64_t from, uint64_t to, uint32_t most, uint64_t *first)
{
    pthread_mutex_lock(&pages->lock);
    uint32_t count = find_run(pages, from, to, most, first);
    pthread_mutex_unlock(&pages->lock);
    return count;
}

uint32_t vu_pages_claim(vu_pages *pages, uint64_t from, uint64_t to, uint32_t most, uint64_t *first)
{
    pthread_mutex_lock(&pages->lock);
    uint32_t count = find_run(pages, from, to, most, first);
    if (count)
        pages->claimed[*first / WORD] |= span_mask(*first, count);
    pthread_mutex_unlock(&pages->lock);
    return count;
}

int vu_pages_unclaim(vu_pages *pages, uint64_t first, uint64_t count)
{
    int wanted = 0;
    pthread_mutex_lock(&pages->lock);
    pages->claimed[first / WORD] &= ~span_mask(first, count);
    for (uint64_t page = first; page < first + count; page++) {
        wanted |= pages->waiting[page] != 0;
        set_page_asked(pages, page, false);
    }
    pthread_mutex_unlock(&pages->lock);
    return wanted;
}

uint32_t vu_pages_settle(vu_pages *pages, uint64_t first, uint64_t count, int lost, struct vu_wait *waits, uint32_t max)
{
    uint64_t mask = span_mask(first, count);
    pthread_mutex_lock(&pages->lock);
    if (lost)
        pages->lost[first / WORD] |= mask;
    else /* release: who sees the bit in the shared bitmap sees the page */
        atomic_fetch_or_explicit(&pages->received[first / WORD], mask, memory_order_release);
    *(lost ? &pages->lost_count : &pages->received_count) += count;
    uint32_t taken = take_waits(pages, first, count, waits, max);
    pthread_mutex_unlock(&pages->lock);
    return taken;
}

uint32_t vu_pages_take(vu_pages *pages, uint64_t first, uint64_t count, struct vu_wait *waits, uint32_t max)
{
    pthread_mutex_lock(&pages->lock);
    uint32_t taken = take_waits(pages, first, count, waits, max);
    pthread_mutex_unlock(&pages->lock);
    return taken;
}

/* From the last to the first, each to the front of the fresh ones: their order stays. */
void vu_pages_ask_again(vu_pages *pages)
{
    pthread_mutex_lock(&pages->lock);
    while (pages->waits[ASKED].before != ASKED)
        set_asked(pages, pages->waits[ASKED].before, false);
    pthread_mutex_unlock(&pages->lock);
}

uint32_t vu_pages_overdue(vu_pages *pages, uint64_t since, uint64_t *found, uint32_t max)
{
    uint32_t count = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint32_t list = FRESH; list <= ASKED; list++) {
        uint32_t number = pages->waits[list].after;
        for (; number != list && count < max; number = pages->waits[number].after)
            if (pages->waits[number].since < since)
                found[count++] = pages->waits[number].page;
    }
    pthread_mutex_unlock(&pages->lock);
    return count;
}

uint32_t vu_pages_waits(vu_pages *pages, struct vu_wait *waits, uint32_t max)
{
    uint32_t count = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint32_t list = FRESH; list <= ASKED; list++) {
        uint32_t number = pages->waits[list].after;
        for (; number != list && count < max; number = pages->waits[number].after) {
            const struct entry *wait = &pages->waits[number];
            waits[count++] = (struct vu_wait){wait->page, wait->since, wait->client, wait->asked};
        }
    }
    pthread_mutex_unlock(&pages->lock);
    return count;
}

void vu_pages_withhold(vu_pages *pages, uint64_t first, uint64_t count, int on)
{
    pthread_mutex_lock(&pages->lock);
    while (count) {
        uint64_t here = WORD - first % WORD < count ? WORD - first % WORD : count;
        if (on)
            pages->withheld[first / WORD] |= span_mask(first, here);
        else
            pages->withheld[first / WORD] &= ~span_mask(first, here);
        first += here;
        count -= here;
    }
    pthread_mutex_unlock(&pages->lock);
}
