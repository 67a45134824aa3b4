/*
 * The whole boundary between Python and C.
 *
 * cffi compiles the declarations of this very file, so it holds plain declarations only: no #if, no
 * #include, constants as `#define NAME number`. What C files share among themselves is in core.h.
 *
 * Rules for everything declared here:
 *  - cffi releases the GIL around each call. No function calls back into Python.
 *  - A function marked [touches] reads or writes guest memory: it may block for as long as a missing page
 *    takes to arrive, so it is never called on the control thread. It survives a page that is lost
 *    (SIGBUS: the file was truncated) or revoked (SIGSEGV) and then returns VU_E_FAULT.
 *  - Functions return 0 or a count on success and a negative VU_E_ code on failure; functions that return
 *    a pointer return NULL and store the code in *error. VU_E_SYS means: see errno.
 *  - Locks: vu_touch holds one, vu_pages the second, the record of a fault server the third, vu_iotlb the fourth, and no
 *    thread holds two of them. Everything else is immutable, owned by one thread at a time, or atomic.
 */

/* ---- error codes ------------------------------------------------------------------------------------- */

#define VU_E_SYS -1        /* a system call failed, errno says why */
#define VU_E_NOMEM -2      /* no memory */
#define VU_E_FAULT -3      /* guest memory is gone: truncated file, or revoked mapping */
#define VU_E_RANGE -4      /* an address range is not inside the regions */
#define VU_E_OVERFLOW -5   /* address + length wraps around */
#define VU_E_OVERLAP -6    /* two regions share an address */
#define VU_E_SHORT -7      /* the file is smaller than the region, log or in-flight area that should lie in it */
#define VU_E_SIZE -8       /* a ring size, table size or count that the specification forbids */
#define VU_E_ALIGN -9      /* a ring address is not aligned as the specification asks */
#define VU_E_INDEX -10     /* the available index is more than a ring size ahead */
#define VU_E_HEAD -11      /* a head, or a `next`, outside of the descriptor table */
#define VU_E_LOOP -12      /* a chain longer than its table: a loop */
#define VU_E_INDIRECT -13  /* an indirect descriptor that the specification forbids, or was not negotiated */
#define VU_E_ORDER -14     /* a readable descriptor after a writable one */
#define VU_E_INFLIGHT -15  /* the in-flight region contradicts itself or the ring */
#define VU_E_CLOSED -16    /* the queue was closed while the chain was out */
#define VU_E_FILE -17      /* not a regular file: a pipe, a socket, a device; its size cannot be judged */
#define VU_E_MISSING -18   /* the device IOTLB has no translation yet: it was asked for */
#define VU_E_ACCESS -19    /* the device IOTLB does not permit it, or no such permission exists */
#define VU_E_PIECES -20    /* a part of the ring is not in one piece of guest memory */

/* ---- guest memory (memory.c) and its dirty log (log.c) ------------------------------------------------- */

typedef struct vu_region vu_region; /* one mapping; reference counted; unmapped with the last reference */
typedef struct vu_map vu_map;       /* an immutable set of regions; reference counted, shared between threads */
typedef struct vu_log vu_log;       /* the mapped dirty log; reference counted */

#define VU_REGION_AT_USER 1 /* map at the front-end's own address if that range is free (MAP_FIXED_NOREPLACE) */
#define VU_REGION_HIDDEN 2  /* PROT_NONE until vu_region_reveal: nothing can touch it by mistake */
#define VU_REGION_OWN 4     /* we are the front-end: `user` is taken to be `host` */
#define VU_REGION_READ_ONLY 8 /* mapped without PROT_WRITE: a write fails as if memory were gone */

struct vu_region_info {
    uint64_t guest, size, user, offset; /* as the front-end gave them */
    uint64_t host;                      /* our address of the region's first byte */
    uint64_t base, length;              /* the whole mapping, page aligned: [base, base + length) */
    uint64_t page_size;                 /* bytes: the system's, or the huge page size of a hugetlbfs file */
    uint64_t device, inode;             /* of the file */
    int hugetlb;                        /* 1 on hugetlbfs */
    int sealed;                         /* 1 if the file is sealed against shrinking (F_SEAL_SHRINK) */
};

/* Maps a region; the caller keeps fd. Checks wraps and the size of the file; touches nothing. */
vu_region *vu_region_map(int fd, uint64_t guest, uint64_t size, uint64_t user, uint64_t offset, int flags, int *error);
/* Private anonymous memory of whole pages, which no other process has; `user` is `host`. */
vu_region *vu_region_private(uint64_t guest, uint64_t size, int *error);
void vu_region_get(vu_region *region);
void vu_region_put(vu_region *region);
void vu_region_describe(const vu_region *region, struct vu_region_info *info);
int vu_region_reveal(vu_region *region);   /* PROT_READ | PROT_WRITE; refused (VU_E_FAULT) once revoked */
int vu_region_revoke(vu_region *region);   /* PROT_NONE for good: waiters that are woken get VU_E_FAULT */
int vu_region_no_huge(vu_region *region);  /* MADV_DONTNEED and MADV_NOHUGEPAGE, before userfaultfd registration */

/* Takes a reference of each region. Guest ranges must not overlap, nor user ranges. count may be 0. */
vu_map *vu_map_new(vu_region *const *regions, uint32_t count, int *error);
void vu_map_get(vu_map *map);
void vu_map_put(vu_map *map);
int vu_map_revoke(vu_map *map); /* all regions; 10 ms per GiB of mapped pages; touches nothing */

/* Translation of one byte address; 0 where nothing is mapped. */
uint64_t vu_map_guest_to_host(const vu_map *map, uint64_t guest);
uint64_t vu_map_user_to_host(const vu_map *map, uint64_t user);
uint64_t vu_map_user_to_guest(const vu_map *map, uint64_t user, int *error); /* guest 0 is a real address */

int64_t vu_map_read(const vu_map *map, uint64_t guest, void *to, uint64_t length);          /* [touches] all or error */
int64_t vu_map_write(const vu_map *map, uint64_t guest, const void *from, uint64_t length); /* [touches] all or error */
/* Stores one aligned word behind everything that was written before: an index of a ring. [touches] */
int vu_map_publish16(const vu_map *map, uint64_t guest, uint16_t value);

