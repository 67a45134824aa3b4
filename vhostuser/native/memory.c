/*
 * Guest memory: regions, the immutable map of them, translation of addresses, copies.
 *
 * What belongs here: every mmap of a front-end's file, and the only code that turns a guest or user address into one of
 * ours. What does not: rings (queue.c, split.c), the dirty log (log.c), page faults in postcopy (uffd.c, touch.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "core.h"

struct vu_region {
    _Atomic uint32_t references;
    _Atomic bool revoked;
    struct vu_region_info info;
};

/* Where a range of addresses, guest or user, begins in our address space. */
struct range {
    uint64_t start, length;
    uint8_t *host;
    vu_region *region;
};

struct vu_map {
    _Atomic uint32_t references;
    uint32_t count;
    struct range *by_guest; /* both sorted by start; one allocation with the map */
    struct range *by_user;
    struct range ranges[];
};

/* ---- files --------------------------------------------------------------------------------------------- */

struct file {
    uint64_t size, page_size, device, inode;
    bool hugetlb, sealed;
};

static int examine(int fd, struct file *file)
{
    struct stat status;
    struct statfs system;
    if (fstat(fd, &status) < 0 || fstatfs(fd, &system) < 0)
        return VU_E_SYS;
    if (!S_ISREG(status.st_mode))
        return VU_E_FILE;
    int seals = fcntl(fd, F_GET_SEALS); /* EINVAL on a file system without seals */
    *file = (struct file){
        .size = (uint64_t)status.st_size,
        .device = status.st_dev,
        .inode = status.st_ino,
        .hugetlb = system.f_type == HUGETLBFS_MAGIC,
        .sealed = seals >= 0 && (seals & F_SEAL_SHRINK),
    };
    file->page_size = (uint64_t)(file->hugetlb ? system.f_bsize : sysconf(_SC_PAGESIZE));
    return 0;
}

/* What must be mapped so that [offset, offset + size) of the file is: whole pages of the file. */
struct window {
    uint64_t offset, length;
    uint64_t before; /* bytes of the window in front of `offset` */
};

static int frame(const struct file *file, uint64_t offset, uint64_t size, struct window *window)
{
    if (!size)
        return VU_E_SIZE;
    if (vu_wraps(offset, size))
        return VU_E_OVERFLOW;
    if (offset + size > file->size)
        return VU_E_SHORT;
    /* The file's size is a positive off_t, so rounding up the sum cannot wrap any more. */
    uint64_t mask = file->page_size - 1;
    window->before = offset & mask;
    window->offset = offset - window->before;
    window->length = (window->before + size + mask) & ~mask;
    return 0;
}

int vu_mapping_open(struct vu_mapping *mapping, int fd, uint64_t offset, uint64_t size)
{
    struct file file;
    struct window window;
    int code = examine(fd, &file);
    if (!code)
        code = frame(&file, offset, size, &window);
    if (code)
        return code;
    uint8_t *at = mmap(NULL, window.length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)window.offset);
    if (at == MAP_FAILED)
        return VU_E_SYS;
    mapping->span = (struct vu_span){(uintptr_t)at, window.length};
    mapping->at = at + window.before;
    return 0;
}

void vu_mapping_close(struct vu_mapping *mapping)
{
    munmap((void *)mapping->span.base, mapping->span.length);
}

/* ---- regions ------------------------------------------------------------------------------------------- */

/* NULL when the front-end's own address cannot be ours: it is taken, or its place within a page is another. */
static uint8_t *map_at_user(int fd, const struct window *window, const struct vu_region_info *info, int protection)
{
    uint64_t wanted = info->user - window->before;
    if (wanted > info->user || wanted % info->page_size || vu_wraps(wanted, window->length) || !wanted)
        return NULL;
    void *at = mmap((void *)wanted, window->length, protection, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, fd,
                    (off_t)window->offset);
    if (at == MAP_FAILED)
        return NULL;
    if ((uint64_t)at == wanted)
        return at;
    munmap(at, window->length); /* a kernel before 4.17 takes the address for a hint */
    return NULL;
}

