/*
 * The split ring in the byte order that is not ours: of a legacy driver whose front-end says so (SET_VRING_ENDIAN).
 *
 * What belongs here: nothing but the order. It is the same code (split.c), compiled a second time, so that a ring in our
 * own order pays nothing for it.
 */
#define VU_SPLIT vu_split_swapped
#define ORDER16(value) __builtin_bswap16(value)
#define ORDER32(value) __builtin_bswap32(value)
#define ORDER64(value) __builtin_bswap64(value)

#include "split.c"
