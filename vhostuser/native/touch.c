/*
 * Fault-ahead: missing pages are touched by several threads at once, before the request that needs them runs.
 *
 * What belongs here: finding out which pages are missing, the pool of pages to touch, who waits for which. What does not:
 * bringing the pages (another process does), surviving lost memory (guard.c), making threads (Python).
 *
 * A page is wanted by a *party*: a chain of a queue, or a call that blocks until its pages are there. An *errand* is one
 * page wanted by one party. Errands for one page form a family: the head is touched once, the others are its sharers.
 * Everything is under the pool's one lock, except the touch itself; while it lasts its errand keeps the map alive, so a
 * queue can be freed at any time: its errands are merely detached.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum { WINDOW = 512 };

/* A call that blocks in vu_touch_spans. */
struct round {
    pthread_cond_t done;
    uint32_t missing;
    int fault;
};

struct party {
    struct vu_ahead *ahead; /* and */
    vu_chain *chain;        /* or */
    struct round *round;    /* or nobody: detached */
};

struct errand {
    struct errand *next;       /* free list, or the queue of pages to touch */
    struct errand *neighbour;  /* next head in the same slot of the table */
    struct errand *sharers;    /* of a head; linked by `sharers` again */
    uintptr_t page;
    vu_map *map;               /* of a head: a reference */
    struct party party;
};

struct vu_touch {
    pthread_mutex_t lock; /* the lock: everything below down to the counters, and every vu_ahead's ready list */
    pthread_cond_t work;
    struct errand *free, *first, **last; /* first..last: pages that no thread has begun to touch */
    struct errand **table;               /* heads by page, begun or not */
    uint32_t slots;                      /* of the table: a power of two */
    uint32_t capacity;
    bool stopping;
    _Atomic uint64_t waited, ahead, lost, blocked_ns, histogram[VU_BUCKETS];
    struct errand errands[];
};

struct vu_ahead {
    vu_touch *touch;
    vu_chain *first, **last; /* chains whose pages have all been touched */
    int event;               /* readable while there is one */
    _Atomic uint32_t waiting;
};

/* ---- one page ------------------------------------------------------------------------------------------------- */

/* A thread that waits for a page sleeps, one that finds it does not: the kernel counts that, and nothing else tells a page
 * that was missing everywhere from one that was missing only in our own page table. */