static int map_region(vu_region *region, int fd, const struct window *window, int flags)
{
    int protection = flags & VU_REGION_READ_ONLY ? PROT_READ : PROT_READ | PROT_WRITE;
    if (flags & VU_REGION_HIDDEN)
        protection = PROT_NONE;
    uint8_t *at = NULL;
    if (flags & VU_REGION_AT_USER)
        at = map_at_user(fd, window, &region->info, protection);
    if (!at)
        at = mmap(NULL, window->length, protection, MAP_SHARED | MAP_NORESERVE, fd, (off_t)window->offset);
    if (at == MAP_FAILED)
        return VU_E_SYS;
    madvise(at, window->length, MADV_DONTDUMP); /* a guest's memory has no place in our core dump */
    region->info.base = (uint64_t)at;
    region->info.length = window->length;
    region->info.host = (uint64_t)at + window->before;
    if (flags & VU_REGION_OWN)
        region->info.user = region->info.host;
    return 0;
}

static int open_region(vu_region *region, int fd, int flags)
{
    struct vu_region_info *info = &region->info;
    struct file file;
    struct window window;
    if (vu_wraps(info->guest, info->size) || vu_wraps(info->user, info->size))
        return VU_E_OVERFLOW;
    int code = examine(fd, &file);
    if (!code)
        code = frame(&file, info->offset, info->size, &window);
    if (code)
        return code;
    info->page_size = file.page_size;
    info->device = file.device;
    info->inode = file.inode;
    info->hugetlb = file.hugetlb;
    info->sealed = file.sealed;
    return map_region(region, fd, &window, flags);
}

vu_region *vu_region_map(int fd, uint64_t guest, uint64_t size, uint64_t user, uint64_t offset, int flags, int *error)
{
    vu_region *region = calloc(1, sizeof *region);
    if (!region) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    atomic_init(&region->references, 1);
    region->info = (struct vu_region_info){.guest = guest, .size = size, .user = user, .offset = offset};
    *error = open_region(region, fd, flags);
    if (!*error)
        return region;
    int number = errno;
    free(region);
    errno = number;
    return NULL;
}

