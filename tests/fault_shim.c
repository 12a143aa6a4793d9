/* Makes calls on chosen files fail, for tests/test_database_faults.py, which compiles it and loads it by LD_PRELOAD.

   fault(suffix, operation, error, after): from now on each `operation` on a file whose name ends with `suffix` fails
   with `error`, but for the first `after` of them. An empty suffix ends it. Returns how many have failed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { WRITE, SYNC, TRUNCATE };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char wanted[64];
static int operation, error;
static long after, failed;

long fault(const char *suffix, int which, int with, long but_for) {
    pthread_mutex_lock(&lock);
    snprintf(wanted, sizeof wanted, "%s", suffix);
    operation = which, error = with, after = but_for;
    long before = failed;
    failed = 0;
    pthread_mutex_unlock(&lock);
    return before;
}

static int fails(int file, int which) {
    char link[32], name[4096];
    int fail = 0;
    if (!wanted[0] || which != operation) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name);
    pthread_mutex_lock(&lock);
    ssize_t least = (ssize_t)strlen(wanted);
    if (least && length >= least && !memcmp(name + length - least, wanted, least) && after-- <= 0) fail = 1, failed++;
    pthread_mutex_unlock(&lock);
    if (fail) errno = error;
    return fail;
}

#define CALL(type, name, which, parameters, arguments)                       \
    type name parameters {                                                   \
        type(*real) parameters = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return fails(file, which) ? -1 : real arguments;                     \
    }

CALL(ssize_t, write, WRITE, (int file, const void *data, size_t size), (file, data, size))
CALL(ssize_t, pwrite, WRITE, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
CALL(ssize_t, pwrite64, WRITE, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
CALL(int, fsync, SYNC, (int file), (file))
CALL(int, fdatasync, SYNC, (int file), (file))
CALL(int, ftruncate, TRUNCATE, (int file, off_t size), (file, size))
CALL(int, ftruncate64, TRUNCATE, (int file, off64_t size), (file, size))
