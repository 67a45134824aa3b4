/*
 * The device IOTLB of one connection: what the front-end says that I/O virtual addresses mean (virtio's
 * VIRTIO_F_ACCESS_PLATFORM), and what rings have asked it.
 *
 * What belongs here: translations as sorted extents, questions, the lock. What does not: what a ring keeps of the answers
 * and what it has in use (translate.c), messages (Python), where the front-end's addresses are ours (memory.c).
 *
 * One thread changes it (the control thread), those of the rings look things up and ask. The lock is held for the time of
 * a look or of a change, and never while guest memory is touched: nobody who has it waits for anybody.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "iotlb.h"

enum {
    QUESTIONS = 32, /* of one ring that are open at once: a request of 128 KiB in pages needs so many */
    PAGE = 4096,    /* questions about one page are one question: no IOMMU has smaller ones */
    FIRST_ROOM = 64,
};

struct question {
    uint64_t iova;
    uint32_t access;
    bool told;
};

struct ring_state {
    int event;
    _Atomic uint32_t open;
    struct question questions[QUESTIONS];
    struct question denied; /* access 0: nothing was */
};

struct vu_iotlb {
    _Atomic uint32_t references;
    _Atomic uint64_t removals;
    pthread_mutex_t lock; /* the lock: everything below */
    int event;            /* readable when there is something to take */
    struct vu_mapping_of_iova *mappings;
    uint32_t count, room;
    uint32_t rings;
    struct ring_state states[];
};

/* ---- life ---------------------------------------------------------------------------------------------------------- */

vu_iotlb *vu_iotlb_new(uint32_t rings, int *error)
{
    vu_iotlb *iotlb = calloc(1, sizeof *iotlb + rings * sizeof *iotlb->states);
    *error = VU_E_NOMEM;
    if (!iotlb)
        return NULL;
    iotlb->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (iotlb->event < 0) {
        *error = VU_E_SYS;
        free(iotlb);
        return NULL;
    }
    atomic_init(&iotlb->references, 1);
    pthread_mutex_init(&iotlb->lock, NULL);
    iotlb->rings = rings;
    for (uint32_t i = 0; i < rings; i++)
        iotlb->states[i].event = -1;
    *error = 0;
    return iotlb;
}

void vu_iotlb_get(vu_iotlb *iotlb)
{
    atomic_fetch_add(&iotlb->references, 1);
}

void vu_iotlb_put(vu_iotlb *iotlb)
{
    if (!iotlb || atomic_fetch_sub(&iotlb->references, 1) != 1)
        return;
    pthread_mutex_destroy(&iotlb->lock);
    close(iotlb->event);
    free(iotlb->mappings);
    free(iotlb);
}

int vu_iotlb_fd(const vu_iotlb *iotlb)
{
    return iotlb->event;
}

void vu_iotlb_lock(vu_iotlb *iotlb)
{
    pthread_mutex_lock(&iotlb->lock);
}

void vu_iotlb_unlock(vu_iotlb *iotlb)
{
    pthread_mutex_unlock(&iotlb->lock);
}

uint64_t vu_iotlb_removals(const vu_iotlb *iotlb)
{
    return atomic_load_explicit(&iotlb->removals, memory_order_acquire);
}

bool vu_iotlb_attend(vu_iotlb *iotlb, uint32_t ring, int event)
{
    if (ring >= iotlb->rings)
        return false;
    vu_iotlb_lock(iotlb);
    iotlb->states[ring].event = event;
    vu_iotlb_unlock(iotlb);
    return true;
}

/* ---- sorted extents: all with the lock held -------------------------------------------------------------------------- */

