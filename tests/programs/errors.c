/* What calls answer to wrong arguments: bad pointers, bad descriptors, unknown calls. */
#include "check.h"
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/utsname.h>

#define BAD ((void *)0x10)
#define KERNEL ((void *)0xffff800000000000)

int main(void) {
    char buffer[64] = "";
    enter_work_directory();
    int fd = MUST(open("file", O_CREAT | O_RDWR, 0600));
    MUST(write(fd, "content", 7));

    section("bad pointers");
    CALL(open(BAD, O_RDONLY));
    CALL(open(NULL, O_RDONLY));
    CALL(open(KERNEL, O_RDONLY));
    CALL(pread(fd, BAD, 4, 0));
    CALL(pread(fd, KERNEL, 4, 0));
    CALL(pwrite(fd, BAD, 4, 0));
    CALL(syscall(SYS_stat, "file", BAD));
    CALL(syscall(SYS_uname, BAD));
    CALL(pipe(BAD));
    CALL(syscall(SYS_nanosleep, BAD, NULL));
    CALL(syscall(SYS_clock_gettime, CLOCK_MONOTONIC_RAW, BAD));
    CALL(syscall(SYS_rt_sigaction, SIGUSR1, BAD, NULL, 8));
    CALL(syscall(SYS_rt_sigprocmask, SIG_BLOCK, BAD, NULL, 8));
    CALL(syscall(SYS_getcwd, BAD, 100));
    CALL(syscall(SYS_readlink, "file", BAD, 0));
    CALL(rename(BAD, "x"));
    CALL(rename("file", BAD));
    CALL(readv(fd, BAD, 1));
    CALL(writev(fd, (struct iovec[]){{"ok", 2}, {BAD, 2}}, 2));
    CALL(syscall(SYS_getrandom, BAD, 16, 0));
    CALL(syscall(SYS_getrlimit, 7, BAD));
    CALL(syscall(SYS_futex, BAD, 0, 0, NULL, NULL, 0));
    CALL(poll(BAD, 1, 0));
    CALL(epoll_ctl(MUST(epoll_create1(0)), EPOLL_CTL_ADD, fd, BAD));
    CALL(syscall(SYS_getdents64, MUST(open(".", O_RDONLY)), BAD, 100));
    CALL(syscall(SYS_getdents64, MUST(open(".", O_RDONLY)), buffer, 1));

    section("a buffer at the end of its mapping");
    long page = sysconf(_SC_PAGESIZE);
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(map + page, page);
    CALL(pread(fd, map + page - 3, 3, 0));
    printf("%.3s\n", map + page - 3);
    CALL(pread(fd, map + page - 3, 7, 0));
    CALL(pwrite(fd, map + page - 3, 7, 100));
    strcpy(map + page - 5, "file");
    CALL(access(map + page - 5, F_OK));
    memcpy(map + page - 4, "file", 4);
    CALL(access(map + page - 4, F_OK));
    mprotect(map, page, PROT_READ);
    CALL(pread(fd, map, 3, 0));
    CALL(pwrite(fd, map, 3, 0));
    mprotect(map, page, PROT_NONE);
    CALL(pwrite(fd, map, 3, 0));

    section("bad descriptors");
    int closed = 99;
    CALL(read(closed, buffer, 1));
    CALL(write(-1, buffer, 1));
    CALL(close(closed));
    CALL(fsync(closed));
    CALL(lseek(closed, 0, SEEK_SET));
    CALL(fstat(closed, &(struct stat){0}));
    CALL(ioctl(closed, 0));
    CALL(fcntl(closed, F_GETFD));
    CALL(dup(closed));
    CALL(ftruncate(closed, 0));
    CALL(fchmod(closed, 0600));
    CALL(mmap(NULL, page, PROT_READ, MAP_PRIVATE, closed, 0) == MAP_FAILED ? -1 : 0);
    CALL(epoll_wait(closed, (struct epoll_event[]){{0}}, 1, 0));
    CALL(sendto(closed, "x", 1, 0, NULL, 0));
    CALL(bind(fd, &(struct sockaddr){0}, sizeof(struct sockaddr)));
    CALL(recv(fd, buffer, 1, 0));
    CALL(ioctl(fd, TIOCGWINSZ, buffer));
    CALL(isatty(fd));
    CALL(syscall(SYS_getdents64, fd, buffer, sizeof buffer));

    section("unknown calls");
    CALL(syscall(1000));
    CALL(syscall(-1));
    CALL(syscall(SYS_afs_syscall));
    CALL(syscall(SYS_tuxcall));
    CALL(syscall(0x40000000));

    section("not allowed");
    CALL(syscall(SYS_rt_sigaction, SIGUSR1, NULL, NULL, 4));
    CALL(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, NULL, 4));
    CALL(syscall(SYS_openat, AT_FDCWD, "file", O_RDONLY | O_TMPFILE, 0));
    CALL(syscall(SYS_openat2, AT_FDCWD, "file", NULL, 0));
    CALL(syscall(SYS_clone3, NULL, 0));
    CALL(syscall(SYS_pread64, fd, buffer, 4, -1L));
    CALL(syscall(SYS_getcwd, buffer, 1));
    CALL(syscall(SYS_dup3, fd, 50, 1));
    CALL(syscall(SYS_pipe2, buffer, 0x40000000));
    CALL(syscall(SYS_eventfd2, 0, 0x40000000));
    CALL(syscall(SYS_socket, AF_INET, SOCK_STREAM | 0x40000000, 0));
    return finish();
}