static int open_private(vu_region *region)
{
    struct vu_region_info *info = &region->info;
    info->page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    if (!info->size)
        return VU_E_SIZE;
    if ((info->guest | info->size) & (info->page_size - 1))
        return VU_E_ALIGN;
    if (vu_wraps(info->guest, info->size))
        return VU_E_OVERFLOW;
    void *at = mmap(NULL, info->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return VU_E_SYS;
    info->user = info->host = info->base = (uint64_t)at;
    info->length = info->size;
    info->sealed = 1;
    return 0;
}

vu_region *vu_region_private(uint64_t guest, uint64_t size, int *error)
{
    vu_region *region = calloc(1, sizeof *region);
    if (!region) {
        *error = VU_E_NOMEM;
        return NULL;
    }
    atomic_init(&region->references, 1);
    region->info = (struct vu_region_info){.guest = guest, .size = size};
    *error = open_private(region);
    if (!*error)
        return region;
    free(region);
    return NULL;
}

void vu_region_get(vu_region *region)
{
    atomic_fetch_add(&region->references, 1);
}

void vu_region_put(vu_region *region)
{
    if (!region || atomic_fetch_sub(&region->references, 1) != 1)
        return;
    munmap((void *)region->info.base, region->info.length);
    free(region);
}

void vu_region_describe(const vu_region *region, struct vu_region_info *info)
{
    *info = region->info;
}

static int protect(vu_region *region, int protection)
{
    return mprotect((void *)region->info.base, region->info.length, protection) < 0 ? VU_E_SYS : 0;
}

int vu_region_reveal(vu_region *region)
{
    if (atomic_load(&region->revoked))
        return VU_E_FAULT;
    int code = protect(region, PROT_READ | PROT_WRITE);
    /* Revoked by another thread between the two: its PROT_NONE may have come before our PROT_READ. */
    if (!atomic_load(&region->revoked))
        return code;
    protect(region, PROT_NONE);
    return VU_E_FAULT;
}

int vu_region_revoke(vu_region *region)
{
    atomic_store(&region->revoked, true);
    return protect(region, PROT_NONE);
}

int vu_region_no_huge(vu_region *region)
{
    void *base = (void *)region->info.base;
    size_t length = region->info.length;
    /* EINVAL: hugetlbfs before Linux 5.18, where a mapping that nobody has touched has nothing to drop anyway. */
    if (madvise(base, length, MADV_DONTNEED) < 0 && !(errno == EINVAL && region->info.hugetlb))
        return VU_E_SYS;
    /* EINVAL: a kernel without transparent huge pages. */
    if (!region->info.hugetlb && madvise(base, length, MADV_NOHUGEPAGE) < 0 && errno != EINVAL)
        return VU_E_SYS;
    return 0;
}

/* ---- the map ------------------------------------------------------------------------------------------- */

static int compare_ranges(const void *left, const void *right)
{
    uint64_t a = ((const struct range *)left)->start, b = ((const struct range *)right)->start;
    return (a > b) - (a < b);
}

/* Sorts the ranges: 0, or VU_E_OVERLAP. No range wraps, open_region saw to that. */
static int sort_ranges(struct range *ranges, uint32_t count)
{
    qsort(ranges, count, sizeof *ranges, compare_ranges);
    for (uint32_t i = 1; i < count; i++)
        if (ranges[i].start - ranges[i - 1].start < ranges[i - 1].length)
            return VU_E_OVERLAP;
    return 0;
}

vu_map *vu_map_new(vu_region *const *regions, uint32_t count, int *error)
{
    vu_map *map = calloc(1, sizeof *map + 2 * (size_t)count * sizeof *map->ranges);
    *error = map ? vu_guard_install() : VU_E_NOMEM;
    if (*error) {
        free(map);
        return NULL;
    }
    atomic_init(&map->references, 1);
    map->by_guest = map->ranges;
    map->by_user = map->ranges + count;
    for (uint32_t i = 0; i < count; i++) {
        const struct vu_region_info *info = &regions[i]->info;
        map->by_guest[i] = (struct range){info->guest, info->size, (uint8_t *)info->host, regions[i]};
        map->by_user[i] = (struct range){info->user, info->size, (uint8_t *)info->host, regions[i]};
    }
    *error = sort_ranges(map->by_guest, count);
    if (!*error)
        *error = sort_ranges(map->by_user, count);
    if (*error) {
        free(map);
        return NULL;
    }
    for (; map->count < count; map->count++)
        vu_region_get(regions[map->count]);
    return map;
}

void vu_map_get(vu_map *map)
{
    atomic_fetch_add(&map->references, 1);
}

void vu_map_put(vu_map *map)
{
    if (!map || atomic_fetch_sub(&map->references, 1) != 1)
        return;
    for (uint32_t i = 0; i < map->count; i++)
        vu_region_put(map->by_guest[i].region);
    free(map);
}

int vu_map_revoke(vu_map *map)
{
    int code = 0;
    for (uint32_t i = 0; i < map->count; i++) {
        int one = vu_region_revoke(map->by_guest[i].region);
        code = one ? one : code;
    }
    return code;
}

/* ---- translation --------------------------------------------------------------------------------------- */

/* The last range that starts at or before the address, if it reaches so far. */
static inline const struct range *find(const struct range *ranges, uint32_t count, uint64_t address)
{
    const struct range *first = ranges;
    while (count > 1) {
        uint32_t half = count / 2;
        first = first[half].start <= address ? first + half : first;
        count -= half;
    }
    return count && address - first->start < first->length ? first : NULL;
}

static inline uint8_t *run_of(const struct range *range, uint64_t address, uint64_t length, uint64_t *run)
{
    if (!range)
        return NULL;
    uint64_t inside = address - range->start;
    uint64_t left = range->length - inside;
    *run = length < left ? length : left;
    return range->host + inside;
}

uint8_t *vu_map_run(const vu_map *map, uint64_t guest, uint64_t length, uint64_t *run)
{
    return run_of(find(map->by_guest, map->count, guest), guest, length, run);
}

bool vu_map_window(const vu_map *map, uint64_t guest, struct vu_window *window)
{
    const struct range *range = find(map->by_guest, map->count, guest);
    if (range)
        *window = (struct vu_window){range->start, range->length, range->host};
    return range;
}

bool vu_map_user_window(const vu_map *map, uint64_t user, struct vu_user_window *window)
{
    const struct range *range = find(map->by_user, map->count, user);
    if (range)
        *window = (struct vu_user_window){range->start, range->length, range->region->info.guest, range->host};
    return range;
}

uint8_t *vu_map_guest(const vu_map *map, uint64_t guest, uint64_t length)
{
    uint64_t run = 0;
    uint8_t *host = vu_map_run(map, guest, length, &run);
    return run == length ? host : NULL;
}

uint8_t *vu_map_user(const vu_map *map, uint64_t user, uint64_t length)
{
    uint64_t run = 0;
    uint8_t *host = run_of(find(map->by_user, map->count, user), user, length, &run);
    return run == length ? host : NULL;
}

int vu_map_host_to_guest(const vu_map *map, const void *host, uint64_t *guest)
{
    const struct range *range = map->by_guest, *end = range + map->count;
    while (range < end && (uintptr_t)host - (uintptr_t)range->host >= range->length)
        range++;
    *guest = range < end ? range->start + ((uintptr_t)host - (uintptr_t)range->host) : 0;
    return range < end ? 0 : VU_E_RANGE;
}

uint64_t vu_map_page_size(const vu_map *map, const void *host)
{
    for (uint32_t i = 0; i < map->count; i++) {
        const struct vu_region_info *info = &map->by_guest[i].region->info;
        if ((uint64_t)host - info->base < info->length)
            return info->page_size;
    }
    return 0;
}

uint64_t vu_map_guest_to_host(const vu_map *map, uint64_t guest)
{
    return (uint64_t)vu_map_guest(map, guest, 1);
}

uint64_t vu_map_user_to_host(const vu_map *map, uint64_t user)
{
    return (uint64_t)vu_map_user(map, user, 1);
}

uint64_t vu_map_user_to_guest(const vu_map *map, uint64_t user, int *error)
{
    const struct range *range = find(map->by_user, map->count, user);
    *error = range ? 0 : VU_E_RANGE;
    return range ? range->region->info.guest + (user - range->start) : 0;
}

/* ---- copies -------------------------------------------------------------------------------------------- */

static int check_range(const vu_map *map, uint64_t guest, uint64_t length)
{
    if (vu_wraps(guest, length) || length > INT64_MAX)
        return VU_E_OVERFLOW;
    uint64_t run;
    for (; length; guest += run, length -= run)
        if (!vu_map_run(map, guest, length, &run))
            return VU_E_RANGE;
    return 0;
}

static void copy_range(const vu_map *map, uint64_t guest, uint8_t *bytes, uint64_t length, bool to_guest)
{
    uint64_t run;
    for (; length; guest += run, bytes += run, length -= run) {
        uint8_t *host = vu_map_run(map, guest, length, &run);
        memcpy(to_guest ? host : bytes, to_guest ? bytes : host, run);
    }
}

static int64_t copy_guarded(const vu_map *map, uint64_t guest, void *bytes, uint64_t length, bool to_guest)
{
    int code = check_range(map, guest, length);
    if (code)
        return code;
    struct vu_guard guard;
    if (VU_GUARD(&guard, map))
        return VU_E_FAULT;
    copy_range(map, guest, bytes, length, to_guest);
    vu_guard_leave(&guard);
    return (int64_t)length;
}

int64_t vu_map_read(const vu_map *map, uint64_t guest, void *to, uint64_t length)
{
    return copy_guarded(map, guest, to, length, false);
}

int64_t vu_map_write(const vu_map *map, uint64_t guest, const void *from, uint64_t length)
{
    return copy_guarded(map, guest, (void *)from, length, true);
}

int vu_map_publish16(const vu_map *map, uint64_t guest, uint16_t value)
{
    uint8_t *host = vu_map_guest(map, guest, sizeof value);
    if (!host)
        return VU_E_RANGE;
    if ((uintptr_t)host % sizeof value)
        return VU_E_ALIGN;
    struct vu_guard guard;
    if (VU_GUARD(&guard, map))
        return VU_E_FAULT;
    __atomic_store_n((uint16_t *)host, value, __ATOMIC_RELEASE);
    vu_guard_leave(&guard);
    return 0;
}
