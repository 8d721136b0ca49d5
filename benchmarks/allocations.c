/* Every allocation of a process: live and peak bytes of the malloc family, native libraries' own included.
 *
 *     cc -O2 -shared -fPIC -o allocations.so allocations.c -ldl     and     LD_PRELOAD=allocations.so
 *
 * Sizes are the allocator's own (malloc_usable_size), so no table of blocks is needed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static _Atomic long live, peak;

static void count(long bytes) {
    long now = atomic_fetch_add(&live, bytes) + bytes, top = atomic_load(&peak);
    while (now > top && !atomic_compare_exchange_weak(&peak, &top, now)) {}
}
static void *born(void *block) {
    if (block) count((long)malloc_usable_size(block));
    return block;
}
void *malloc(size_t size) { return born(__libc_malloc(size)); }
void *calloc(size_t number, size_t size) { return born(__libc_calloc(number, size)); }
void *memalign(size_t alignment, size_t size) { return born(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
    void *block = memalign(alignment, size);
    if (!block) return ENOMEM;
    *to = block;
    return 0;
}
void free(void *block) {
    if (block) count(-(long)malloc_usable_size(block));
    __libc_free(block);
}
/* The old and the new block may exist at once while it moves; the old one's bytes go when it has. */
void *realloc(void *block, size_t size) {
    long before = block ? (long)malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved || !size) count((moved ? (long)malloc_usable_size(moved) : 0) - before);
    return moved;
}

long allocations_live(void) { return live; }
long allocations_peak(void) { return peak; }
void allocations_restart(void) { peak = (long)live; }
