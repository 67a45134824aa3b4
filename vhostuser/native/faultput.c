/*
 * Ways of placing a page of guest memory.
 *
 * What belongs here: how bytes get to where every process that shares the memory finds them. What does not: which
 * pages, when, and who is woken.
 *
 * COPY makes the page appear whole or not at all, in the file, so nobody ever sees half of it. CONTINUE writes into the
 * file first: there a client that is registered for MISSING alone could see half a page, hence only clients that have
 * minor faults reported as well, who wait until they are continued. MOVE gives a page of ours away instead of copying
 * it, within one address space; it is of use for memory that nobody else shares.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fault.h"

static bool is_huge(const struct vu_fault_part *part)
{
    return part->region.page_size > (uint64_t)sysconf(_SC_PAGESIZE);
}

/* hugetlbfs has no write(2). */
static int map_alias(struct vu_fault_part *part)
{
    const struct vu_fault_region *region = &part->region;
    void *at = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, (off_t)region->offset);
    if (at == MAP_FAILED)
        return VU_E_SYS;
    part->alias = at;
    return 0;
}

int vu_put_open(struct vu_faults *server)
{
    uint64_t largest = 0;
    for (uint32_t i = 0; i < server->part_count; i++) {
        struct vu_fault_part *part = &server->parts[i];
        if (server->config.put == VU_PUT_CONTINUE && is_huge(part) && map_alias(part) < 0)
            return VU_E_SYS;
        if (is_huge(part) && part->region.page_size > largest)
            largest = part->region.page_size;
    }
    server->zeros = largest ? calloc(1, largest) : NULL;
    return largest && !server->zeros ? VU_E_NOMEM : 0;
}

void vu_put_close(struct vu_faults *server)
{
    for (uint32_t i = 0; i < server->part_count; i++)
        if (server->parts[i].alias)
            munmap(server->parts[i].alias, server->parts[i].region.size);
    free(server->zeros);
}

/* ---- into the file ----------------------------------------------------------------------------------------------- */

static int write_all(int fd, const uint8_t *data, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t written = pwrite(fd, data, length, (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return VU_E_SYS;
        data += written;
        offset += (uint64_t)written;
        length -= (uint64_t)written;
    }
    return 0;
}

/* Allocated first, so that a lack of huge pages is an error and not a SIGBUS; a file that was truncated still is one.
 * */
static int write_alias(const struct vu_fault_part *part, const uint8_t *data, uint64_t length, uint64_t at)
{
    struct vu_guard guard;
    if (fallocate(part->region.fd, 0, (off_t)(part->region.offset + at), (off_t)length) < 0)
        return VU_E_SYS;
    vu_guard_enter(&guard, NULL);
    guard.extra[0] = (struct vu_span){(uintptr_t)part->alias + at, length};
    if (sigsetjmp(guard.env, 0)) {
        errno = EFAULT;
        return VU_E_SYS;
    }
    memcpy(part->alias + at, data, length);
    vu_guard_leave(&guard);
    return 0;
}

static int write_file(const struct vu_fault_part *part, uint64_t at, const uint8_t *data, uint64_t length)
{
    return part->alias ? write_alias(part, data, length, at)
                       : write_all(part->region.fd, data, length, part->region.offset + at);
}

/* ---- through our own userfaultfd --------------------------------------------------------------------------------- */

/* The staging area loses its pages to the destination. */
static int64_t move_pages(int uffd, uint64_t host, const uint8_t *data, uint64_t length)
{
    void *staging = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (staging == MAP_FAILED)
        return VU_E_SYS;
    madvise(staging, length, MADV_NOHUGEPAGE);
    memcpy(staging, data, length);
    int64_t moved = vu_uffd_move(uffd, host, (uintptr_t)staging, length, 0);
    int saved = errno;
    munmap(staging, length);
    errno = saved;
    return moved;
}

/* Nobody is woken by placing, us included: the waits say who has to be. */
static int64_t request(const struct vu_faults *server, uint64_t host, const uint8_t *data, uint64_t length)
{
    int uffd = server->config.uffd;
    if (!data || server->config.put == VU_PUT_ZEROPAGE)
        return vu_uffd_zeropage(uffd, host, length, 0);
    if (server->config.put == VU_PUT_MOVE)
        return move_pages(uffd, host, data, length);
    return vu_uffd_copy(uffd, host, data, length, 0);
}

/* Zeros where UFFDIO_ZEROPAGE is of no use, page by page. */
static const uint8_t *zeros_for(const struct vu_faults *server, const struct vu_fault_part *part)
{
    static const uint8_t page[4096];
    return is_huge(part) ? server->zeros : server->config.put == VU_PUT_CONTINUE ? page : NULL;
}

static int put_run(struct vu_faults *server, const struct vu_fault_part *part, uint64_t first, uint64_t count,
                   const uint8_t *data)
{
    uint64_t at = (first - part->first) << part->shift, end = at + (count << part->shift);
    vu_fault_count(&server->requests, 1);
    if (server->config.put == VU_PUT_CONTINUE)
        return write_file(part, at, data, end - at);
    while (at < end) {
        int64_t done = request(server, part->region.host + at, data, end - at);
        if (done < 0 && errno == EAGAIN)
            continue;
        if (done < 0 && errno != EEXIST)
            return VU_E_SYS;
        if (done < 0) {
            done = (int64_t)part->region.page_size;
            vu_fault_count(&server->present, 1);
            vu_record_add(server, VU_EVENT_PRESENT, 0, part->first + (at >> part->shift), 1, vu_clock_ns());
        }
        at += (uint64_t)done;
        data = data ? data + done : NULL;
    }
    return 0;
}

int vu_put_pages(struct vu_faults *server, const struct vu_fault_part *part, uint64_t first, uint64_t count,
                 const uint8_t *data)
{
    const uint8_t *zeros = data ? NULL : zeros_for(server, part);
    if (!data)
        vu_fault_count(&server->zero, count);
    if (!zeros)
        return put_run(server, part, first, count, data);
    for (uint64_t page = first; page < first + count; page++)
        if (put_run(server, part, page, 1, zeros) < 0)
            return VU_E_SYS;
    return 0;
}

void vu_put_hole(struct vu_faults *server, const struct vu_fault_part *part, uint64_t page)
{
    uint64_t host = part->region.host + ((page - part->first) << part->shift), size = part->region.page_size;
    if (is_huge(part))
        vu_uffd_copy(server->config.uffd, host, server->zeros, size, 0);
    else
        vu_uffd_zeropage(server->config.uffd, host, size, 0);
}
