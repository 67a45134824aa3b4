/*
 * The inside of a driver-side ring: what driver.c (every format: life, accounts, waiting) and the formats
 * (driver_split.c, driver_packed.c) share.
 */
#ifndef VHOSTUSER_DRIVER_H
#define VHOSTUSER_DRIVER_H

#include "queue.h"

/* All functions but bytes run inside a guard. */
struct vu_driver_format {
    uint64_t (*avail_bytes)(uint32_t size); /* the descriptors take the same in both */
    uint64_t (*used_bytes)(uint32_t size);
    uint32_t avail_align, used_align;
    /* Writes a chain that has room, from the first free id on, and returns how many descriptors it has; not visible
     * before publish. Nothing of ours changes but what is written again the next time: the memory may be gone halfway. */
    uint32_t (*write)(vu_driver *driver, const vu_buffer *buffers, uint32_t count);
    void (*added)(vu_driver *driver, uint16_t id, uint32_t descriptors);
    bool (*publish)(vu_driver *driver); /* whether the device wants a kick */
    /* Loads the next used entry: 1, 0 if there is none, or a code. */
    int (*look)(const vu_driver *driver, vu_returned *entry);
    void (*taken)(vu_driver *driver, uint32_t descriptors);
    void (*arm)(vu_driver *driver);
    void (*disarm)(vu_driver *driver);
    uint32_t (*base)(const vu_driver *driver); /* touches nothing */
};

extern const struct vu_driver_format vu_driver_split, vu_driver_packed;

struct vu_driver {
    vu_map *map;
    const struct vu_driver_format *format;
    uint32_t size, flags;
    struct vu_driver_parts at;
    struct vu_desc *tables; /* [size][VU_DRIVER_TABLE], NULL without VU_DRIVER_INDIRECT */
    uint32_t free_count;    /* descriptors */
    uint16_t free_head;     /* of the ids that no chain has; split: of descriptors */
    struct {                /* with VU_DRIVER_IN_ORDER */
        uint16_t oldest;    /* id of the chain that comes back next */
        bool open;          /* `entry` is for chains up to its head, of which some have yet to be taken */
        vu_returned entry;
    } order;
    union {
        struct {
            struct vu_desc *desc;
            struct vu_avail *avail;
            struct vu_used *used;
        };
        struct {
            struct vu_packed_desc *ring;
            struct vu_packed_event *driver, *device; /* who writes it */
        };
        void *parts[3];
    };
    union {
        struct {
            uint16_t added;     /* available index with what was added */
            uint16_t published; /* the index that the device sees */
            uint16_t taken;     /* used index up to which we have looked */
        } split;
        struct {
            struct vu_place added, published, taken;
            uint16_t first_flags; /* of the first descriptor that was not published: stored by publish */
        } packed;
    };
    struct vu_offer {
        uint16_t next;        /* of the free list; split: or of the chain */
        uint16_t descriptors; /* of the chain that has this id; 0: none does */
        uint64_t writable;    /* bytes */
    } offers[];
};

/* The guest address of an id's indirect table. */
static inline uint64_t vu_driver_table(const vu_driver *driver, uint16_t id)
{
    return driver->at.tables + id * vu_desc_bytes(VU_DRIVER_TABLE);
}

#endif