/* The dirty log: bit n is guest page n of 4096 bytes, from `offset` in the file. The caller keeps fd. */
vu_log *vu_log_map(int fd, uint64_t size, uint64_t offset, int *error);
void vu_log_get(vu_log *log);
void vu_log_put(vu_log *log);
/* An eventfd that is signalled when the log has changed, at most once for each call of a queue's function, or -1. Only
 * while no queue has the log; the caller keeps fd open for as long as one may. */
void vu_log_set_event(vu_log *log, int fd);
int vu_log_mark(vu_log *log, uint64_t guest, uint64_t length); /* atomic; pages outside of the log: VU_E_RANGE */

typedef struct {
    uint64_t guest, length; /* bytes, whole pages of 4096 */
} vu_range;
#define VU_LOG_RANGES 8 /* the least `max` of vu_log_take */
/* What a front-end does with the log: takes marks away, each atomically, from page *page on, and stores runs of
 * neighbouring pages. Returns how many; fewer than max - VU_LOG_RANGES + 1 only at the end of the log. *page is where
 * to go on. */
int vu_log_take(vu_log *log, uint64_t *page, vu_range *ranges, uint32_t max);

/* ---- the device IOTLB, where addresses go through an IOMMU (iotlb.c) --------------------------------------- */

typedef struct vu_iotlb vu_iotlb; /* of one connection; reference counted, shared between threads */

#define VU_ACCESS_READ 1
#define VU_ACCESS_WRITE 2
#define VU_ACCESS_BOTH 3
#define VU_IOTLB_MOST 16384 /* translations: what exceeds that has all forgotten, and asked for again */

struct vu_iotlb_question {
    uint64_t iova;
    uint32_t access; /* VU_ACCESS_ */
    uint32_t ring;
    uint32_t denied; /* 1: it was answered, and is not permitted; the ring breaks */
};

vu_iotlb *vu_iotlb_new(uint32_t rings, int *error);
void vu_iotlb_get(vu_iotlb *iotlb);
void vu_iotlb_put(vu_iotlb *iotlb);
int vu_iotlb_fd(const vu_iotlb *iotlb); /* an eventfd, readable when vu_iotlb_take has something */
/* What rings have asked for and nobody has taken: how many, `max` if there may be more. */
uint32_t vu_iotlb_take(vu_iotlb *iotlb, struct vu_iotlb_question *taken, uint32_t max);
/* [iova, iova + size) is the front-end's memory from `user` on, all of which is in the map. What is there already must say
 * the same, and gains the permission. Wakes rings all of whose questions are answered by it. 0, VU_E_SIZE (of nothing),
 * VU_E_OVERFLOW, VU_E_ACCESS, VU_E_RANGE, VU_E_OVERLAP (something else is there: invalidate it first), VU_E_NOMEM. */
int vu_iotlb_update(vu_iotlb *iotlb, const vu_map *map, uint64_t iova, uint64_t size, uint64_t user, uint32_t access);
/* Forgets a part; of 0 bytes from 0: everything. What rings have in use goes on being used: see vu_queue_uses. 0,
 * VU_E_SIZE, VU_E_OVERFLOW. */
int vu_iotlb_invalidate(vu_iotlb *iotlb, uint64_t iova, uint64_t size);
void vu_iotlb_clear(vu_iotlb *iotlb); /* everything, questions too. Only while no ring runs */
int vu_iotlb_look(vu_iotlb *iotlb, uint64_t iova, uint64_t *user); /* VU_ACCESS_, 0 where nothing is; asks nobody */
uint32_t vu_iotlb_count(vu_iotlb *iotlb); /* translations; neighbours in all respects are one */

/* ---- device side of a ring (queue.c whatever the format, split.c, packed.c) ------------------------------- */

typedef struct vu_queue vu_queue;
typedef struct vu_inflight vu_inflight; /* the mapped in-flight region; reference counted */
typedef struct vu_touch vu_touch;       /* the pool of touch threads, see below */

#define VU_RING_EVENT_IDX 1
#define VU_RING_INDIRECT 2
#define VU_RING_PACKED 4      /* the packed format: desc is the ring, avail the driver area, used the device area */
#define VU_RING_LOG_USED 8    /* VHOST_VRING_F_LOG: mark used ring writes at log_addr */
#define VU_RING_GUEST_ADDR 16 /* desc, avail, used are guest addresses, not user addresses */
#define VU_RING_NOTIFY_ON_EMPTY 32 /* split: call when nothing is left, also a driver that asked for no calls */
#define VU_RING_SWAPPED 64    /* split: in the other byte order than ours */

struct vu_ring {
    uint32_t size;  /* 1 to 32768; split: a power of two */
    uint32_t flags; /* VU_RING_ */
    uint64_t desc, avail, used;
    uint64_t log_addr; /* guest address at which writes to the used ring are logged; packed: found by itself */
    uint32_t base;     /* as in SET_VRING_BASE; packed: with or without the used half */
    uint32_t index;    /* of the ring on its connection: selects its part of the in-flight region */
};

typedef struct {
    uint8_t *host;
    uint64_t length; /* bytes, never 0 */
    uint64_t guest;
} vu_segment;

/* One popped chain: validated, translated, copied out of guest memory. Owned by its queue's pool from pop to push. */
typedef struct vu_chain {
    uint16_t head;           /* split: first descriptor; packed: buffer id */
    uint16_t descriptors;    /* ring slots that it used */
    uint32_t readable_count; /* segments[0 .. readable_count) are readable by the device */
    uint32_t writable_count; /* segments[readable_count .. readable_count + writable_count) are writable */
    uint64_t readable;       /* bytes */
    uint64_t writable;       /* bytes */
    uint64_t written;        /* high-water mark of bytes written: push logs at least so much as dirty */
    uint64_t filled;         /* how far vu_chain_write has come without losing a page: what push says, unless told */
    vu_segment *segments;
    int fault;               /* 0, or VU_E_FAULT: a page of it could not be had */
    uint64_t cookie;         /* free for the device */
} vu_chain;

