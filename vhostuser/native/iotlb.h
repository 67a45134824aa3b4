/*
 * What rings behind an IOMMU ask of the device IOTLB (iotlb.c) and what they keep of its answers (translate.c).
 */
#ifndef VHOSTUSER_IOTLB_H
#define VHOSTUSER_IOTLB_H

#include "queue.h"

/* A range of I/O virtual addresses, both ends included: the last address of all has none behind it. */
struct vu_extent {
    uint64_t first, last;
};

/* A length of 0 has no extent. */
static inline struct vu_extent vu_extent_of(uint64_t first, uint64_t length)
{
    return (struct vu_extent){first, first + length - 1};
}

static inline bool vu_extents_meet(struct vu_extent a, struct vu_extent b)
{
    return a.first <= b.last && b.first <= a.last;
}

struct vu_mapping_of_iova {
    struct vu_extent at;
    uint64_t user; /* of at.first */
    uint32_t access;
};

/* The mapping that holds the address and permits the access: 0; VU_E_MISSING: it was asked for, or there are so many
 * questions of this ring already that it must ask again when they are answered; VU_E_ACCESS: what was answered does not
 * permit it. *removals: of which time this is. */
int vu_iotlb_find(vu_iotlb *iotlb, uint32_t ring, uint64_t iova, uint32_t access, struct vu_mapping_of_iova *found,
                  uint64_t *removals);
/* Moves on whenever a translation that was given out may be none any more. */
uint64_t vu_iotlb_removals(const vu_iotlb *iotlb);
/* Whether something that the ring has asked for is not there yet. */
bool vu_iotlb_waits(const vu_iotlb *iotlb, uint32_t ring);
/* An eventfd that is written when it no longer waits, or -1; false: there is no such ring. */
bool vu_iotlb_attend(vu_iotlb *iotlb, uint32_t ring, int event);
/* The lock: what is in use is only changed, and looked at, with it held. Never held while guest memory is touched. */
void vu_iotlb_lock(vu_iotlb *iotlb);
void vu_iotlb_unlock(vu_iotlb *iotlb);

#endif
