/* Counts the bytes that torch's CPU allocator has in use, over all threads.
 *
 * Torch's profiler sees no release by a thread of gloo. This library, loaded with LD_PRELOAD, sees
 * all: libc10.so takes memory with posix_memalign and gives it back with free.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS (1 << 20) /* of a hash table with open addressing */

static struct { void *block; size_t bytes; } table[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long long held, peak;
static void (*real_free)(void *);
static int (*real_posix_memalign)(void **, size_t, size_t);

long long lit_ft_peak_and_restart(void) {
    pthread_mutex_lock(&lock);
    long long found = peak;
    peak = held;
    pthread_mutex_unlock(&lock);
    return found;
}

static size_t slot_of(void *block) {
    return (((uintptr_t)block >> 6) * 0x9E3779B97F4A7C15ull >> 32) % SLOTS;
}

static int is_torch(void *caller) {
    Dl_info info;
    return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "libc10.so");
}

int posix_memalign(void **block, size_t alignment, size_t bytes) {
    if (!real_posix_memalign) real_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    int failed = real_posix_memalign(block, alignment, bytes);
    if (failed || !is_torch(__builtin_return_address(0))) return failed;
    pthread_mutex_lock(&lock);
    size_t slot = slot_of(*block);
    while (table[slot].block && table[slot].block != (void *)-1) slot = (slot + 1) % SLOTS;
    table[slot].block = *block;
    table[slot].bytes = bytes;
    held += bytes;
    if (held > peak) peak = held;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *block) {
    if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
    if (block && ((uintptr_t)block & 63) == 0) {
        pthread_mutex_lock(&lock);
        for (size_t slot = slot_of(block); table[slot].block; slot = (slot + 1) % SLOTS)
            if (table[slot].block == block) {
                held -= table[slot].bytes;
                table[slot].block = (void *)-1; /* a later one may follow */
                break;
            }
        pthread_mutex_unlock(&lock);
    }
    real_free(block);
}