/* Validates size, alignment and containment; keeps references of map, log, inflight, iotlb (these three may be NULL).
 * With an IOTLB every address of the ring and in it is an I/O virtual one, and writes to the used ring are logged where
 * they go; VU_E_MISSING: parts of the ring were asked for, try again. Touches nothing: the ring's own indexes are read by
 * the first pop. */
vu_queue *vu_queue_new(vu_map *map, const struct vu_ring *ring, vu_log *log, vu_inflight *inflight, vu_iotlb *iotlb,
                       int *error);
/* Frees; chains still out become invalid. */
void vu_queue_free(vu_queue *queue);
/* For GET_VRING_BASE: the next available index; packed: both places. Only when no chain is out, else chains in flight are
 * lost; with an in-flight region they are not, it names them and they come again (and then decide where to go on, not the
 * base). */
uint32_t vu_queue_base(const vu_queue *queue);
uint32_t vu_queue_out(const vu_queue *queue); /* chains popped and not yet pushed */
int vu_queue_broken(const vu_queue *queue);   /* 0 or the sticky VU_E_ code */
uint16_t vu_queue_broken_head(const vu_queue *queue);

struct vu_queue_stats {
    uint64_t returned;      /* chains pushed */
    uint64_t readable;      /* bytes of these that the driver gave */
    uint64_t written;       /* bytes of these that the device says it wrote */
    uint64_t batches;       /* pushes: updates of the used index */
    uint64_t kicks;         /* as told by vu_queue_kicked */
    uint64_t calls;         /* writes to the call eventfd */
    uint64_t served_ns;     /* sum over the returned of the time from pop to push */
    uint64_t histogram[32]; /* these times: bucket n counts [2^n, 2^(n+1)) microseconds, bucket 0 from 0 */
    uint64_t out;           /* as vu_queue_out */
    uint64_t oldest;        /* when the oldest of those was popped, CLOCK_MONOTONIC in nanoseconds; 0: none is out */
};
/* From any thread while the queue exists; counters that belong together may be one step apart. Looks at every slot if a
 * chain is out. */
void vu_queue_get_stats(const vu_queue *queue, struct vu_queue_stats *stats);
void vu_queue_kicked(vu_queue *queue); /* its thread has taken a kick */

/* Whether the ring itself or a chain that is out lies in these I/O virtual addresses, even in part; as they are given to
 * vu_iotlb_invalidate, after it. From the thread that opens and frees the queue, while another uses it. */
int vu_queue_uses(vu_queue *queue, uint64_t iova, uint64_t size);
/* An eventfd that is written when what the queue waited for has been translated: whoever sleeps reads it. -1: none. */
int vu_queue_translated_fd(const vu_queue *queue);

/* Pops up to `max` chains: the count, 0 if the ring is empty or its next chain waits for a translation, or the sticky code. Chains in front of one that breaks
 * the ring are handed out first, and can be returned like all that are out. After a restart the chains that the in-flight
 * region names come first, in the order in which they were taken. [touches] */
int vu_queue_pop(vu_queue *queue, vu_chain **chains, uint32_t max);
/* Gives back, unused and in the order in which they were popped, the chains that were popped last: they will be popped
 * again, by whoever serves the ring then. [touches] */
int vu_queue_unpop(vu_queue *queue, vu_chain *const *chains, uint32_t count);
/* Returns chains with the number of bytes written into each (at most chain->writable counts; NULL: chain->filled); one
 * update of the used index for all. Releases them also where it fails: nothing is written any more then. [touches] */
int vu_queue_push(vu_queue *queue, vu_chain *const *chains, const uint32_t *lengths, uint32_t count);
/* Writes the call eventfd once if the driver wants to hear of what was pushed since the last signal: 1 if it did. A
 * call that has no descriptor yet is kept for the next signal. VU_E_SYS: the descriptor is of no use. [touches] */
int vu_queue_signal(vu_queue *queue);
/* Asks the driver for kicks; 1 if something became available meanwhile (pop again), else 0. [touches] */
int vu_queue_arm(vu_queue *queue);
/* Tells the driver that kicks are not needed while we poll. [touches] */
int vu_queue_disarm(vu_queue *queue);
/* The descriptor that signal writes to, or -1. Atomic, from any thread. The caller owns fd and keeps it open; to change
 * it while a thread may be signalling, dup3 the new one over the old number. */
void vu_queue_set_call(vu_queue *queue, int fd);
/* The next signal is sent whatever the driver asked for: once after (re)start. */
void vu_queue_force_signal(vu_queue *queue);
/* From any thread, before the queue's own is told to stop: chains under way may be left in the in-flight region. 0 and
 * nothing without one. */
int vu_queue_leave(vu_queue *queue);

/* Signals an eventfd of the front-end's without ever waiting, once vu_event_open has been called: 0 or VU_E_SYS. For
 * threads that must not wait (event.c says why a write will not do). */
int vu_event_open(void);
int vu_event_signal(int fd);

/* Copies, bounded by the chain: the number of bytes copied, or VU_E_FAULT. [touches] */
int64_t vu_chain_read(vu_queue *queue, vu_chain *chain, uint64_t offset, void *to, uint64_t length);
int64_t vu_chain_write(vu_queue *queue, vu_chain *chain, uint64_t offset, const void *from, uint64_t length);

/* What a device in Python looks at first, for a whole batch in one call. */
#define VU_PEEK 32
struct vu_peek {
    uint64_t readable, writable; /* bytes, as in the chain */
    uint64_t length;             /* how many of the first readable bytes are in `bytes`: all, VU_PEEK, or none */
    uint8_t bytes[32];           /* none while the queue has a touch pool: their page may be missing */
};
void vu_chain_peek(vu_queue *queue, vu_chain *const *chains, uint32_t count, struct vu_peek *peeks); /* [touches] */

/* In-flight region: bytes for that many queues of one format; all zero is a fresh one. The caller keeps fd. */
uint64_t vu_inflight_size(uint32_t queues, uint32_t queue_size, int packed);
vu_inflight *vu_inflight_map(int fd, uint64_t size, uint64_t offset, uint32_t queues, uint32_t queue_size, int packed,
                             int *error);
