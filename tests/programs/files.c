/* Files: open flags, reading and writing, names. */
#include "check.h"
#include <sys/sendfile.h>
#include <sys/uio.h>

static void show_content(const char *name) {
    char buffer[256];
    int fd = MUST(open(name, O_RDONLY));
    ssize_t length = read(fd, buffer, sizeof buffer);
    printf("%s holds %zd bytes:", name, length);
    for (ssize_t i = 0; i < length; i++)
        printf(buffer[i] >= ' ' && buffer[i] < 127 ? " %c" : " %02x", (unsigned char)buffer[i]);
    printf("\n");
    close(fd);
}

int main(void) {
    char buffer[64];
    enter_work_directory();

    section("open");
    CALL(open("none", O_RDONLY));
    CALL(open("none/none", O_CREAT | O_WRONLY, 0644));
    CALL(open("", O_RDONLY));
    int fd = DONE(open("file", O_CREAT | O_EXCL | O_RDWR, 0640));
    CALL(open("file", O_CREAT | O_EXCL | O_RDWR, 0640));
    CALL(open("file/below", O_RDONLY));
    CALL(open("file", O_RDONLY | O_DIRECTORY));
    CALL(open(".", O_WRONLY));
    CALL(open(".", O_RDWR | O_CREAT, 0644));

    section("read and write");
    CALL(write(fd, "hello, world", 12));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(read(fd, buffer, sizeof buffer));
    CALL(lseek(fd, -5, SEEK_END));
    CALL(read(fd, buffer, sizeof buffer));
    printf("%.5s\n", buffer);
    CALL(lseek(fd, -1, SEEK_SET));
    CALL(lseek(fd, 0, 99));
    CALL(pread(fd, buffer, 5, 7));
    CALL(pwrite(fd, "W", 1, 7));
    CALL(pread(fd, buffer, 5, -1));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(read(fd, buffer, 0));
    show_content("file");

    section("vectors");
    struct iovec vectors[3] = {{"ab", 2}, {"", 0}, {"cde", 3}};
    CALL(lseek(fd, 0, SEEK_SET));
    CALL(writev(fd, vectors, 3));
    CALL(pwritev(fd, vectors, 3, 10));
    char one[4] = "", two[8] = "";
    struct iovec into[2] = {{one, 3}, {two, 7}};
    CALL(preadv(fd, into, 2, 1));
    printf("%s|%s\n", one, two);
    CALL(writev(fd, vectors, -1));
    CALL(writev(fd, vectors, 0));
    CALL(writev(fd, vectors, 1025));
    show_content("file");

    section("size");
    CALL(ftruncate(fd, 4));
    show_content("file");
    CALL(ftruncate(fd, 8));
    show_content("file");
    CALL(truncate("file", 6));
    CALL(ftruncate(fd, -1));
    CALL(truncate("none", 0));
    CALL(lseek(fd, 100000, SEEK_SET));
    CALL(write(fd, "end", 3));
    struct stat status;
    CALL(fstat(fd, &status));
    SHOW(status.st_size);
    SHOW(status.st_blocks * 512 < 100003);
    CALL(pread(fd, buffer, 4, 50000));
    SHOW(buffer[0] | buffer[1] | buffer[2] | buffer[3]);
    CALL(posix_fallocate(fd, 0, 200000));
    CALL(fstat(fd, &status));
    SHOW(status.st_size);
    CALL(fsync(fd));
    CALL(fdatasync(fd));
    CALL(close(fd));
    CALL(close(fd));

    section("access mode");
    fd = MUST(open("file", O_WRONLY | O_TRUNC));
    CALL(read(fd, buffer, 1));
    CALL(fcntl(fd, F_GETFL) & O_ACCMODE);
    close(fd);
    fd = MUST(open("file", O_RDONLY));
    CALL(write(fd, "x", 1));
    CALL(ftruncate(fd, 0));
    close(fd);
    CALL(fstatat(AT_FDCWD, "file", &status, 0));
    SHOW(status.st_size);

    section("append");
    int first = MUST(open("log", O_CREAT | O_WRONLY | O_APPEND, 0600));
    int second = MUST(open("log", O_WRONLY | O_APPEND));
    CALL(write(first, "one ", 4));
    CALL(write(second, "two ", 4));
    CALL(lseek(first, 0, SEEK_SET));
    CALL(write(first, "three", 5));
    CALL(lseek(first, 0, SEEK_CUR));
    show_content("log");
    close(first);
    close(second);

    section("names");
    CALL(link("log", "hard"));
    CALL(link("log", "hard"));
    CALL(link("none", "other"));
    CALL(link(".", "directory"));
    CALL(stat("log", &status));
    SHOW(status.st_nlink);
    CALL(symlink("log", "soft"));
    CALL(symlink("log", "soft"));
    CALL(readlink("soft", buffer, sizeof buffer));
    CALL(readlink("soft", buffer, 2));
    CALL(readlink("log", buffer, sizeof buffer));
    CALL(readlink("none", buffer, sizeof buffer));
    CALL(lstat("soft", &status));
    SHOW(S_ISLNK(status.st_mode));
    SHOW(status.st_size);
    CALL(open("soft", O_RDONLY | O_NOFOLLOW));
    CALL(symlink("loop-b", "loop-a"));
    CALL(symlink("loop-a", "loop-b"));
    CALL(open("loop-a", O_RDONLY));
    CALL(symlink("nowhere", "dangling"));
    CALL(open("dangling", O_RDONLY));
    DONE(open("dangling", O_CREAT | O_WRONLY, 0600));
    CALL(access("nowhere", F_OK));
    CALL(rename("log", "renamed"));
    CALL(rename("log", "renamed"));
    CALL(access("soft", F_OK));
    CALL(rename("renamed", "hard"));
    CALL(access("renamed", F_OK));
    CALL(renameat2(AT_FDCWD, "renamed", AT_FDCWD, "file", RENAME_NOREPLACE));
    CALL(unlink("none"));
    CALL(unlink("."));
    char longest[300];
    memset(longest, 'n', 256);
    longest[256] = 0;
    CALL(open(longest, O_CREAT | O_RDWR, 0600) == -1 ? -1 : 0);
    longest[255] = 0;
    DONE(open(longest, O_CREAT | O_RDWR, 0600));
    CALL(unlink(longest));

    section("unlinked while open");
    fd = MUST(open("gone", O_CREAT | O_RDWR, 0600));
    CALL(write(fd, "still here", 10));
    CALL(unlink("gone"));
    CALL(access("gone", F_OK));
    CALL(fstat(fd, &status));
    SHOW(status.st_nlink);
    CALL(pread(fd, buffer, 10, 0));
    printf("%.10s\n", buffer);
    close(fd);
    fd = DONE(open(".", O_TMPFILE | O_RDWR, 0600));
    if (fd >= 0) {
        CALL(write(fd, "nameless", 8));
        CALL(fstat(fd, &status));
        SHOW(status.st_nlink);
        close(fd);
    }

    section("copies");
    fd = MUST(open("file", O_RDWR | O_TRUNC));
    for (int i = 0; i < 1000; i++)
        MUST(write(fd, "0123456789", 10));
    int copy = MUST(open("copy", O_CREAT | O_RDWR, 0600));
    off_t offset = 5;
    CALL(sendfile(copy, fd, &offset, 20));
    SHOW(offset);
    MUST(lseek(fd, 0, SEEK_SET));
    CALL(sendfile(copy, fd, NULL, 20000));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(lseek(copy, 0, SEEK_CUR));
    CALL(pread(copy, buffer, 6, 18));
    printf("%.6s\n", buffer);
    close(fd);
    close(copy);

    section("duplicates");
    fd = MUST(open("file", O_RDONLY));
    int duplicate = MUST(dup(fd));
    CALL(lseek(duplicate, 10, SEEK_SET));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(dup2(fd, 100));
    CALL(lseek(100, 0, SEEK_CUR));
    CALL(dup2(fd, fd) == fd);
    CALL(dup2(77, 101));
    CALL(dup3(fd, fd, 0));
    CALL(dup3(fd, 102, O_CLOEXEC));
    CALL(fcntl(102, F_GETFD));
    CALL(fcntl(100, F_GETFD));
    CALL(fcntl(fd, F_DUPFD, 200));
    CALL(fcntl(fd, F_DUPFD_CLOEXEC, 200));
    CALL(fcntl(201, F_GETFD));
    CALL(fcntl(fd, F_DUPFD, -1));
    CALL(close(200));
    CALL(lseek(201, 0, SEEK_CUR));

    section("close_range");
    CALL(close_range(100, 250, 0));
    CALL(fcntl(201, F_GETFD));
    CALL(fcntl(fd, F_GETFD));

    return finish();
}
