/*
 * The in-flight region: which chains were taken and not returned, kept by the front-end across a crash of ours.
 *
 * What belongs here: the mapping, and where each queue's part is in it. What does not: the layout of such a part
 * (inflight_split.c, inflight_packed.c). Alignment between queues is not specified; ours start at multiples of 64 bytes.
 * The region is the front-end's: its content is judged once, as a queue starts, and only written afterwards.
 */
#include <errno.h>
#include <stdlib.h>

#include "queue.h"

#define QUEUE_ALIGN 64

struct vu_inflight {
    _Atomic uint32_t references;
    uint32_t queues, queue_size;
    bool packed;
    struct vu_mapping mapping;
};

static uint64_t stride(uint32_t queue_size, bool packed)
{
    uint64_t bytes = packed ? vu_inflight_packed_bytes(queue_size) : vu_inflight_split_bytes(queue_size);
    return (bytes + QUEUE_ALIGN - 1) / QUEUE_ALIGN * QUEUE_ALIGN;
}

uint64_t vu_inflight_size(uint32_t queues, uint32_t queue_size, int packed)
{
    return queues * stride(queue_size, packed);
}

vu_inflight *vu_inflight_map(int fd, uint64_t size, uint64_t offset, uint32_t queues, uint32_t queue_size, int packed,
                             int *error)
{
    *error = 0;
    if (!queues || queues > UINT16_MAX || !queue_size || queue_size > VU_RING_SIZE_MAX)
        *error = VU_E_SIZE;
    else if (size < vu_inflight_size(queues, queue_size, packed))
        *error = VU_E_SHORT;
    else if (offset % _Alignof(uint64_t))
        *error = VU_E_ALIGN;
    vu_inflight *inflight = *error ? NULL : calloc(1, sizeof *inflight);
    if (!inflight) {
        *error = *error ? *error : VU_E_NOMEM;
        return NULL;
    }
    *error = vu_mapping_open(&inflight->mapping, fd, offset, size);
    if (*error) {
        int number = errno;
        free(inflight);
        errno = number;
        return NULL;
    }
    atomic_init(&inflight->references, 1);
    inflight->queues = queues;
    inflight->queue_size = queue_size;
    inflight->packed = packed;
    return inflight;
}

void vu_inflight_get(vu_inflight *inflight)
{
    atomic_fetch_add(&inflight->references, 1);
}

void vu_inflight_put(vu_inflight *inflight)
{
    if (!inflight || atomic_fetch_sub(&inflight->references, 1) != 1)
        return;
    vu_mapping_close(&inflight->mapping);
    free(inflight);
}

struct vu_span vu_inflight_span(const vu_inflight *inflight)
{
    return inflight->mapping.span;
}

int vu_inflight_attach(const vu_inflight *inflight, uint32_t index, uint32_t size, bool packed,
                       struct vu_inflight_queue *queue)
{
    if (index >= inflight->queues || size > inflight->queue_size || packed != inflight->packed)
        return VU_E_INFLIGHT;
    uint8_t *at = inflight->mapping.at + index * stride(inflight->queue_size, packed);
    if (!packed) {
        queue->split = (struct vu_inflight_split *)at;
        return 0;
    }
    queue->packed = (struct vu_inflight_packed *)at;
    queue->next = calloc(size, sizeof *queue->next);
    return queue->next ? 0 : VU_E_NOMEM;
}

static int compare_taken(const void *left, const void *right)
{
    const struct vu_taken *a = left, *b = right;
    if (a->counter != b->counter)
        return a->counter < b->counter ? -1 : 1;
    return (a->head > b->head) - (a->head < b->head);
}

void vu_inflight_sort(struct vu_taken *taken, uint32_t count)
{
    qsort(taken, count, sizeof *taken, compare_taken);
}