static long times_slept(void)
{
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

static void count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static void count_wait(vu_touch *touch, uint64_t ns, bool ahead)
{
    count(&touch->waited, 1);
    count(&touch->ahead, ahead);
    count(&touch->blocked_ns, ns);
    count(&touch->histogram[vu_bucket(ns)], 1);
}

/* 0 or VU_E_FAULT; blocks while the page is missing. Never with the lock held. */
static int touch_page(vu_touch *touch, const vu_map *map, uintptr_t page, bool ahead)
{
    struct vu_guard guard;
    long slept = times_slept();
    uint64_t start = vu_clock_ns();

    if (VU_GUARD(&guard, map)) {
        count(&touch->lost, 1);
        count_wait(touch, vu_clock_ns() - start, ahead);
        return VU_E_FAULT;
    }
    (void)*(volatile const uint8_t *)page;
    vu_guard_leave(&guard);
    if (times_slept() != slept)
        count_wait(touch, vu_clock_ns() - start, ahead);
    return 0;
}

/* ---- parties: all with the lock held ------------------------------------------------------------------------------ */

static void make_ready(struct vu_ahead *ahead, vu_chain *chain)
{
    if (!ahead->first)
        eventfd_write(ahead->event, 1);
    vu_chain_link(chain)->next = NULL;
    *ahead->last = chain;
    ahead->last = &vu_chain_link(chain)->next;
}

static void want(struct party *party)
{
    if (party->chain)
        vu_chain_link(party->chain)->missing++;
    else
        party->round->missing++;
}

/* A page that the party wanted has been dealt with. */
static void settle(struct party *party, int fault)
{
    if (party->chain) {
        if (fault)
            party->chain->fault = fault;
        if (--vu_chain_link(party->chain)->missing == 0)
            make_ready(party->ahead, party->chain);
    } else if (party->round) {
        if (fault)
            party->round->fault = fault;
        if (--party->round->missing == 0)
            pthread_cond_signal(&party->round->done);
    }
}

/* ---- errands: all with the lock held, except where it says so -------------------------------------------------- */

static struct errand **slot_of(vu_touch *touch, uintptr_t page)
{
    uint64_t mixed = (page >> 12) * 0x9E3779B97F4A7C15u;
    return &touch->table[(mixed >> 32) & (touch->slots - 1)];
}

static struct errand *find(vu_touch *touch, uintptr_t page)
{
    struct errand *head = *slot_of(touch, page);
    while (head && head->page != page)
        head = head->neighbour;
    return head;
}

static void add_head(vu_touch *touch, struct errand *head, const vu_map *map)
{
    struct errand **slot = slot_of(touch, head->page);
    head->neighbour = *slot;
    *slot = head;
    head->map = (vu_map *)map;
    vu_map_get(head->map);
    *touch->last = head;
    touch->last = &head->next;
    pthread_cond_signal(&touch->work);
}

/* False if the pool cannot take it: full, or its threads are leaving. */
static bool enqueue(vu_touch *touch, const vu_map *map, uintptr_t page, struct party *party)
{
    struct errand *errand = touch->free;
    if (!errand || touch->stopping)
        return false;
    touch->free = errand->next;
    *errand = (struct errand){.page = page, .party = *party};
    want(party);
    struct errand *head = find(touch, page);
    if (head) {
        errand->sharers = head->sharers;
        head->sharers = errand;
    } else {
        add_head(touch, errand, map);
    }
    return true;
}

static struct errand *dequeue(vu_touch *touch)
{
    struct errand *head = touch->first;
    touch->first = head->next;
    if (!touch->first)
        touch->last = &touch->first;
    return head;
}

static bool wanted(const struct errand *errand)
{
    while (errand && !errand->party.chain && !errand->party.round)
        errand = errand->sharers;
    return errand != NULL;
}

static void finish(vu_touch *touch, struct errand *head, int fault)
{
    struct errand **at = slot_of(touch, head->page);
    while (*at != head)
        at = &(*at)->neighbour;
    *at = head->neighbour;
    for (struct errand *errand = head; errand;) {
        struct errand *sharers = errand->sharers;
        settle(&errand->party, fault);
        errand->next = touch->free;
        touch->free = errand;
        errand = sharers;
    }
}

/* Touches the page that has waited longest. Gives the lock up meanwhile, also while the last reference of a map goes. */
static void run_errand(vu_touch *touch)
{
    struct errand *head = dequeue(touch);
    vu_map *map = head->map;
    int fault = 0;

    if (wanted(head)) {
        uintptr_t page = head->page;
        pthread_mutex_unlock(&touch->lock);
        fault = touch_page(touch, map, page, true);
        pthread_mutex_lock(&touch->lock);
    }
    finish(touch, head, fault);
    pthread_mutex_unlock(&touch->lock);
    vu_map_put(map);
    pthread_mutex_lock(&touch->lock);
}

static void detach(vu_touch *touch, const struct vu_ahead *ahead)
{
    for (uint32_t i = 0; i < touch->capacity; i++)
        if (touch->errands[i].party.ahead == ahead)
            touch->errands[i].party = (struct party){0};
}

/* ---- the pool ---------------------------------------------------------------------------------------------------- */

vu_touch *vu_touch_new(uint32_t capacity)
{
    uint32_t slots = 1;
    while (slots < capacity && slots < 1u << 30)
        slots *= 2;
    vu_touch *touch = calloc(1, sizeof *touch + (size_t)capacity * sizeof *touch->errands);
    struct errand **table = calloc(slots, sizeof(struct errand *));
    if (!touch || !table) {
        free(touch);
        free(table);
        return NULL;
    }
    pthread_mutex_init(&touch->lock, NULL);
    pthread_cond_init(&touch->work, NULL);
    touch->table = table;
    touch->slots = slots;
    touch->capacity = capacity;
    touch->last = &touch->first;
    for (uint32_t i = 0; i < capacity; i++) {
        touch->errands[i].next = touch->free;
        touch->free = &touch->errands[i];
    }
    return touch;
}

void vu_touch_run(vu_touch *touch)
{
    pthread_mutex_lock(&touch->lock);
    while (touch->first || !touch->stopping) {
        if (touch->first)
            run_errand(touch);
        else
            pthread_cond_wait(&touch->work, &touch->lock);
    }
    pthread_mutex_unlock(&touch->lock);
}

void vu_touch_stop(vu_touch *touch)
{
    pthread_mutex_lock(&touch->lock);
    touch->stopping = true;
    pthread_cond_broadcast(&touch->work);
    pthread_mutex_unlock(&touch->lock);
}

void vu_touch_free(vu_touch *touch)
{
    if (!touch)
        return;
    pthread_cond_destroy(&touch->work);
    pthread_mutex_destroy(&touch->lock);
    free(touch->table);
    free(touch);
}

void vu_touch_stats(const vu_touch *touch, struct vu_fault_stats *stats)
{
    stats->waited = atomic_load_explicit(&touch->waited, memory_order_relaxed);
    stats->ahead = atomic_load_explicit(&touch->ahead, memory_order_relaxed);
    stats->lost = atomic_load_explicit(&touch->lost, memory_order_relaxed);
    stats->blocked_ns = atomic_load_explicit(&touch->blocked_ns, memory_order_relaxed);
    for (int i = 0; i < VU_BUCKETS; i++)
        stats->histogram[i] = atomic_load_explicit(&touch->histogram[i], memory_order_relaxed);
}

/* ---- looking for missing pages ------------------------------------------------------------------------------------ */

/*
 * One party's search. The page found last is held back: when it turns out to be the only one, its finder may touch it
 * himself, which is quicker than handing it to another thread; and neighbouring segments often share it.
 */
struct search {
    vu_touch *touch;
    const vu_map *map;
    struct party party;
    uintptr_t held;  /* 0: none */
    uint32_t passed; /* pages given to the pool */
    int fault;
};

static void touch_here(struct search *search, uintptr_t page)
{
    int fault = touch_page(search->touch, search->map, page, false);
    if (fault)
        search->fault = fault;
}

static void pass(struct search *search, uintptr_t page)
{
    pthread_mutex_lock(&search->touch->lock);
    bool taken = enqueue(search->touch, search->map, page, &search->party);
    pthread_mutex_unlock(&search->touch->lock);
    if (taken)
        search->passed++;
    else
        touch_here(search, page);
}

static void found(struct search *search, uintptr_t page)
{
    if (page == search->held)
        return;
    if (search->held)
        pass(search, search->held);
    search->held = page;
}

/* On shmem mincore tells what the page cache holds; on hugetlbfs only what our own page table does, so there a page that
 * is new to us counts as missing. It counts in system pages: the first of a huge page speaks for all. */
static void look(struct search *search, uintptr_t base, size_t length)
{
    unsigned char resident[WINDOW];
    size_t system = (size_t)sysconf(_SC_PAGESIZE);
    size_t page_size = vu_map_page_size(search->map, (const void *)base);
    if (!page_size || !length)
        return;
    size_t window = page_size == system ? WINDOW : 1;
    uintptr_t page = base & ~(page_size - 1);
    size_t left = (base + length - page + page_size - 1) / page_size;

    while (left) {
        size_t pages = left < window ? left : window;
        bool unknown = mincore((void *)page, pages * system, resident) < 0;
        for (size_t i = 0; i < pages; i++)
            if (unknown || !(resident[i] & 1))
                found(search, page + i * page_size);
        page += pages * page_size;
        left -= pages;
    }
}

int vu_touch_spans(vu_touch *touch, const vu_map *map, const struct vu_span *spans, uint32_t count)
{
    struct round round = {0};
    struct search search = {.touch = touch, .map = map, .party = {.round = &round}};

    pthread_cond_init(&round.done, NULL);
    for (uint32_t i = 0; i < count; i++)
        look(&search, spans[i].base, spans[i].length);
    if (search.held)
        touch_here(&search, search.held);
    pthread_mutex_lock(&touch->lock);
    while (round.missing) {
        if (touch->first)
            run_errand(touch);
        else
            pthread_cond_wait(&round.done, &touch->lock);
    }
    pthread_mutex_unlock(&touch->lock);
    pthread_cond_destroy(&round.done);
    return round.fault ? round.fault : search.fault;
}

/* ---- chains of a queue -------------------------------------------------------------------------------------------- */

static struct vu_ahead *ahead_new(vu_touch *touch)
{
    struct vu_ahead *ahead = calloc(1, sizeof *ahead);
    if (!ahead)
        return NULL;
    ahead->touch = touch;
    ahead->last = &ahead->first;
    ahead->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ahead->event < 0) {
        free(ahead);
        return NULL;
    }
    return ahead;
}

