/* Attributes of files: stat fields, modes, owners, times, file systems, descriptor flags, locks. */
#include "check.h"
#include <sys/file.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

int main(void) {
    struct stat status, again;
    enter_work_directory();
    int fd = MUST(open("file", O_CREAT | O_RDWR, 0666));
    MUST(write(fd, "12345", 5));

    section("stat");
    CALL(fstat(fd, &status));
    printf("%o\n", status.st_mode);
    SHOW(status.st_nlink);
    SHOW(status.st_uid);
    SHOW(status.st_gid);
    SHOW(status.st_size);
    SHOW(status.st_blksize > 0);
    SHOW(status.st_ino != 0);
    CALL(stat("file", &again));
    SHOW(status.st_ino == again.st_ino && status.st_dev == again.st_dev);
    struct statx extended;
    CALL(statx(AT_FDCWD, "file", 0, STATX_BASIC_STATS, &extended));
    SHOW((extended.stx_mask & STATX_BASIC_STATS) == STATX_BASIC_STATS);
    SHOW(extended.stx_size);
    SHOW(extended.stx_ino == status.st_ino);
    SHOW(makedev(extended.stx_dev_major, extended.stx_dev_minor) == status.st_dev);
    CALL(statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &extended));
    CALL(statx(AT_FDCWD, "none", 0, STATX_SIZE, &extended));

    section("mode and owner");
    CALL(chmod("file", 04751));
    CALL(stat("file", &status));
    printf("%o\n", status.st_mode);
    CALL(fchmod(fd, 0600));
    CALL(fchmodat(AT_FDCWD, "none", 0600, 0));
    CALL(chown("file", 12, 34));
    CALL(stat("file", &status));
    SHOW(status.st_uid);
    SHOW(status.st_gid);
    CALL(fchown(fd, -1, 56));
    CALL(stat("file", &status));
    SHOW(status.st_uid);
    SHOW(status.st_gid);
    CALL(lchown("none", 1, 1));
    CALL(access("file", R_OK | W_OK));
    CALL(access("file", X_OK));
    CALL(access("none", F_OK));
    CALL(access("file", 99));
    CALL(umask(027));
    close(MUST(open("masked", O_CREAT | O_WRONLY, 0666)));
    CALL(stat("masked", &status));
    printf("%o\n", status.st_mode);
    CALL(umask(022));

    section("times");
    struct timespec times[2] = {{1000000000, 123456789}, {1100000000, 987654321}};
    CALL(utimensat(AT_FDCWD, "file", times, 0));
    CALL(stat("file", &status));
    SHOW(status.st_atim.tv_sec);
    SHOW(status.st_atim.tv_nsec);
    SHOW(status.st_mtim.tv_sec);
    SHOW(status.st_mtim.tv_nsec);
    times[0].tv_nsec = UTIME_OMIT;
    times[1].tv_nsec = UTIME_NOW;
    CALL(futimens(fd, times));
    CALL(fstat(fd, &again));
    SHOW(again.st_atim.tv_sec);
    SHOW(again.st_mtim.tv_sec > 1700000000);
    times[0].tv_nsec = 1000000000;
    CALL(futimens(fd, times));
    CALL(utimensat(AT_FDCWD, "none", NULL, 0));
    MUST(utimensat(AT_FDCWD, "file", (struct timespec[2]){{1, 0}, {1, 0}}, 0));
    CALL(pwrite(fd, "x", 1, 0));
    CALL(fstat(fd, &status));
    SHOW(status.st_mtim.tv_sec > 1700000000);
    SHOW(status.st_ctim.tv_sec > 1700000000);

    section("file system");
    struct statfs system;
    CALL(statfs(".", &system));
    SHOW(system.f_bsize > 0);
    SHOW(system.f_namelen);
    CALL(fstatfs(fd, &system));
    CALL(statfs("none", &system));
    struct statvfs portable;
    CALL(statvfs("/proc", &portable));
    CALL(statfs("/proc", &system));
    SHOW(system.f_type == 0x9fa0);

    section("flags");
    CALL(fcntl(fd, F_GETFD));
    CALL(fcntl(fd, F_SETFD, FD_CLOEXEC));
    CALL(fcntl(fd, F_GETFD));
    CALL(fcntl(fd, F_GETFL) == (O_RDWR | 0100000));
    CALL(fcntl(fd, F_SETFL, O_APPEND | O_NONBLOCK));
    CALL((fcntl(fd, F_GETFL) & (O_APPEND | O_NONBLOCK)) == (O_APPEND | O_NONBLOCK));
    CALL(pwrite(fd, "y", 1, 0));
    CALL(lseek(fd, 0, SEEK_END));
    CALL(fcntl(fd, 9999));
    CALL(fcntl(99, F_GETFL));

    section("record locks");
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10};
    CALL(fcntl(fd, F_SETLK, &lock));
    lock.l_type = F_WRLCK;
    CALL(fcntl(fd, F_GETLK, &lock));
    SHOW(lock.l_type == F_UNLCK);
    lock.l_type = F_UNLCK;
    CALL(fcntl(fd, F_SETLK, &lock));
    lock.l_type = 42;
    CALL(fcntl(fd, F_SETLK, &lock));
    int reader = MUST(open("file", O_RDONLY));
    lock.l_type = F_WRLCK;
    CALL(fcntl(reader, F_SETLK, &lock));
    lock.l_type = F_RDLCK;
    CALL(fcntl(reader, F_SETLK, &lock));

    section("flock");
    int other = MUST(open("file", O_RDWR));
    CALL(flock(fd, LOCK_EX));
    CALL(flock(other, LOCK_EX | LOCK_NB));
    CALL(flock(other, LOCK_SH | LOCK_NB));
    CALL(flock(fd, LOCK_SH));
    CALL(flock(other, LOCK_SH | LOCK_NB));
    CALL(flock(other, LOCK_EX | LOCK_NB));
    CALL(flock(fd, LOCK_UN));
    CALL(flock(other, LOCK_EX | LOCK_NB));
    int duplicate = MUST(dup(other));
    close(other);
    CALL(flock(fd, LOCK_SH | LOCK_NB));
    close(duplicate);
    CALL(flock(fd, LOCK_SH | LOCK_NB));

    section("open file description locks");
    struct flock description = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0};
    other = MUST(open("file", O_RDWR));
    CALL(fcntl(fd, F_OFD_SETLK, &description));
    CALL(fcntl(other, F_OFD_SETLK, &description));
    description.l_type = F_UNLCK;
    CALL(fcntl(fd, F_OFD_SETLK, &description));
    description.l_type = F_WRLCK;
    CALL(fcntl(other, F_OFD_SETLK, &description));

    section("devices");
    char buffer[32];
    int null = MUST(open("/dev/null", O_RDWR));
    CALL(write(null, "xyz", 3));
    CALL(read(null, buffer, sizeof buffer));
    CALL(fstat(null, &status));
    SHOW(S_ISCHR(status.st_mode));
    SHOW(major(status.st_rdev));
    SHOW(minor(status.st_rdev));
    int zero = MUST(open("/dev/zero", O_RDONLY));
    memset(buffer, 1, sizeof buffer);
    CALL(read(zero, buffer, sizeof buffer));
    SHOW(buffer[0] + buffer[31]);
    int full = MUST(open("/dev/full", O_WRONLY));
    CALL(write(full, "x", 1));
    int entropy = MUST(open("/dev/urandom", O_RDONLY));
    CALL(read(entropy, buffer, sizeof buffer));
    CALL(isatty(null));

    return finish();
}