void vu_inflight_get(vu_inflight *inflight);
void vu_inflight_put(vu_inflight *inflight);

/* ---- driver side of a ring, for front-ends, tests and measurements (driver.c, driver_split.c, driver_packed.c) ---- */

typedef struct vu_driver vu_driver;

typedef struct {
    uint64_t guest; /* where the device finds the bytes */
    uint32_t length;
    uint32_t writable; /* 1: by the device */
} vu_buffer;

#define VU_DRIVER_EVENT_IDX 1
#define VU_DRIVER_INDIRECT 2 /* put each chain into an indirect table of its own */
#define VU_DRIVER_PACKED 4   /* the packed format */
#define VU_DRIVER_IN_ORDER 8 /* the device returns chains in their order, and may write one used entry for several */
#define VU_DRIVER_TABLE 128  /* entries of each such table: the longest chain */

struct vu_driver_parts { /* guest addresses */
    uint64_t desc, avail, used; /* packed: the ring, the driver area, the device area */
    uint64_t tables; /* of all indirect tables, with VU_DRIVER_INDIRECT */
};
typedef struct {
    uint32_t head, length; /* head; packed: buffer id. bytes that the device says it wrote; in order, and not the last
                            * of those with one entry: all that there was room for */
} vu_returned;

/* A ring laid out at guest address `at` of `map` (desc, avail, used, then indirect tables). Clears it. [touches] */
vu_driver *vu_driver_new(vu_map *map, uint64_t at, uint32_t size, uint32_t flags, int *error);
/* The same with each part where the caller wants it: aligned as the specification asks, each in one region. [touches] */
vu_driver *vu_driver_place(vu_map *map, const struct vu_driver_parts *parts, uint32_t size, uint32_t flags, int *error);
/* Goes on in another map that holds the same ring at the same guest addresses. Touches nothing. On failure stays. */
int vu_driver_move(vu_driver *driver, vu_map *map);
void vu_driver_free(vu_driver *driver);
uint64_t vu_driver_bytes(uint32_t size, uint32_t flags); /* of guest memory that such a ring takes */
uint64_t vu_driver_desc(const vu_driver *driver);        /* guest addresses of its parts */
uint64_t vu_driver_avail(const vu_driver *driver);
uint64_t vu_driver_used(const vu_driver *driver);
/* What GET_VRING_BASE is to say once everything that was published has been taken back. */
uint32_t vu_driver_base(const vu_driver *driver);
/* Offers one chain; its head, or VU_E_SIZE when there is no room for it or count is 0. Not visible before
 * vu_driver_publish. Buffers are taken as they are, also those that a device must refuse. [touches] */
int vu_driver_add(vu_driver *driver, const vu_buffer *buffers, uint32_t count);
/* Offers `chains` chains, the first of counts[0] buffers, and so on, and stores their heads: how many there was room
 * for. Negative: the code of the first chain. [touches] */
int vu_driver_add_many(vu_driver *driver, const vu_buffer *buffers, const uint32_t *counts, uint32_t chains, uint16_t *heads);
/* Publishes what was added; 1 if the device wants a kick, else 0. [touches] */
int vu_driver_publish(vu_driver *driver);
/* Takes one used chain: 1 and its head and length, 0 if there is none, negative if the device broke the ring. [touches] */
int vu_driver_take(vu_driver *driver, uint16_t *head, uint32_t *length);
/* Takes up to `max`: how many. Those in front of one that breaks the ring are handed out first. [touches] */
int vu_driver_take_many(vu_driver *driver, vu_returned *returned, uint32_t max);
/* Waits until something was used: 1, or 0 after timeout_ns. Looks for spin_ns, then asks for a call and sleeps on
 * `call`, an eventfd that it reads; without one (-1) it goes on looking, ever more rarely. [touches] */
int vu_driver_wait(vu_driver *driver, int call, uint64_t spin_ns, uint64_t timeout_ns);
/* Asks for calls; 1 if something was used meanwhile. [touches] */
int vu_driver_arm(vu_driver *driver);
int vu_driver_disarm(vu_driver *driver);

/* ---- userfaultfd (uffd.c) ------------------------------------------------------------------------------ */

#define VU_UFFD_MISSING 1
#define VU_UFFD_MINOR 2

/* A userfaultfd, CLOEXEC and NONBLOCK, handshake done with `features` (0: none asked). device_fd: a descriptor of
 * /dev/userfaultfd, or -1 for the system call. Returns the descriptor or VU_E_SYS. */
int vu_uffd_open(int device_fd, uint64_t features);
/* Features that the kernel knows, by a throw-away descriptor. */
int vu_uffd_features(int device_fd, uint64_t *features);
int vu_uffd_register(int uffd, uint64_t host, uint64_t length, int mode, uint64_t *ioctls);
int vu_uffd_unregister(int uffd, uint64_t host, uint64_t length); /* wakes those who wait in the range */
int vu_uffd_wake(int uffd, uint64_t host, uint64_t length);
/* Bytes placed, or VU_E_SYS (EEXIST: the page is there; EAGAIN: try again). */
int64_t vu_uffd_copy(int uffd, uint64_t host, const void *from, uint64_t length, int wake);
int64_t vu_uffd_zeropage(int uffd, uint64_t host, uint64_t length, int wake);
int64_t vu_uffd_continue(int uffd, uint64_t host, uint64_t length, int wake);
int64_t vu_uffd_poison(int uffd, uint64_t host, uint64_t length);
int64_t vu_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t length, int wake);
/* 0 once the process that opened it has ended or called exec, else 1. `host`: any address, nothing happens to it. */
int vu_uffd_alive(int uffd, uint64_t host);
/* Reads up to `max` fault addresses: the count, 0 if none is waiting. */
int vu_uffd_read(int uffd, uint64_t *addresses, uint64_t *flags, uint32_t max);

/* ---- fault-ahead: touch threads (touch.c) ----------------------------------------------------------------- */

