/*
 * The least that placing pages can cost: plain pwrite of the same bytes into the page cache of a file, with nobody to wake.
 *
 *     placement_floor BYTES CHUNK ROUNDS
 *
 * The bytes come from a mapped file, as those of the fault server do. CHUNK bytes a write. Prints, for each round, the
 * nanoseconds that filling a new file takes.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void must(int good, const char *what)
{
    if (good)
        return;
    perror(what);
    exit(1);
}

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t fill(const char *from, size_t size, size_t chunk)
{
    int file = memfd_create("floor", 0);
    must(file >= 0 && ftruncate(file, (off_t)size) == 0, "memfd_create");
    uint64_t start = clock_ns();
    for (size_t at = 0; at < size; at += chunk)
        must(pwrite(file, from + at, chunk, (off_t)at) == (ssize_t)chunk, "pwrite");
    uint64_t time = clock_ns() - start;
    close(file);
    return time;
}

int main(int count, char **words)
{
    must(count == 4, "placement_floor BYTES CHUNK ROUNDS");
    size_t size = strtoull(words[1], NULL, 0), chunk = strtoull(words[2], NULL, 0);
    int image = memfd_create("image", 0);
    must(image >= 0 && ftruncate(image, (off_t)size) == 0, "memfd_create");
    char *from = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, image, 0);
    must(from != MAP_FAILED, "mmap");
    memset(from, 1, size);
    for (int round = 0; round < atoi(words[3]); round++)
        printf("%lu\n", (unsigned long)fill(from, size, chunk));
    return 0;
}
