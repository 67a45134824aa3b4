/*
 * The record of a fault server: its last events, for a timeline.
 *
 * What belongs here: a ring that any thread appends to without a lock and that is read while it is written. What does
 * not: counters (each where it is counted).
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "fault.h"

/* `sequence` is 0 while the slot is being written; a reader that finds the same number before and after has a whole
 * event. */
struct vu_fault_slot {
    _Atomic uint64_t sequence;
    struct vu_fault_event event;
};

int vu_record_open(struct vu_fault_record *record, uint32_t size)
{
    if (size & (size - 1))
        return VU_E_SIZE;
    record->size = size;
    record->slots = size ? calloc(size, sizeof *record->slots) : NULL;
    return size && !record->slots ? VU_E_NOMEM : 0;
}

void vu_record_close(struct vu_fault_record *record)
{
    free(record->slots);
}

void vu_record_add(struct vu_faults *server, uint32_t kind, uint32_t client, uint64_t page, uint64_t count, uint64_t ns)
{
    struct vu_fault_record *record = &server->record;
    if (!record->size)
        return;
    const struct vu_fault_part *part = vu_fault_part_of(server, page);
    uint64_t sequence = atomic_fetch_add(&record->next, 1) + 1;
    struct vu_fault_slot *slot = &record->slots[sequence & (record->size - 1)];
    atomic_store(&slot->sequence, 0);
    atomic_thread_fence(memory_order_release);
    slot->event = (struct vu_fault_event){
        .sequence = sequence, .ns = ns, .guest = vu_fault_guest(part, page), .length = count << part->shift,
        .client = client, .kind = kind,
    };
    atomic_store_explicit(&slot->sequence, sequence, memory_order_release);
}

int vu_faults_events(vu_faults *server, uint64_t after, struct vu_fault_event *events, uint32_t max)
{
    struct vu_fault_record *record = &server->record;
    uint64_t last = atomic_load(&record->next), sequence = after + 1;
    uint32_t count = 0;
    if (last > record->size && sequence <= last - record->size)
        sequence = last - record->size + 1;
    for (; sequence <= last && count < max; sequence++) {
        struct vu_fault_slot *slot = &record->slots[sequence & (record->size - 1)];
        uint64_t before = atomic_load_explicit(&slot->sequence, memory_order_acquire);
        events[count] = slot->event;
        atomic_thread_fence(memory_order_acquire);
        if (before != sequence || atomic_load_explicit(&slot->sequence, memory_order_relaxed) != before) {
            if (before < sequence)
                break; /* not yet written: it and its followers come with the next call */
            continue;  /* overwritten meanwhile */
        }
        count++;
    }
    return (int)count;
}