struct vu_fault_stats {
    uint64_t waited;        /* touches of a page that was missing */
    uint64_t ahead;         /* pages of those that were asked for in parallel, before their request ran */
    uint64_t lost;          /* touches that ended in VU_E_FAULT */
    uint64_t blocked_ns;    /* sum of the time of all waits */
    uint64_t histogram[32]; /* waits by duration: bucket n counts [2^n, 2^(n+1)) microseconds, bucket 0 from 0 */
};

/* One pool for the process. Python starts its threads (daemon threads, signals blocked), each calls vu_touch_run. */
vu_touch *vu_touch_new(uint32_t capacity);
void vu_touch_run(vu_touch *touch);  /* [touches] returns after vu_touch_stop */
void vu_touch_stop(vu_touch *touch);
void vu_touch_free(vu_touch *touch); /* when all threads have returned */
void vu_touch_stats(const vu_touch *touch, struct vu_fault_stats *stats);

/* Between LISTEN and END a queue has a pool, else NULL. Only while no thread uses the queue. */
int vu_queue_set_touch(vu_queue *queue, vu_touch *touch);
/* Touches the ring's own pages, several at once. [touches] */
int vu_queue_touch_ring(vu_queue *queue);
/* 0: every page of the chain is resident, go on. 1: missing pages were asked for, the chain comes back through
 * vu_ahead_collect. A chain with one missing page in a queue with nothing else to do is touched at once ([touches], 0). */
int vu_ahead_submit(vu_queue *queue, vu_chain *chain, int alone);
/* Chains whose pages have all been touched; chain->fault tells of those that could not. Never blocks. */
int vu_ahead_collect(vu_queue *queue, vu_chain **chains, uint32_t max);
uint32_t vu_ahead_waiting(const vu_queue *queue); /* chains submitted and not yet collected */
int vu_ahead_fd(const vu_queue *queue);           /* an eventfd, readable when collect has something; -1 without a pool */

/* ---- the fault server's state: which pages are there, who waits for which (faultpages.c) -------------------- */

/* Pages are numbered through all regions; the number of a region's first page is the next multiple of 64. Clients are
 * numbered from 0. Every function is one step under the one lock, and none makes a system call on a client's
 * descriptor: faultpages.c says why no order of these steps loses a wake-up, and the tests drive all orders. */
typedef struct vu_pages vu_pages;

#define VU_PAGES_CLIENTS 64

struct vu_wait {
    uint64_t page;
    uint64_t since;  /* nanoseconds, as given to vu_pages_fault */
    uint32_t client; /* held, if it was taken: vu_pages_release it after it was woken */
    uint32_t asked;  /* 1: the page was asked for */
};

struct vu_pages_count {
    uint64_t total, received, lost;
    uint64_t waiting; /* pages that are waited for, by each client for itself */
};

#define VU_PAGE_MISSING 0  /* the fault was recorded and its page has to be asked for */
#define VU_PAGE_RECEIVED 1 /* the page is there: wake the client now */
#define VU_PAGE_LOST 2     /* the page will never come: poison it, now */
#define VU_PAGE_MERGED 3   /* this client waits for the page already */

/* sizes: pages of each region. */
vu_pages *vu_pages_new(const uint64_t *sizes, uint32_t regions, int *error);
void vu_pages_free(vu_pages *pages);
/* A memfd of the received bits, that others can only map read-only: page n is bit n % 8 of byte n / 8. Stays ours. */
int vu_pages_fd(const vu_pages *pages);
void vu_pages_counts(vu_pages *pages, struct vu_pages_count *counts);

/* Clients. A number stays taken until vu_pages_vacate, so what belongs to it can be kept beside without a lock. */
int vu_pages_join(vu_pages *pages);                        /* a number, or VU_E_SIZE: VU_PAGES_CLIENTS are there */
void vu_pages_admit(vu_pages *pages, uint32_t client);     /* from here it can be held, and can wait */
int vu_pages_hold(vu_pages *pages, uint32_t client);       /* 1: it stays until released; 0: it has left */
uint64_t vu_pages_hold_all(vu_pages *pages);               /* holds every client: bit n is client n */
/* Forgets its waits. 1: nobody holds it, close what belongs to it and vacate; 0: that falls to the last release. */
int vu_pages_leave(vu_pages *pages, uint32_t client);
int vu_pages_release(vu_pages *pages, uint32_t client);    /* 1: it has left and this was the last, as in leave */
void vu_pages_vacate(vu_pages *pages, uint32_t client);

/* Room for so many more waits, so that a fault that is read can be recorded: 0 or VU_E_NOMEM. */
int vu_pages_reserve(vu_pages *pages, uint32_t count);
/* A fault was read from a client's descriptor: VU_PAGE_; VU_E_CLOSED: the client has left; VU_E_NOMEM. */
int vu_pages_fault(vu_pages *pages, uint32_t client, uint64_t page, uint64_t now);
/* Up to `max` pages that are waited for and were not asked for yet, the longest waited for first; each once. */
uint32_t vu_pages_wanted(vu_pages *pages, uint64_t *found, uint32_t max);
/* The next run of pages in [from, to) that nobody has claimed, of at most `most` and 64: its length, 0 if there is
 * none, and in *first its start. Withheld pages count only while somebody waits for them. */
uint32_t vu_pages_missing(vu_pages *pages, uint64_t from, uint64_t to, uint32_t most, uint64_t *first);
/* The same, and claims them: nobody else places them until they are settled, or given up with unclaim. */
uint32_t vu_pages_claim(vu_pages *pages, uint64_t from, uint64_t to, uint32_t most, uint64_t *first);
/* They could not be placed. Those that are waited for become wanted again: 1 if there are any. */
int vu_pages_unclaim(vu_pages *pages, uint64_t first, uint64_t count);
/* Claimed pages have been placed, or with `lost` never will be. Then as vu_pages_take. */
uint32_t vu_pages_settle(vu_pages *pages, uint64_t first, uint64_t count, int lost, struct vu_wait *waits,
                         uint32_t max);
