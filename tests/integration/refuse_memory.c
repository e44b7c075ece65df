/* A library to preload. It refuses torch's CPU allocator every block of REFUSED_BYTES or more, as a full memory would. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

int posix_memalign(void **block, size_t alignment, size_t size) {
    static int (*allocate)(void **, size_t, size_t);
    static size_t refused;
    if (allocate == NULL) {
        refused = strtoull(getenv("REFUSED_BYTES"), NULL, 10);
        allocate = (__typeof__(allocate))dlsym(RTLD_NEXT, "posix_memalign");
    }
    return size >= refused ? ENOMEM : allocate(block, alignment, size);
}
