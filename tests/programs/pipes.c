/* Pipes and event descriptors: order, blocking, limits, ends that close, poll and select. */
#include "check.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/uio.h>

static int ends[2];

static void *write_much(void *argument) {
    long rounds = (long)argument;
    unsigned char block[1000];
    for (long i = 0; i < rounds; i++) {
        memset(block, (int)i, sizeof block);
        size_t done = 0;
        while (done < sizeof block)
            done += MUST(write(ends[1], block + done, sizeof block - done));
    }
    close(ends[1]);
    return NULL;
}

static void *write_soon(void *argument) {
    pause_for(20 * MILLISECOND);
    write(*(int *)argument, "12345678", 8);
    return NULL;
}

static void show_poll(const char *text, int fd, short events) {
    struct pollfd entry = {fd, events, 0};
    int result = poll(&entry, 1, 0);
    printf("%s: %d%s%s%s%s%s\n", text, result, entry.revents & POLLIN ? " in" : "", entry.revents & POLLOUT ? " out" : "",
           entry.revents & POLLHUP ? " hangup" : "", entry.revents & POLLERR ? " error" : "",
           entry.revents & POLLNVAL ? " invalid" : "");
}

int main(void) {
    char buffer[70000] = "";
    signal(SIGPIPE, SIG_IGN);

    section("order");
    MUST(pipe(ends));
    CALL(write(ends[1], "one", 3));
    CALL(write(ends[1], "two", 3));
    CALL(read(ends[0], buffer, 4));
    CALL(read(ends[0], buffer + 4, 100));
    printf("%s\n", buffer);
    CALL(write(ends[0], "x", 1));
    CALL(read(ends[1], buffer, 1));
    CALL(lseek(ends[0], 0, SEEK_SET));
    struct stat status;
    CALL(fstat(ends[0], &status));
    SHOW(S_ISFIFO(status.st_mode));
    CALL(ftruncate(ends[1], 0));

    section("not blocking");
    CALL(fcntl(ends[0], F_SETFL, O_NONBLOCK));
    CALL(read(ends[0], buffer, 1));
    CALL(fcntl(ends[1], F_SETFL, O_NONBLOCK));
    CALL(fcntl(ends[1], F_GETPIPE_SZ));
    CALL(write(ends[1], buffer, 70000));
    CALL(write(ends[1], buffer, 1));
    int available = 0;
    CALL(ioctl(ends[0], FIONREAD, &available));
    SHOW(available);
    show_poll("read end", ends[0], POLLIN);
    show_poll("write end", ends[1], POLLOUT);
    CALL(read(ends[0], buffer, 4096));
    show_poll("write end", ends[1], POLLOUT);
    CALL(write(ends[1], buffer, 4096));
    while (read(ends[0], buffer, sizeof buffer) > 0) {
    }

    section("ends that close");
    CALL(write(ends[1], "rest", 4));
    close(ends[1]);
    show_poll("read end", ends[0], POLLIN);
    CALL(read(ends[0], buffer, 100));
    show_poll("read end", ends[0], POLLIN);
    CALL(read(ends[0], buffer, 100));
    close(ends[0]);
    MUST(pipe2(ends, O_CLOEXEC | O_NONBLOCK));
    CALL(fcntl(ends[0], F_GETFD));
    close(ends[0]);
    show_poll("write end", ends[1], POLLOUT);
    CALL(write(ends[1], "x", 1));
    close(ends[1]);
    show_poll("closed", ends[1], POLLIN);

    section("much");
    MUST(pipe(ends));
    pthread_t thread;
    pthread_create(&thread, NULL, write_much, (void *)3000);
    long total = 0, wrong = 0;
    for (ssize_t length; (length = read(ends[0], buffer, sizeof buffer)) > 0;)
        for (ssize_t i = 0; i < length; i++, total++)
            if ((unsigned char)buffer[i] != (unsigned char)(total / 1000))
                wrong++;
    SHOW(total);
    SHOW(wrong);
    pthread_join(thread, NULL);
    close(ends[0]);

    section("blocking until there is something");
    MUST(pipe(ends));
    pthread_create(&thread, NULL, write_soon, &ends[1]);
    CALL(read(ends[0], buffer, 100));
    pthread_join(thread, NULL);
    pthread_create(&thread, NULL, write_soon, &ends[1]);
    struct pollfd entries[2] = {{ends[0], POLLIN, 0}, {-1, POLLIN, 0}};
    CALL(poll(entries, 2, -1));
    SHOW(entries[0].revents == POLLIN);
    SHOW(entries[1].revents);
    CALL(read(ends[0], buffer, 100));
    pthread_join(thread, NULL);
    int64_t before = now(CLOCK_MONOTONIC);
    CALL(poll(entries, 2, 20));
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);

    section("select");
    fd_set readable, writable;
    FD_ZERO(&readable);
    FD_ZERO(&writable);
    FD_SET(ends[0], &readable);
    FD_SET(ends[1], &writable);
    struct timeval wait = {0, 0};
    CALL(select(ends[1] + 1, &readable, &writable, NULL, &wait));
    SHOW(FD_ISSET(ends[0], &readable) != 0);
    SHOW(FD_ISSET(ends[1], &writable) != 0);
    write(ends[1], "x", 1);
    FD_ZERO(&readable);
    FD_SET(ends[0], &readable);
    CALL(select(ends[1] + 1, &readable, NULL, NULL, NULL));
    SHOW(FD_ISSET(ends[0], &readable) != 0);
    FD_ZERO(&readable);
    int closed = MUST(dup(ends[0]));
    close(closed);
    FD_SET(closed, &readable);
    CALL(select(closed + 1, &readable, NULL, NULL, &wait));
    wait.tv_usec = 20000;
    before = now(CLOCK_MONOTONIC);
    CALL(select(0, NULL, NULL, NULL, &wait));
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);
    sigset_t none;
    sigemptyset(&none);
    struct timespec brief = {0, 1000000};
    CALL(read(ends[0], buffer, 1));
    CALL(pselect(0, NULL, NULL, NULL, &brief, &none));
    CALL(ppoll(entries, 1, &brief, &none));
    CALL(poll(NULL, 0, 1));
    CALL(poll((struct pollfd *)8, 1, 1));

    section("named pipe");
    enter_work_directory();
    CALL(mkfifo("fifo", 0600));
    CALL(open("fifo", O_WRONLY | O_NONBLOCK));
    int reader = DONE(open("fifo", O_RDONLY | O_NONBLOCK));
    int writer = DONE(open("fifo", O_WRONLY));
    CALL(write(writer, "named", 5));
    CALL(read(reader, buffer, 100));
    CALL(read(reader, buffer, 100));
    close(writer);
    CALL(read(reader, buffer, 100));

    section("event descriptor");
    int event = DONE(eventfd(3, EFD_NONBLOCK));
    uint64_t value = 0;
    CALL(read(event, &value, 8));
    SHOW(value);
    CALL(read(event, &value, 8));
    value = 5;
    CALL(write(event, &value, 8));
    CALL(write(event, &value, 8));
    CALL(read(event, &value, 4));
    CALL(write(event, &value, 4));
    show_poll("event", event, POLLIN | POLLOUT);
    CALL(read(event, &value, 8));
    SHOW(value);
    value = UINT64_MAX;
    CALL(write(event, &value, 8));
    value = UINT64_MAX - 1;
    CALL(write(event, &value, 8));
    value = 1;
    CALL(write(event, &value, 8));
    show_poll("full event", event, POLLIN | POLLOUT);
    int semaphore = MUST(eventfd(2, EFD_SEMAPHORE | EFD_NONBLOCK));
    CALL(read(semaphore, &value, 8));
    SHOW(value);
    CALL(read(semaphore, &value, 8));
    CALL(read(semaphore, &value, 8));
    int blocking = MUST(eventfd(0, 0));
    pthread_create(&thread, NULL, write_soon, &blocking);
    CALL(read(blocking, &value, 8));
    SHOW(value == UINT64_C(0x3837363534333231));
    pthread_join(thread, NULL);
    CALL(eventfd(0, 99));

    section("splice and tee");
    int to[2], from[2];
    MUST(pipe(from)), MUST(pipe2(to, O_NONBLOCK));
    MUST(write(from[1], "through", 7));
    CALL(tee(from[0], to[1], 100, 0));
    CALL(splice(from[0], NULL, to[1], NULL, 100, 0));
    CALL(read(to[0], buffer, 100));
    printf("%.14s\n", buffer);
    return finish();
}
