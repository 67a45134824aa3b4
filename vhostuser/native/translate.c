/*
 * What one ring behind an IOMMU keeps of the device IOTLB, and has in use.
 *
 * What belongs here: I/O virtual addresses of a queue made into ours, a cache of those that were needed last, which of them
 * a chain uses from pop to push. What does not: translations as such and questions about them (iotlb.c), rings and chains
 * (split.c, packed.c, chain.c).
 *
 * A chain is parsed without the lock, so that a translation may go meanwhile. Before it is handed out it is looked, with the
 * lock held, whether any has gone since the parsing began; then it is parsed again. From there on the chain counts as a user
 * of its addresses, which whoever invalidates them waits for. A table of descriptors may be read once more after that; what
 * was read is thrown away then.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "iotlb.h"

enum {
    PAGE = 4096,
    CACHE = 64,       /* by page; a power of two */
    PARTS = 3,
    LONGEST = 4096,   /* segments of a chain: less than the IOTLB holds, or a chain could wait for ever */
};

struct cached {
    struct vu_extent at;
    uint64_t removals;
    uint8_t *host;
    uint64_t guest;
    uint32_t access; /* 0: nothing */
};

struct vu_translator {
    vu_iotlb *iotlb;
    uint32_t ring;
    int event;
    bool missing;      /* something that the chain which is being parsed names */
    uint64_t removals; /* when the parsing began, or before */
    uint32_t parts;
    struct vu_extent part[PARTS]; /* of the ring itself */
    struct cached *last;
    struct cached cache[CACHE];
};

/* ---- life ---------------------------------------------------------------------------------------------------------- */

int vu_translator_open(vu_queue *queue, vu_iotlb *iotlb, uint32_t ring)
{
    struct vu_translator *translator = queue->translator = calloc(1, sizeof *translator);
    if (!translator)
        return VU_E_NOMEM;
    vu_iotlb_get(translator->iotlb = iotlb);
    translator->ring = ring;
    translator->last = translator->cache;
    translator->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (translator->event < 0)
        return VU_E_SYS;
    return vu_iotlb_attend(iotlb, ring, translator->event) ? 0 : VU_E_SIZE;
}

void vu_translator_close(vu_queue *queue)
{
    struct vu_translator *translator = queue->translator;
    if (!translator)
        return;
    vu_iotlb_attend(translator->iotlb, translator->ring, -1);
    if (translator->event >= 0)
        close(translator->event);
    vu_iotlb_put(translator->iotlb);
    free(translator);
}

int vu_queue_translated_fd(const vu_queue *queue)
{
    return queue->translator ? queue->translator->event : -1;
}

bool vu_translator_waits(const vu_queue *queue)
{
    return vu_iotlb_waits(queue->translator->iotlb, queue->translator->ring);
}

/* ---- one address ----------------------------------------------------------------------------------------------------- */

static bool holds(const struct cached *cached, uint64_t iova, uint32_t access, uint64_t removals)
{
    return cached->at.first <= iova && iova <= cached->at.last && !(access & ~cached->access) && cached->removals == removals;
}

/* As far as the mapping lies in one region. One that lies in none any more is as good as none. */
static int look_up(vu_queue *queue, uint64_t iova, uint32_t access, struct cached *cached)
{
    struct vu_translator *translator = queue->translator;
    struct vu_mapping_of_iova mapping;
    struct vu_user_window window;
    uint64_t removals;
    int code = vu_iotlb_find(translator->iotlb, translator->ring, iova, access, &mapping, &removals);
    if (code)
        return code;
    uint64_t user = mapping.user + (iova - mapping.at.first);
    if (!vu_map_user_window(queue->map, user, &window))
        return VU_E_RANGE;
    uint64_t before = vu_least(iova - mapping.at.first, user - window.user);
    uint64_t behind = vu_least(mapping.at.last - iova, window.length - 1 - (user - window.user));
    *cached = (struct cached){
        .at = {iova - before, iova + behind},
        .removals = removals,
        .host = window.host + (user - before - window.user),
        .guest = window.guest + (user - before - window.user),
        .access = mapping.access,
    };
    return 0;
}

int vu_translate(vu_queue *queue, uint64_t iova, uint64_t length, uint32_t access, vu_segment *found)
{
    struct vu_translator *translator = queue->translator;
    uint64_t removals = vu_iotlb_removals(translator->iotlb);
    struct cached *cached = translator->last;
    if (!holds(cached, iova, access, removals)) {
        cached = &translator->cache[iova / PAGE % CACHE];
        int code = holds(cached, iova, access, removals) ? 0 : look_up(queue, iova, access, cached);
        if (code)
            return code;
        translator->last = cached;
    }
    uint64_t inside = iova - cached->at.first;
    uint64_t left = cached->at.last - iova; /* and one */
    *found = (vu_segment){cached->host + inside, length - 1 <= left ? length : left + 1, cached->guest + inside};
    return 0;
}