/* The number of the first mapping that ends at or behind the address. */
static uint32_t first_at(const vu_iotlb *iotlb, uint64_t iova)
{
    uint32_t low = 0, high = iotlb->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (iotlb->mappings[middle].at.last < iova)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static const struct vu_mapping_of_iova *holder(const vu_iotlb *iotlb, uint64_t iova)
{
    uint32_t n = first_at(iotlb, iova);
    return n < iotlb->count && iotlb->mappings[n].at.first <= iova ? &iotlb->mappings[n] : NULL;
}

/* Room for so many more: false if there is no memory for them. */
static bool reserve(vu_iotlb *iotlb, uint32_t more)
{
    if (iotlb->count + more <= iotlb->room)
        return true;
    uint32_t room = iotlb->room ? iotlb->room : FIRST_ROOM;
    while (room < iotlb->count + more)
        room *= 2;
    struct vu_mapping_of_iova *mappings = realloc(iotlb->mappings, room * sizeof *mappings);
    if (!mappings)
        return false;
    iotlb->mappings = mappings;
    iotlb->room = room;
    return true;
}

static void insert(vu_iotlb *iotlb, uint32_t n, struct vu_mapping_of_iova mapping)
{
    memmove(iotlb->mappings + n + 1, iotlb->mappings + n, (iotlb->count - n) * sizeof mapping);
    iotlb->mappings[n] = mapping;
    iotlb->count++;
}

static void erase(vu_iotlb *iotlb, uint32_t n, uint32_t count)
{
    iotlb->count -= count;
    memmove(iotlb->mappings + n, iotlb->mappings + n + count, (iotlb->count - n) * sizeof *iotlb->mappings);
}

/* Has no mapping reach over the address, which begins one if any has it. There is room for one more. */
static void cut(vu_iotlb *iotlb, uint64_t iova)
{
    uint32_t n = first_at(iotlb, iova);
    if (n == iotlb->count || iotlb->mappings[n].at.first >= iova)
        return;
    struct vu_mapping_of_iova behind = iotlb->mappings[n];
    behind.user += iova - behind.at.first;
    behind.at.first = iova;
    iotlb->mappings[n].at.last = iova - 1;
    insert(iotlb, n + 1, behind);
}

static void cut_around(vu_iotlb *iotlb, struct vu_extent extent)
{
    cut(iotlb, extent.first);
    if (extent.last != UINT64_MAX)
        cut(iotlb, extent.last + 1);
}

static bool follows(const struct vu_mapping_of_iova *before, const struct vu_mapping_of_iova *after)
{
    uint64_t length = after->at.first - before->at.first;
    return after->at.first == before->at.last + 1 && after->user - before->user == length && after->access == before->access;
}

/* Joins what lies in or touches the extent: pages come one by one, and often are neighbours everywhere. */
static void join(vu_iotlb *iotlb, struct vu_extent extent)
{
    uint32_t n = first_at(iotlb, extent.first ? extent.first - 1 : 0);
    while (n + 1 < iotlb->count && iotlb->mappings[n].at.first <= extent.last) {
        if (!follows(&iotlb->mappings[n], &iotlb->mappings[n + 1])) {
            n++;
            continue;
        }
        iotlb->mappings[n].at.last = iotlb->mappings[n + 1].at.last;
        erase(iotlb, n + 1, 1);
    }
}

/* ---- questions -------------------------------------------------------------------------------------------------------- */

/* With the lock held. */
static void ask(vu_iotlb *iotlb, struct ring_state *state, uint64_t iova, uint32_t access)
{
    uint32_t open = atomic_load_explicit(&state->open, memory_order_relaxed);
    for (uint32_t i = 0; i < open; i++)
        if (state->questions[i].iova / PAGE == iova / PAGE && !(access & ~state->questions[i].access))
            return;
    if (open == QUESTIONS)
        return;
    state->questions[open] = (struct question){iova, access, false};
    atomic_store_explicit(&state->open, open + 1, memory_order_release);
    eventfd_write(iotlb->event, 1);
}

/* With the lock held, after a change. */
static void answer(vu_iotlb *iotlb, struct ring_state *state)
{
    uint32_t open = atomic_load_explicit(&state->open, memory_order_relaxed), left = 0;
    for (uint32_t i = 0; i < open; i++) {
        struct question question = state->questions[i];
        const struct vu_mapping_of_iova *mapping = holder(iotlb, question.iova);
        if (!mapping) {
            state->questions[left++] = question;
        } else if (question.access & ~mapping->access) {
            question.told = false;
            state->denied = question;
            eventfd_write(iotlb->event, 1);
        }
    }
    atomic_store_explicit(&state->open, left, memory_order_release);
    if (open && !left && state->event >= 0)
        eventfd_write(state->event, 1);
}

static void answer_all(vu_iotlb *iotlb)
{
    for (uint32_t i = 0; i < iotlb->rings; i++)
        answer(iotlb, &iotlb->states[i]);
}

bool vu_iotlb_waits(const vu_iotlb *iotlb, uint32_t ring)
{
    return atomic_load_explicit(&iotlb->states[ring].open, memory_order_acquire);
}

static int judge(vu_iotlb *iotlb, struct ring_state *state, uint64_t iova, uint32_t access,
                 const struct vu_mapping_of_iova *mapping)
{
    if (mapping && !(access & ~mapping->access))
        return 0;
    if (mapping && state->denied.access & access && state->denied.iova / PAGE == iova / PAGE)
        return VU_E_ACCESS;
    ask(iotlb, state, iova, access);
    return VU_E_MISSING;
}

int vu_iotlb_find(vu_iotlb *iotlb, uint32_t ring, uint64_t iova, uint32_t access, struct vu_mapping_of_iova *found,
                  uint64_t *removals)
{
    vu_iotlb_lock(iotlb);
    const struct vu_mapping_of_iova *mapping = holder(iotlb, iova);
    int code = judge(iotlb, &iotlb->states[ring], iova, access, mapping);
    if (!code)
        *found = *mapping;
    *removals = vu_iotlb_removals(iotlb);
    vu_iotlb_unlock(iotlb);
    return code;
}

static bool take_one(struct question *question, uint32_t ring, bool denied, struct vu_iotlb_question *taken)
{
    if (question->told || !question->access)
        return false;
    question->told = true;
    *taken = (struct vu_iotlb_question){question->iova, question->access, ring, denied};
    return true;
}

uint32_t vu_iotlb_take(vu_iotlb *iotlb, struct vu_iotlb_question *taken, uint32_t max)
{
    uint32_t count = 0;
    eventfd_t seen;
    vu_iotlb_lock(iotlb);
    eventfd_read(iotlb->event, &seen);
    for (uint32_t i = 0; i < iotlb->rings; i++) {
        struct ring_state *state = &iotlb->states[i];
        for (uint32_t n = 0; n < atomic_load_explicit(&state->open, memory_order_relaxed) && count < max; n++)
            count += take_one(&state->questions[n], i, false, &taken[count]);
        if (count < max)
            count += take_one(&state->denied, i, true, &taken[count]);
    }
    if (count == max)
        eventfd_write(iotlb->event, 1);
    vu_iotlb_unlock(iotlb);
    return count;
}

/* ---- what the front-end says --------------------------------------------------------------------------------------- */

static bool is_mapped(const vu_map *map, uint64_t user, uint64_t length)
{
    struct vu_user_window window;
    for (uint64_t run; length; user += run, length -= run) {
        if (!vu_map_user_window(map, user, &window))
            return false;
        run = vu_least(length, window.length - (user - window.user));
    }
    return true;
}

/* Whether some of the addresses mean something else already. */
static bool contradicts(const vu_iotlb *iotlb, const struct vu_mapping_of_iova *mapping)
{
    for (uint32_t n = first_at(iotlb, mapping->at.first); n < iotlb->count; n++) {
        const struct vu_mapping_of_iova *other = &iotlb->mappings[n];
        if (other->at.first > mapping->at.last)
            return false;
        if (other->user - mapping->user != other->at.first - mapping->at.first)
            return true;
    }
    return false;
}

/* Adds what is not there, and the permission to what is. There is room. */
static void spread(vu_iotlb *iotlb, struct vu_mapping_of_iova mapping)
{
    cut_around(iotlb, mapping.at);
    uint32_t n = first_at(iotlb, mapping.at.first);
    for (uint64_t next = mapping.at.first;; n++) {
        bool there = n < iotlb->count && iotlb->mappings[n].at.first <= mapping.at.last;
        if (there && iotlb->mappings[n].at.first == next) {
            iotlb->mappings[n].access |= mapping.access;
        } else {
            struct vu_mapping_of_iova gap = mapping;
            gap.user += next - mapping.at.first;
            gap.at.first = next;
            gap.at.last = there ? iotlb->mappings[n].at.first - 1 : mapping.at.last;
            insert(iotlb, n, gap);
        }
        if (iotlb->mappings[n].at.last == mapping.at.last)
            return;
        next = iotlb->mappings[n].at.last + 1;
    }
}

/* As many pieces as the mapping can add: one in front of, between and behind those that it meets, two cut off. */
static uint32_t pieces(const vu_iotlb *iotlb, struct vu_extent extent)
{
    return first_at(iotlb, extent.last) - first_at(iotlb, extent.first) + 4;
}

static int add(vu_iotlb *iotlb, const struct vu_mapping_of_iova *mapping)
{
    if (contradicts(iotlb, mapping))
        return VU_E_OVERLAP;
    /* Who asks again is answered again: nothing is lost but time. */
    if (iotlb->count + pieces(iotlb, mapping->at) > VU_IOTLB_MOST)
        iotlb->count = 0;
    if (!reserve(iotlb, pieces(iotlb, mapping->at)))
        return VU_E_NOMEM;
    spread(iotlb, *mapping);
    join(iotlb, mapping->at);
    answer_all(iotlb);
    return 0;
}

int vu_iotlb_update(vu_iotlb *iotlb, const vu_map *map, uint64_t iova, uint64_t size, uint64_t user, uint32_t access)
{
    if (!size)
        return VU_E_SIZE;
    if (vu_wraps(iova, size) || vu_wraps(user, size))
        return VU_E_OVERFLOW;
    if (!access || access & ~(uint32_t)VU_ACCESS_BOTH)
        return VU_E_ACCESS;
    if (!is_mapped(map, user, size))
        return VU_E_RANGE;
    struct vu_mapping_of_iova mapping = {vu_extent_of(iova, size), user, access};
    vu_iotlb_lock(iotlb);
    int code = add(iotlb, &mapping);
    vu_iotlb_unlock(iotlb);
    return code;
}

/* QEMU's intel-iommu says "everything" by 2^64 bytes from 0, of which 64 bits hold the zero (its device-TLB invalidation
 * of all addresses); Linux's vhost takes that for everything too. */
static int extent_of(uint64_t iova, uint64_t size, struct vu_extent *extent)
{
    if (!size && iova)
        return VU_E_SIZE;
    if (vu_wraps(iova, size))
        return VU_E_OVERFLOW;
    *extent = vu_extent_of(iova, size);
    return 0;
}

static void forget(vu_iotlb *iotlb, struct vu_extent extent)
{
    if (!reserve(iotlb, 2))
        iotlb->count = 0; /* more than was asked for, which costs questions only */
    cut_around(iotlb, extent);
    uint32_t first = first_at(iotlb, extent.first), end = first;
    while (end < iotlb->count && iotlb->mappings[end].at.first <= extent.last)
        end++;
    if (end > first)
        erase(iotlb, first, end - first);
    /* Also where nothing was there: it may have been, and a ring may have kept it. */
    atomic_fetch_add_explicit(&iotlb->removals, 1, memory_order_release);
}

int vu_iotlb_invalidate(vu_iotlb *iotlb, uint64_t iova, uint64_t size)
{
    struct vu_extent extent;
    int code = extent_of(iova, size, &extent);
    if (code)
        return code;
    vu_iotlb_lock(iotlb);
    forget(iotlb, extent);
    vu_iotlb_unlock(iotlb);
    return 0;
}

void vu_iotlb_clear(vu_iotlb *iotlb)
{
    vu_iotlb_lock(iotlb);
    forget(iotlb, (struct vu_extent){0, UINT64_MAX});
    for (uint32_t i = 0; i < iotlb->rings; i++) {
        atomic_store(&iotlb->states[i].open, 0);
        iotlb->states[i].denied.access = 0;
    }
    vu_iotlb_unlock(iotlb);
}

int vu_iotlb_look(vu_iotlb *iotlb, uint64_t iova, uint64_t *user)
{
    vu_iotlb_lock(iotlb);
    const struct vu_mapping_of_iova *mapping = holder(iotlb, iova);
    int access = mapping ? (int)mapping->access : 0;
    if (mapping)
        *user = mapping->user + (iova - mapping->at.first);
    vu_iotlb_unlock(iotlb);
    return access;
}

uint32_t vu_iotlb_count(vu_iotlb *iotlb)
{
    vu_iotlb_lock(iotlb);
    uint32_t count = iotlb->count;
    vu_iotlb_unlock(iotlb);
    return count;
}