/* Takes up to `max` waits for settled pages: wake these. Until it returns less than `max`. */
uint32_t vu_pages_take(vu_pages *pages, uint64_t first, uint64_t count, struct vu_wait *waits, uint32_t max);
/* The source was lost: all that was asked for and is waited for has to be asked for again. */
void vu_pages_ask_again(vu_pages *pages);
/* Up to `max` pages that somebody has waited for since before `since`. */
uint32_t vu_pages_overdue(vu_pages *pages, uint64_t since, uint64_t *found, uint32_t max);
/* Up to `max` waits as they are, for whoever wants to look: first those that were not asked for yet. None is held. */
uint32_t vu_pages_waits(vu_pages *pages, struct vu_wait *waits, uint32_t max);
void vu_pages_withhold(vu_pages *pages, uint64_t first, uint64_t count, int on);

/* ---- the fault server: the front-end's half of postcopy (faultserver.c, faultplace.c, faultwake.c, faultput.c) - */

typedef struct vu_faults vu_faults;

#define VU_PUT_COPY 0     /* UFFDIO_COPY through our own userfaultfd */
#define VU_PUT_ZEROPAGE 1 /* UFFDIO_ZEROPAGE whatever the source says */
#define VU_PUT_CONTINUE 2 /* the file first, then UFFDIO_CONTINUE for whoever waits */
#define VU_PUT_MOVE 3     /* UFFDIO_MOVE out of a staging area; private anonymous memory */

#define VU_WAKE_BROADCAST 0 /* page by page, every client, whether it waits or not */
#define VU_WAKE_DEMAND 1    /* page by page, whoever waits */
#define VU_WAKE_BATCH 2     /* runs of pages, whoever waits, neighbouring pages in one */

struct vu_fault_region {
    uint64_t guest, size; /* bytes */
    uint64_t host;        /* ours, registered with our userfaultfd */
    uint64_t page_size;   /* bytes, a power of two */
    uint64_t offset;      /* in the file */
    uint64_t source;      /* our address of the bytes to place, or 0: vu_faults_place brings them */
    int fd;               /* the file, or -1; the caller's, open while the server exists */
};

struct vu_fault_config {
    int uffd;             /* ours: pages are placed through it. The caller's, open while the server exists */
    int control;          /* eventfd: readable when vu_faults_serve has to look around; written by this C code too */
    int wanted;           /* eventfd: readable when vu_faults_wanted has something */
    int notice;           /* eventfd: written when all pages are there, a client is gone, or placing failed */
    uint32_t put, wake;   /* VU_PUT_, VU_WAKE_ */
    uint32_t batch;       /* pages of a placement with VU_WAKE_BATCH, 1 to 64 */
    uint32_t events;      /* how many the record keeps: a power of two, or 0 */
    uint64_t deadline_ns; /* a wait that lasts longer ends in UFFDIO_POISON; 0: none does */
};

struct vu_fault_span {
    uint64_t guest, size; /* bytes, whole pages of one region */
    uint64_t host;        /* where the client has it */
};

struct vu_fault_range {
    uint64_t guest, length;
};

struct vu_client_stats {
    uint64_t faults;        /* messages read from its userfaultfd */
    uint64_t merged_faults; /* of these, for a page that it waited for already */
    uint64_t late;          /* of these, for a page that had come meanwhile: woken at once */
    uint64_t stray;         /* of these, at addresses that belong to no region */
    uint64_t wakes;         /* requests to wake it, whatever their kind */
    uint64_t woken;         /* pages that it waited for and was woken for */
    uint64_t merged_wakes;  /* of these, woken by the request of a neighbouring page */
    uint64_t spurious;      /* wakes for which it was not known to wait */
    uint64_t refused;       /* requests that the kernel refused */
    uint64_t channel;       /* of the wakes, sent as messages of the wake channel */
    uint64_t acknowledged;  /* bytes that the back-end says it has woken */
    uint64_t blocked_ns;    /* sum of the times from reading a fault to its wake */
    uint64_t histogram[32]; /* these times: bucket n counts [2^n, 2^(n+1)) microseconds, bucket 0 from 0 */
    uint64_t gone;          /* 1: its process has ended; its descriptors are closed */
};

struct vu_server_stats {
    struct vu_pages_count pages;
    uint64_t placed;     /* pages that we placed */
    uint64_t demanded;   /* of these, waited for by somebody at that moment */
    uint64_t zero;       /* of these, placed as zeros without data */
    uint64_t duplicates; /* pages that came again and were dropped */
    uint64_t present;    /* pages that the kernel says were there before we placed them */
    uint64_t requests;   /* placements: system calls */
    uint64_t paused;
    uint64_t error;      /* errno of a placement that failed and paused the server, or 0 */
};

#define VU_EVENT_FAULT 0
#define VU_EVENT_PLACED 1
#define VU_EVENT_WOKEN 2
#define VU_EVENT_LOST 3
#define VU_EVENT_GONE 4
#define VU_EVENT_PRESENT 5 /* placed by somebody else before us: touched without a fault, perhaps */

struct vu_fault_event {
    uint64_t sequence; /* from 1 */
    uint64_t ns;       /* CLOCK_MONOTONIC */
    uint64_t guest, length;
    uint32_t client;   /* of a fault, a wake, one gone */
    uint32_t kind;     /* VU_EVENT_ */
};

vu_faults *vu_faults_new(const struct vu_fault_config *config, const struct vu_fault_region *regions, uint32_t count,
                         int *error);
void vu_faults_free(vu_faults *server); /* when no thread is inside; closes what clients have left here */
vu_pages *vu_faults_pages(vu_faults *server);
/* A client: its number, or VU_E_. Takes over, also where it fails, uffd and channel (a SOCK_SEQPACKET of the wake
 * channel after HELLO, or -1); ranges: how many a message may have. Client 0 is the first, for our own threads. */
int vu_faults_add(vu_faults *server, int uffd, int channel, uint32_t ranges, const struct vu_fault_span *spans,
                  uint32_t count);