/* Bytes from the address to the end of its page: where to go on when it is missing, so that all is asked for at once. */
static uint64_t rest_of_page(uint64_t iova, uint64_t length)
{
    return vu_least(length, PAGE - iova % PAGE);
}

/* ---- the ring itself ----------------------------------------------------------------------------------------------- */

int vu_translate_part(vu_queue *queue, uint64_t iova, uint64_t bytes, uint32_t access, uint8_t **host)
{
    struct vu_translator *translator = queue->translator;
    int missing = 0;
    *host = NULL;
    translator->part[translator->parts++] = vu_extent_of(iova, bytes);
    for (uint64_t done = 0, run; done < bytes; done += run) {
        vu_segment found;
        int code = vu_translate(queue, iova + done, bytes - done, access, &found);
        if (code && code != VU_E_MISSING)
            return code;
        if (!code && *host && found.host != *host + done)
            return VU_E_PIECES;
        if (!code && !done)
            *host = found.host;
        run = code ? rest_of_page(iova + done, bytes - done) : found.length;
        missing = code ? code : missing;
    }
    return missing;
}

/* ---- chains -------------------------------------------------------------------------------------------------------- */

static int note(struct vu_slot *slot, uint32_t n, uint64_t iova)
{
    if (!slot->iovas)
        slot->iovas = malloc(slot->capacity * sizeof *slot->iovas);
    if (!slot->iovas)
        return VU_E_NOMEM;
    slot->iovas[n] = iova;
    return 0;
}

/* Goes on behind what is missing, for the rest of the chain to be asked for too. */
int vu_translate_buffer(vu_queue *queue, struct vu_slot *slot, uint64_t iova, uint64_t left, bool writable)
{
    vu_chain *chain = &slot->chain;
    for (uint64_t run; left; iova += run, left -= run) {
        vu_segment found;
        int code = vu_translate(queue, iova, left, writable ? VU_ACCESS_WRITE : VU_ACCESS_READ, &found);
        run = code ? rest_of_page(iova, left) : found.length;
        if (code == VU_E_MISSING) {
            queue->translator->missing = true;
            continue;
        }
        uint32_t at = chain->readable_count + chain->writable_count;
        if (!code && (at == LONGEST || (at == slot->capacity && !vu_slot_outgrow(queue, slot))))
            code = VU_E_NOMEM;
        code = code ? code : note(slot, at, iova);
        if (code)
            return code;
        chain->segments[at] = found;
        (*(writable ? &chain->writable_count : &chain->readable_count))++;
    }
    return 0;
}

void vu_translator_begin(vu_queue *queue)
{
    queue->translator->missing = false;
    queue->translator->removals = vu_iotlb_removals(queue->translator->iotlb);
}

int vu_translator_hold(vu_queue *queue, struct vu_slot *slot)
{
    struct vu_translator *translator = queue->translator;
    int code = translator->missing ? VU_E_MISSING : 0;
    if (!code) {
        vu_iotlb_lock(translator->iotlb);
        code = vu_iotlb_removals(translator->iotlb) == translator->removals ? 0 : VU_E_STALE;
        slot->out = !code;
        vu_iotlb_unlock(translator->iotlb);
    }
    vu_translator_begin(queue);
    return code;
}

void vu_translator_lock(vu_queue *queue)
{
    vu_iotlb_lock(queue->translator->iotlb);
}

void vu_translator_unlock(vu_queue *queue)
{
    vu_iotlb_unlock(queue->translator->iotlb);
}

/* ---- what is in use: with the lock held ------------------------------------------------------------------------------- */

static bool slot_uses(const struct vu_slot *slot, struct vu_extent extent)
{
    const vu_chain *chain = &slot->chain;
    for (uint32_t i = 0; slot->out && i < chain->readable_count + chain->writable_count; i++)
        if (vu_extents_meet(vu_extent_of(slot->iovas[i], chain->segments[i].length), extent))
            return true;
    return false;
}

static bool uses(const vu_queue *queue, struct vu_extent extent)
{
    for (uint32_t i = 0; i < queue->translator->parts; i++)
        if (vu_extents_meet(queue->translator->part[i], extent))
            return true;
    for (uint32_t i = 0; i < queue->size; i++)
        if (slot_uses(&queue->slots[i], extent))
            return true;
    return false;
}

int vu_queue_uses(vu_queue *queue, uint64_t iova, uint64_t size)
{
    if (!queue->translator)
        return 0;
    vu_translator_lock(queue);
    bool used = uses(queue, vu_extent_of(iova, size));
    vu_translator_unlock(queue);
    return used;
}
