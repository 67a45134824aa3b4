/*
 * Indirect tables of descriptors, which are the same in both formats of rings but for the fields behind the length
 * (virtio 1.2, 2.7.5.3 and 2.8.7).
 *
 * What belongs here: which tables are accepted, where they lie, and tables that lie in several regions. What does not:
 * what their descriptors say (split.c, packed.c).
 */
#include <stdlib.h>
#include <string.h>

#include "queue.h"

/* A driver must not make a chain longer than the ring (2.7.5.3.1), but Linux sizes indirect tables by the device's
 * segment limit, not by the ring, and QEMU takes 1024 from any ring. */
#define MIN_LIMIT 1024

uint32_t vu_table_limit(const vu_queue *queue)
{
    return queue->size > MIN_LIMIT ? queue->size : MIN_LIMIT;
}

/* The first run of a table, and how much of it that is. */
static int reach(vu_queue *queue, uint64_t address, uint64_t bytes, vu_segment *found)
{
    if (queue->translator)
        return vu_translate(queue, address, bytes, VU_ACCESS_READ, found);
    found->host = vu_map_run(queue->map, address, bytes, &found->length);
    return found->host ? 0 : VU_E_RANGE;
}

/* A table that lies in several regions is copied; one such copy is in use at a time, while its chain is parsed. */
static int copy(vu_queue *queue, uint64_t guest, uint64_t bytes, struct vu_table *table)
{
    if (!queue->table)
        queue->table = malloc(vu_desc_bytes(vu_table_limit(queue)));
    if (!queue->table)
        return VU_E_NOMEM;
    vu_segment found;
    for (uint8_t *to = (uint8_t *)queue->table; bytes; to += found.length, guest += found.length, bytes -= found.length) {
        int code = reach(queue, guest, bytes, &found);
        if (code)
            return code;
        memcpy(to, found.host, found.length);
    }
    table->at = queue->table;
    return 0;
}

/* Only if negotiated, never with NEXT, never nested; WRITE is ignored. Plain descriptors may come before it. */
int vu_table_enter(vu_queue *queue, const struct vu_desc *desc, struct vu_table *table)
{
    if (!(queue->flags & VU_RING_INDIRECT) || table->indirect || desc->flags & VU_DESC_NEXT || !desc->len || desc->len % 16)
        return VU_E_INDIRECT;
    if (desc->len / 16 > vu_table_limit(queue))
        return VU_E_SIZE;
    if (desc->len > UINT64_MAX - desc->addr)
        return VU_E_OVERFLOW;
    table->count = desc->len / 16;
    table->indirect = true;
    vu_segment found;
    int code = reach(queue, desc->addr, desc->len, &found);
    if (code)
        return code;
    table->at = found.host;
    return found.length == desc->len ? 0 : copy(queue, desc->addr, desc->len, table);
}

bool vu_table_span(const vu_queue *queue, const struct vu_desc *desc, struct vu_span *span)
{
    uint64_t run;
    if (queue->translator || !(desc->flags & VU_DESC_INDIRECT) || !desc->len || desc->len / 16 > vu_table_limit(queue))
        return false;
    uint8_t *host = vu_map_run(queue->map, desc->addr, desc->len, &run);
    *span = (struct vu_span){(uintptr_t)host, run};
    return host;
}