/* Forgets it, wakes its threads (they look again), closes its descriptors as soon as nobody uses them. */
int vu_faults_remove(vu_faults *server, uint32_t client);
/* Reads faults, places their pages if the source is mapped, wakes; until vu_faults_stop. One thread. 0 or VU_E_SYS. */
int vu_faults_serve(vu_faults *server);
void vu_faults_stop(vu_faults *server);
void vu_faults_pause(vu_faults *server, int on); /* paused: faults are recorded, nothing is placed from the mapped
 * source */
/* Whatever somebody waits for is wanted again, also what was asked for already. */
void vu_faults_ask_again(vu_faults *server);
/* Places what is missing in the range from the mapped source: pages placed, or VU_E_; less than all when paused. */
int64_t vu_faults_fill(vu_faults *server, uint64_t guest, uint64_t length);
/* Places `data` (NULL: zeros) where pages are missing, for any source: pages placed, or VU_E_. */
int64_t vu_faults_place(vu_faults *server, uint64_t guest, uint64_t length, const void *data);
/* Pages of the range that are missing never come: whoever waits for one, or touches it later, gets SIGBUS. How many. */
int64_t vu_faults_lose(vu_faults *server, uint64_t guest, uint64_t length);
/* Up to `max` ranges that somebody waits for and that were not asked for yet. Never blocks. */
int vu_faults_wanted(vu_faults *server, struct vu_fault_range *ranges, uint32_t max);
/* The next run of missing pages in the range that may be placed in the background, of at most `most` bytes, a page and
 * 64 pages: 1 and the run, or 0. */
int vu_faults_missing(vu_faults *server, uint64_t guest, uint64_t length, uint64_t most, struct vu_fault_range *run);
int vu_faults_withhold(vu_faults *server, uint64_t guest, uint64_t length, int on);
/* The number of a page, or VU_E_RANGE. */
int64_t vu_faults_page(const vu_faults *server, uint64_t guest);
void vu_faults_client_stats(const vu_faults *server, uint32_t client, struct vu_client_stats *stats);
void vu_faults_stats(vu_faults *server, struct vu_server_stats *stats);
/* Events after sequence number `after`, the oldest that are still kept: the count. */
int vu_faults_events(vu_faults *server, uint64_t after, struct vu_fault_event *events, uint32_t max);

/* ---- virtio-blk engine (blk.c) ------------------------------------------------------------------------------ */

typedef struct vu_blk vu_blk;

#define VU_BLK_READ_ONLY 1
#define VU_BLK_WRITEBACK 2 /* write cache on: a write is acknowledged before it is on the medium */
#define VU_BLK_DISCARD 4
#define VU_BLK_WRITE_ZEROES 8

struct vu_blk_config {
    int fd;                /* the image; the caller keeps it open while the engine exists */
    uint32_t flags;        /* VU_BLK_ */
    uint64_t sectors;      /* of 512 bytes: the capacity that the guest sees */
    uint32_t block_size;   /* bytes: requests must be aligned to it */
    uint32_t max_segments; /* ranges in one discard or write-zeroes request: more are refused, longer ones are not */
    uint32_t poll_us;      /* how long an idle ring is polled before its thread sleeps */
    char serial[20];       /* padded with zero bytes, as GET_ID returns it */
};

struct vu_blk_stats {
    uint64_t reads, writes, flushes, discards, write_zeroes, others;
    uint64_t bytes_read, bytes_written;
    uint64_t errors;      /* requests that ended in IOERR */
    uint64_t unsupported; /* requests that ended in UNSUPP */
};

vu_blk *vu_blk_new(const struct vu_blk_config *config, int *error);
void vu_blk_free(vu_blk *blk);
void vu_blk_set_writeback(vu_blk *blk, int on);             /* atomic */
void vu_blk_set_sectors(vu_blk *blk, uint64_t sectors);     /* atomic: the image was resized */
void vu_blk_get_stats(const vu_blk *blk, struct vu_blk_stats *stats);
/* Serves the queue until `stop` (an eventfd, left unread) is readable and no chain is out: 0; or a negative code when
 * the ring broke. kick: eventfd, or -1 for a ring that is polled. One thread per queue; several queues may share `blk`.
 * [touches] */
int vu_blk_run(vu_blk *blk, vu_queue *queue, int kick, int stop);

/* ---- where the frames of a network device go to and come from (end.c, end_*.c, hub.c) --------------------------- */

#define VU_FRAME_LEAST 14    /* bytes: an Ethernet header */
#define VU_FRAME_MOST 65557  /* an IP packet behind an Ethernet header with two VLAN tags */

typedef struct vu_end vu_end;
typedef struct vu_hub vu_hub;

/* Takes every frame, copying every byte out of guest memory; and, with a length, sends `frame` for ever. */
vu_end *vu_end_measure(uint32_t pairs, const void *frame, uint32_t length, int *error);
/* fds: of one tap, one for each pair, non-blocking; the caller keeps them open while the end exists. vnet: 1 if frames
 * have a virtio_net_hdr of 10 bytes (IFF_VNET_HDR, TUNSETVNETHDRSZ). */
vu_end *vu_end_tap(const int *fds, uint32_t pairs, int vnet, int *error);
/* Frames over a connection, each behind its length: 4 bytes, big endian. One pair. Without a connection it refuses. */
vu_end *vu_end_stream(int *error);
/* Another connection takes the place of the one before, if any: a stream socket, the end's from here, whatever comes.
 * Never waits. 0 or VU_E_SYS. */
int vu_stream_attach(vu_end *end, int fd);
/* The length of the frame for which the connection was closed, or -1. */
int64_t vu_stream_refused(const vu_end *end);
/* Datagrams of a Unix socket, one frame each, to the socket at the path `peer`. fd: bound; gauge: a second socket, which
 * nothing is sent over; the caller keeps both open while the end exists. One pair. */
vu_end *vu_end_datagram(int fd, int gauge, const char *peer, int *error);
void vu_end_free(vu_end *end);
/* What the guest's driver accepts (VIRTIO_NET_F_GUEST_): as the kind of end needs to know. 0 or VU_E_SYS. */
int vu_end_accept(vu_end *end, uint64_t features);
void vu_end_flush(vu_end *end);                                       /* forgets frames that nobody has received yet */
int vu_end_inject(vu_end *end, const void *frame, uint32_t length); /* one of our own: 1 if it was taken */

