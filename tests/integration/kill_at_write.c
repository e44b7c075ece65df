/* A library to preload. Once `watch_folder` is called, it counts each operation with which this process changes a file
 * or folder below the watched one, and kills the process with SIGKILL at the chosen one: before the operation, and in
 * the middle of a write. It sees what libc's callers do: Python, safetensors and everything else in the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char watched[PATH_MAX];
static long kill_at;
static int log_fd = -1;
static atomic_long seen;

/* folder: absolute, without links. at: the operation at which to kill, counted from 1; 0: none.
 * log: a file descriptor for a line per operation; -1: none. */
void watch_folder(const char *folder, long at, int log) {
    strncpy(watched, folder, sizeof watched - 1);
    kill_at = at;
    log_fd = log;
}

static int is_watched(const char *path) {
    size_t length = strlen(watched);
    if (length == 0 || strncmp(path, watched, length) != 0 || (path[length] != '/' && path[length] != '\0')) return 0;
    /* W&B's threads write when they like. */
    return strncmp(path + length, "/wandb", 6) != 0;
}

static void path_of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
}

static void absolute(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL) base[0] = '\0';
    } else {
        path_of_descriptor(folder, base);
    }
    snprintf(path, PATH_MAX, "%s/%s", base, name);
}

/* Count an operation. Returns whether the process is to be killed at it. */
static int count(const char *operation, const char *path) {
    if (watched[0] == '\0' || !is_watched(path)) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (log_fd >= 0) dprintf(log_fd, "%ld %s %s\n", number, operation, path + strlen(watched));
    return number == kill_at;
}

static void die(void) { kill(getpid(), SIGKILL); }

static void at_path(const char *operation, int folder, const char *name) {
    char path[PATH_MAX];
    if (watched[0] == '\0') return;
    absolute(folder, name, path);
    if (count(operation, path)) die();
}

static int at_descriptor(const char *operation, int fd) {
    char path[PATH_MAX];
    if (watched[0] == '\0' || fd == log_fd) return 0;
    path_of_descriptor(fd, path);
    return count(operation, path);
}

ssize_t write(int fd, const void *data, size_t size) {
    if (at_descriptor("write", fd)) {
        REAL(write)(fd, data, size / 2);
        die();
    }
    return REAL(write)(fd, data, size);
}

#define PWRITE(name, offset_type)                                               \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) {   \
        if (at_descriptor("write", fd)) {                                       \
            REAL(name)(fd, data, size / 2, offset);                             \
            die();                                                              \
        }                                                                       \
        return REAL(name)(fd, data, size, offset);                              \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int number) {
    if (at_descriptor("write", fd)) {
        REAL(writev)(fd, parts, number / 2);
        die();
    }
    return REAL(writev)(fd, parts, number);
}

#define AT_DESCRIPTOR(result, name, operation, parameters, arguments, fd) \
    result name parameters {                                              \
        if (at_descriptor(operation, fd)) die();                          \
        return REAL(name) arguments;                                      \
    }
AT_DESCRIPTOR(int, fsync, "sync", (int fd), (fd), fd)
AT_DESCRIPTOR(int, fdatasync, "sync", (int fd), (fd), fd)
AT_DESCRIPTOR(int, ftruncate, "truncate", (int fd, off_t size), (fd, size), fd)
AT_DESCRIPTOR(int, ftruncate64, "truncate", (int fd, off64_t size), (fd, size), fd)
AT_DESCRIPTOR(ssize_t, sendfile, "write", (int to, int from, off_t *at, size_t size), (to, from, at, size), to)
AT_DESCRIPTOR(ssize_t, sendfile64, "write", (int to, int from, off64_t *at, size_t size), (to, from, at, size), to)
AT_DESCRIPTOR(ssize_t, copy_file_range, "write",
              (int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags),
              (from, at, to, to_at, size, flags), to)

#define AT_PATH(name, operation, parameters, arguments, folder, path) \
    int name parameters {                                             \
        at_path(operation, folder, path);                             \
        return REAL(name) arguments;                                  \
    }
AT_PATH(unlink, "remove", (const char *path), (path), AT_FDCWD, path)
AT_PATH(unlinkat, "remove", (int folder, const char *path, int flags), (folder, path, flags), folder, path)
AT_PATH(rmdir, "remove", (const char *path), (path), AT_FDCWD, path)
AT_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
AT_PATH(mkdirat, "mkdir", (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
AT_PATH(truncate, "truncate", (const char *path, off_t size), (path, size), AT_FDCWD, path)
AT_PATH(rename, "rename", (const char *from, const char *to), (from, to), AT_FDCWD, to)
AT_PATH(renameat, "rename", (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
AT_PATH(renameat2, "rename", (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags),
        b, to)
AT_PATH(link, "link", (const char *from, const char *to), (from, to), AT_FDCWD, to)
AT_PATH(symlink, "link", (const char *from, const char *to), (from, to), AT_FDCWD, to)
AT_PATH(chmod, "chmod", (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
AT_PATH(fchmodat, "chmod", (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags), folder,
        path)

static void at_open(int folder, const char *path, int flags) {
    if (flags & (O_CREAT | O_TRUNC)) at_path("open", folder, path);
}

#define MODE                                      \
    mode_t mode = 0;                              \
    if (flags & (O_CREAT | O_TMPFILE)) {          \
        va_list rest;                             \
        va_start(rest, flags);                    \
        mode = va_arg(rest, mode_t);              \
        va_end(rest);                             \
    }

#define OPEN(name)                                \
    int name(const char *path, int flags, ...) {  \
        MODE                                      \
        at_open(AT_FDCWD, path, flags);           \
        return REAL(name)(path, flags, mode);     \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                         \
    int name(int folder, const char *path, int flags, ...) { \
        MODE                                                 \
        at_open(folder, path, flags);                        \
        return REAL(name)(folder, path, flags, mode);        \
    }
OPENAT(openat)
OPENAT(openat64)
