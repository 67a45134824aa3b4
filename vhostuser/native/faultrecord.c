/*
 * The record of a fault server: its last events, for a timeline.
 *
 * What belongs here: a ring that any thread appends to, under a lock of its own that is held for no longer than a copy
 * takes. What does not: counters (each where it is counted).
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "fault.h"

int vu_record_open(struct vu_fault_record *record, uint32_t size)
{
    if (size & (size - 1))
        return VU_E_SIZE;
    pthread_mutex_init(&record->lock, NULL);
    record->size = size;
    record->events = size ? calloc(size, sizeof *record->events) : NULL;
    return size && !record->events ? VU_E_NOMEM : 0;
}

void vu_record_close(struct vu_fault_record *record)
{
    free(record->events);
}

void vu_record_add(struct vu_faults *server, uint32_t kind, uint32_t client, uint64_t page, uint64_t count, uint64_t ns)
{
    struct vu_fault_record *record = &server->record;
    if (!record->size)
        return;
    const struct vu_fault_part *part = vu_fault_part_of(server, page);
    pthread_mutex_lock(&record->lock);
    uint64_t sequence = ++record->last;
    record->events[sequence & (record->size - 1)] = (struct vu_fault_event){
        .sequence = sequence, .ns = ns, .guest = vu_fault_guest(part, page), .length = count << part->shift,
        .client = client, .kind = kind,
    };
    pthread_mutex_unlock(&record->lock);
}

int vu_faults_events(vu_faults *server, uint64_t after, struct vu_fault_event *events, uint32_t max)
{
    struct vu_fault_record *record = &server->record;
    uint32_t count = 0;
    if (!record->size)
        return 0;
    pthread_mutex_lock(&record->lock);
    uint64_t oldest = record->last > record->size ? record->last - record->size : 0;
    for (uint64_t at = after > oldest ? after : oldest; at < record->last && count < max; at++)
        events[count++] = record->events[(at + 1) & (record->size - 1)];
    pthread_mutex_unlock(&record->lock);
    return (int)count;
}