void vu_ahead_free(struct vu_ahead *ahead)
{
    if (!ahead)
        return;
    pthread_mutex_lock(&ahead->touch->lock);
    detach(ahead->touch, ahead);
    pthread_mutex_unlock(&ahead->touch->lock);
    close(ahead->event);
    free(ahead);
}

int vu_queue_set_touch(vu_queue *queue, vu_touch *touch)
{
    struct vu_ahead **slot = vu_queue_ahead(queue);
    struct vu_ahead *ahead = touch ? ahead_new(touch) : NULL;
    if (touch && !ahead)
        return VU_E_SYS;
    vu_ahead_free(*slot);
    *slot = ahead;
    vu_queue_keep_touch(queue, touch);
    return 0;
}

int vu_queue_touch_ring(vu_queue *queue)
{
    struct vu_span spans[3];
    vu_touch *touch = vu_queue_touch(queue);
    if (!touch)
        return 0;
    vu_queue_spans(queue, spans);
    return vu_touch_spans(touch, vu_queue_map(queue), spans, 3);
}

/* The submitter counts as one missing page until its search is over, or a chain could come back while it is searched. */
int vu_ahead_submit(vu_queue *queue, vu_chain *chain, int alone)
{
    struct vu_ahead *ahead = *vu_queue_ahead(queue);
    struct vu_ahead_link *link = vu_chain_link(chain);
    if (!ahead)
        return 0;
    struct search search = {.touch = ahead->touch, .map = vu_queue_map(queue), .party = {ahead, chain, NULL}};

    link->missing = 1;
    for (uint32_t i = 0; i < chain->readable_count + chain->writable_count; i++)
        look(&search, (uintptr_t)chain->segments[i].host, chain->segments[i].length);
    if (search.held && alone && !search.passed && !ahead->waiting)
        touch_here(&search, search.held);
    else if (search.held)
        pass(&search, search.held);

    pthread_mutex_lock(&ahead->touch->lock);
    if (search.fault)
        chain->fault = search.fault;
    bool waits = --link->missing > 0;
    pthread_mutex_unlock(&ahead->touch->lock);
    ahead->waiting += waits;
    return waits;
}

int vu_ahead_collect(vu_queue *queue, vu_chain **chains, uint32_t max)
{
    struct vu_ahead *ahead = *vu_queue_ahead(queue);
    uint32_t count = 0;
    eventfd_t seen;
    if (!ahead || !ahead->waiting)
        return 0;

    pthread_mutex_lock(&ahead->touch->lock);
    while (ahead->first && count < max) {
        chains[count++] = ahead->first;
        ahead->first = vu_chain_link(ahead->first)->next;
    }
    if (count && !ahead->first) {
        ahead->last = &ahead->first;
        eventfd_read(ahead->event, &seen);
    }
    pthread_mutex_unlock(&ahead->touch->lock);
    ahead->waiting -= count;
    return (int)count;
}

uint32_t vu_ahead_waiting(const vu_queue *queue)
{
    struct vu_ahead *ahead = *vu_queue_ahead((vu_queue *)queue);
    return ahead ? ahead->waiting : 0;
}

int vu_ahead_fd(const vu_queue *queue)
{
    struct vu_ahead *ahead = *vu_queue_ahead((vu_queue *)queue);
    return ahead ? ahead->event : -1;
}
