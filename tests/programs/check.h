/* What the programs of the differential suite share: printing results so that two runs can be compared.
 *
 * A program prints only what must be the same on Linux and in a unikernel (no addresses, times or
 * process numbers) and ends with the line "ok". Those that need
 * files work in a new directory. */
#ifndef CHECK_H
#define CHECK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static inline const char *error_name(int error) {
    switch (error) {
#define NAME(e) case e: return #e;
    NAME(EPERM) NAME(ENOENT) NAME(ESRCH) NAME(EINTR) NAME(EIO) NAME(ENXIO) NAME(E2BIG) NAME(ENOEXEC)
    NAME(EBADF) NAME(ECHILD) NAME(EAGAIN) NAME(ENOMEM) NAME(EACCES) NAME(EFAULT) NAME(ENOTBLK) NAME(EBUSY)
    NAME(EEXIST) NAME(EXDEV) NAME(ENODEV) NAME(ENOTDIR) NAME(EISDIR) NAME(EINVAL) NAME(ENFILE) NAME(EMFILE)
    NAME(ENOTTY) NAME(ETXTBSY) NAME(EFBIG) NAME(ENOSPC) NAME(ESPIPE) NAME(EROFS) NAME(EMLINK) NAME(EPIPE)
    NAME(EDOM) NAME(ERANGE) NAME(EDEADLK) NAME(ENAMETOOLONG) NAME(ENOLCK) NAME(ENOSYS) NAME(ENOTEMPTY)
    NAME(ELOOP) NAME(ENODATA) NAME(EOVERFLOW) NAME(ENOTSOCK) NAME(EDESTADDRREQ) NAME(EMSGSIZE)
    NAME(EPROTOTYPE) NAME(ENOPROTOOPT) NAME(EPROTONOSUPPORT) NAME(ESOCKTNOSUPPORT) NAME(EOPNOTSUPP)
    NAME(EAFNOSUPPORT) NAME(EADDRINUSE) NAME(EADDRNOTAVAIL) NAME(ENETUNREACH) NAME(ECONNABORTED)
    NAME(ECONNRESET) NAME(ENOBUFS) NAME(EISCONN) NAME(ENOTCONN) NAME(ETIMEDOUT) NAME(ECONNREFUSED)
    NAME(EALREADY) NAME(EINPROGRESS) NAME(ECANCELED) NAME(EOWNERDEAD)
#undef NAME
    default: {
        static char text[32];
        snprintf(text, sizeof text, "errno %d", error);
        return text;
    }
    }
}

/* Prints the result of a call, or the name of its error. */
static inline long show_result(const char *text, long result, int value) {
    int error = errno;
    if (result == -1)
        printf("%s: %s\n", text, error_name(error));
    else if (value)
        printf("%s: %ld\n", text, result);
    else
        printf("%s: done\n", text);
    errno = error;
    return result;
}
/* A call whose value is the same everywhere. */
#define CALL(expression) (errno = 0, show_result(#expression, (long)(expression), 1))
/* A call whose value (a descriptor, an address) is not. */
#define DONE(expression) (errno = 0, show_result(#expression, (long)(expression), 0))
/* A value. */
#define SHOW(expression) printf("%s = %lld\n", #expression, (long long)(expression))
/* A call that must succeed for the rest to make sense. */
static inline long must_result(const char *text, long result) {
    if (result == -1) {
        printf("FAILED %s: %s\n", text, error_name(errno));
        fflush(stdout);
        exit(99);
    }
    return result;
}
#define MUST(expression) must_result(#expression, (long)(expression))
/* A call of pthreads, which returns its error. */
#define PTHREAD(expression)                                                                                            \
    do {                                                                                                               \
        int error_ = (expression);                                                                                     \
        printf("%s: %s\n", #expression, error_ ? error_name(error_) : "0");                                            \
    } while (0)

static inline void section(const char *name) { printf("-- %s\n", name); }

static inline int64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}
#define MILLISECOND INT64_C(1000000)

static inline void pause_for(int64_t nanoseconds) {
    struct timespec time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (nanosleep(&time, &time) == -1 && errno == EINTR) {
    }
}

static char work_directory[64];

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *where) {
    (void)status, (void)kind, (void)where;
    return remove(path);
}

static void leave_work_directory(void) {
    if (chdir("/") == 0)
        nftw(work_directory, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

__attribute__((constructor)) static void set_up_output(void) {
    setvbuf(stdout, NULL, _IOLBF, 4096);
    umask(022);
}

/* Enters a new, empty directory, which is removed with all that is in it at the end. It lies in /tmp, or where
 * CHECK_DIRECTORY says: natively a tmpfs, since file systems differ in details. */
static inline void enter_work_directory(void) {
    const char *parent = getenv("CHECK_DIRECTORY");
    snprintf(work_directory, sizeof work_directory, "%s/kiln-XXXXXX", parent ? parent : "/tmp");
    if (!mkdtemp(work_directory))
        MUST(-1);
    MUST(chdir(work_directory));
    atexit(leave_work_directory);
}

static inline int finish(void) {
    printf("ok\n");
    fflush(stdout);
    return 0;
}
#endif