/* Records what passes ends, as packet blocks of a pcapng file (capture.c). */
typedef struct vu_capture vu_capture;
#define VU_CAPTURE_SLOW 1

/* snap: bytes of each frame that are kept at most. */
vu_capture *vu_capture_new(uint32_t interfaces, uint32_t snap, int *error);
void vu_capture_free(vu_capture *capture); /* after its ends */
/* An end that is `inner`, which the caller keeps, and records under that interface's number. */
vu_end *vu_capture_end(vu_capture *capture, vu_end *inner, uint32_t interface, int *error);
/* Writes blocks to fd until `stop` (an eventfd, left unread) is readable, and then what is there: 0. Returns earlier twice
 * in its life, to be called again: with VU_CAPTURE_SLOW when there was no room for a block, with VU_E_SYS when the file
 * takes no more. One thread. */
int vu_capture_write(vu_capture *capture, int fd, int stop);
uint64_t vu_capture_lost(const vu_capture *capture, uint32_t interface); /* frames that are not in the file */

/* Who is behind which port (stations.c). From any number of threads at once. Times are in seconds, of one clock. */
typedef struct vu_stations vu_stations;

#define VU_STATIONS 4096 /* what the table holds; each port at most half of it */
/* ageing: seconds after which a silent station is forgotten; 0: at once. */
vu_stations *vu_stations_new(uint32_t ageing, int *error);
void vu_stations_free(vu_stations *stations);
/* The station with this address of 6 bytes, which is not 0 and of no group, was heard behind `port`. */
void vu_stations_learn(vu_stations *stations, const uint8_t *address, uint32_t port, uint32_t now);
int vu_stations_find(const vu_stations *stations, const uint8_t *address, uint32_t now); /* its port; -1: unknown */
void vu_stations_forget(vu_stations *stations, uint32_t port);
uint32_t vu_stations_count(const vu_stations *stations, uint32_t port, uint32_t now);

#define VU_HUB_LEARN 1   /* a bridge that learns who is where; else every frame goes to every other port */
#define VU_HUB_REFLECT 2 /* frames go back to where they came from, and nowhere else */
/* Ports between which frames go, through memory of ours. ageing: seconds, of a bridge. */
vu_hub *vu_hub_new(uint32_t ports, uint32_t pairs, uint32_t flags, uint32_t ageing, int *error);
void vu_hub_free(vu_hub *hub);
vu_end *vu_hub_port(vu_hub *hub, uint32_t port);              /* the hub's: not to be freed */
uint32_t vu_hub_stations(const vu_hub *hub, uint32_t port); /* known to be behind it now; 0 if nothing is learnt */

/* ---- virtio-net engine (net.c, net_*.c) ------------------------------------------------------------------------- */

typedef struct vu_net vu_net;

struct vu_net_config {
    vu_end *end;       /* the caller's, kept while the engine exists */
    uint64_t features; /* negotiated virtio features */
    uint32_t pairs;    /* of rings: ring 2n receives, ring 2n + 1 transmits, as the guest sees it */
    uint32_t poll_us;  /* how long an idle ring is polled before its thread sleeps */
    uint32_t mtu;      /* of packets that the guest receives; 0: it was told none */
};

struct vu_net_stats {
    uint64_t frames, bytes; /* moved; bytes without the virtio header */
    uint64_t useless;       /* receive buffers that no frame fits into */
    /* Frames that were dropped: */
    uint64_t dropped_header;       /* shorter than a virtio header */
    uint64_t dropped_runt;         /* shorter than an Ethernet header */
    uint64_t dropped_oversize;     /* longer than an IP packet can be */
    uint64_t dropped_checksum;     /* not negotiated, or its place is outside of the frame */
    uint64_t dropped_segmentation; /* of a kind that was not negotiated, or without what it needs */
    uint64_t dropped_fault;        /* guest memory was lost */
    uint64_t dropped_refused;      /* the end did not take it */
    uint64_t dropped_full;         /* more came than were received */
    uint64_t dropped_room;         /* the guest has no buffers that it fits into */
};

vu_net *vu_net_new(const struct vu_net_config *config, int *error);
void vu_net_free(vu_net *net);
/* Another MTU than the configured one, from the next frame on; 0: none. From any thread. */
void vu_net_set_mtu(vu_net *net, uint32_t mtu);
void vu_net_get_stats(vu_net *net, uint32_t ring, struct vu_net_stats *stats);
/* Serve one ring of a pair until `stop` (an eventfd, left unread) is readable; buffers that were taken and not used are
 * given back. 0, or a negative code when the ring broke. kick: eventfd, or -1 for a ring that is polled. One thread a
 * ring. [touches] */
int vu_net_receive(vu_net *net, uint32_t pair, vu_queue *queue, int kick, int stop);
int vu_net_transmit(vu_net *net, uint32_t pair, vu_queue *queue, int kick, int stop);
/* The same for a ring that is started and disabled: what is transmitted goes nowhere. [touches] */
int vu_net_discard(vu_queue *queue, int kick, int stop);

/* ---- a load of block requests, for measurements (load.c) --------------------------------------------------- */

struct vu_load {
    vu_driver *driver;
    vu_map *map;
    uint64_t at;          /* guest address of depth * (length + 64) bytes for requests */
    uint64_t blocks;      /* of `length` bytes on the disk: requests go to random ones */
    uint64_t seed;
    uint64_t duration_ns; /* no request is made after it; those in flight are waited for */
    uint32_t depth;       /* requests in flight */
    uint32_t length;      /* bytes, a multiple of 512 */
    int write;            /* 1: write requests, 0: read requests */
    int kick, call;       /* eventfds */
};

struct vu_load_result {
    uint64_t completed, errors; /* errors: of the completed, those whose status was not OK */
    uint64_t kicks, sleeps, elapsed_ns;
};

/* Runs the load: 0, or a negative code: VU_E_CLOSED if the device is silent for five seconds. [touches] */
int vu_load_run(const struct vu_load *load, struct vu_load_result *result);
