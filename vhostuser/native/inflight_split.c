/*
 * The in-flight region of split rings (vhost-user specification, "Inflight I/O tracking").
 *
 * What belongs here: its layout and its order of writes. What does not: the mapping, which queue has which part
 * (inflight.c).
 */
#include <stdlib.h>

#include "queue.h"

struct entry {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct vu_inflight_split {
    uint64_t features;
    uint16_t version; /* 0: nobody has used it yet */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct entry entries[];
};

_Static_assert(sizeof(struct entry) == 16 && sizeof(struct vu_inflight_split) == 16, "layout of the specification");

uint64_t vu_inflight_split_bytes(uint32_t size)
{
    return sizeof(struct vu_inflight_split) + size * sizeof(struct entry);
}

/* ---- recovery ------------------------------------------------------------------------------------------ */

static uint32_t list_taken(const struct vu_inflight_split *split, uint32_t size, struct vu_taken *taken)
{
    uint32_t count = 0;
    for (uint32_t head = 0; head < size; head++) {
        const struct entry *entry = &split->entries[head];
        if (__atomic_load_n(&entry->inflight, __ATOMIC_RELAXED))
            taken[count++] = (struct vu_taken){__atomic_load_n(&entry->counter, __ATOMIC_RELAXED), (uint16_t)head, 0};
    }
    return count;
}

/* The used index moved on and we died before saying so: the last batch, which may be longer than one, was returned.
 * Its list starts at last_batch_head, and has each chain once; an entry of it may have been finished already. */
static int finish_batch(struct vu_inflight_queue *queue, uint32_t size, uint16_t returned)
{
    bool *met = returned <= size ? calloc(size, sizeof *met) : NULL;
    int code = met ? 0 : returned <= size ? VU_E_NOMEM : VU_E_INFLIGHT;
    uint16_t head = vu_load16(&queue->split->last_batch_head);
    for (; !code && returned; returned--) {
        if (head >= size || met[head]) {
            code = VU_E_INFLIGHT;
            break;
        }
        met[head] = true;
        vu_inflight_finish(queue, head);
        head = vu_load16(&queue->split->entries[head].next);
    }
    free(met);
    return code;
}

static int recover_taken(struct vu_inflight_queue *queue, uint32_t size, uint16_t used, struct vu_taken *taken,
                         uint32_t *count)
{
    struct vu_inflight_split *split = queue->split;
    /* Nothing in flight: whatever else the region says (a ring that the guest has set up anew, say) is of no interest. */
    *count = list_taken(split, size, taken);
    if (!*count)
        return 0;
    if (vu_load16(&split->desc_num) != size)
        return VU_E_INFLIGHT;
    int code = finish_batch(queue, size, (uint16_t)(used - vu_load16(&split->used_idx)));
    if (code)
        return code;
    *count = list_taken(split, size, taken);
    vu_inflight_sort(taken, *count);
    if (*count)
        queue->counter = taken[*count - 1].counter + 1;
    return 0;
}

int vu_inflight_recover(struct vu_inflight_queue *queue, uint32_t size, uint16_t used, struct vu_taken *taken,
                        uint32_t *count)
{
    struct vu_inflight_split *split = queue->split;
    uint16_t version = vu_load16(&split->version);
    if (version > VU_INFLIGHT_VERSION)
        return VU_E_INFLIGHT;
    /* A fresh region may come with a ring that is not: after a migration its used index is anything, and does not tell
     * of chains that somebody returned. */
    *count = 0;
    int code = version ? recover_taken(queue, size, used, taken, count) : 0;
    if (code)
        return code;
    for (uint32_t head = 0; !version && head < size; head++)
        vu_inflight_finish(queue, (uint16_t)head);
    /* The index goes before the list: a crash in between leaves no difference for which the list would be walked. */
    vu_inflight_seal(queue, used);
    vu_store16_release(&split->last_batch_head, queue->last_batch);
    vu_store16_release(&split->desc_num, (uint16_t)size);
    vu_store16_release(&split->version, VU_INFLIGHT_VERSION);
    return 0;
}

/* ---- while the ring runs ------------------------------------------------------------------------------- */

void vu_inflight_take(struct vu_inflight_queue *queue, uint16_t head)
{
    struct entry *entry = &queue->split->entries[head];
    __atomic_store_n(&entry->counter, queue->counter++, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->inflight, 1, __ATOMIC_RELEASE);
}

void vu_inflight_link(struct vu_inflight_queue *queue, uint16_t head)
{
    vu_store16(&queue->split->entries[head].next, queue->last_batch);
    queue->last_batch = head;
    vu_store16_release(&queue->split->last_batch_head, head);
}

void vu_inflight_finish(struct vu_inflight_queue *queue, uint16_t head)
{
    __atomic_store_n(&queue->split->entries[head].inflight, 0, __ATOMIC_RELEASE);
}

void vu_inflight_seal(struct vu_inflight_queue *queue, uint16_t used)
{
    vu_store16_release(&queue->split->used_idx, used);
}
