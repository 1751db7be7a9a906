/* epoll: level and edge, one shot, changes, nesting, what becomes of closed descriptors. */
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

static int set;

static int compare(const void *left, const void *right) {
    const struct epoll_event *a = left, *b = right;
    return (a->data.u64 > b->data.u64) - (a->data.u64 < b->data.u64);
}

static void wait_now(int timeout) {
    struct epoll_event events[16];
    int count = epoll_wait(set, events, 16, timeout);
    printf("wait: %d", count);
    if (count > 0)
        qsort(events, count, sizeof *events, compare);
    for (int i = 0; i < count; i++)
        printf(" [%d:%s%s%s%s%s]", (int)events[i].data.u64, events[i].events & EPOLLIN ? " in" : "",
               events[i].events & EPOLLOUT ? " out" : "", events[i].events & EPOLLHUP ? " hangup" : "",
               events[i].events & EPOLLRDHUP ? " read-hangup" : "", events[i].events & EPOLLERR ? " error" : "");
    printf("\n");
}

static int control(int operation, int fd, uint32_t events, int data) {
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)data};
    return epoll_ctl(set, operation, fd, &event);
}

static void *add_soon(void *argument) {
    pause_for(20 * MILLISECOND);
    uint64_t one = 1;
    write(*(int *)argument, &one, 8);
    return NULL;
}

static void *wait_one(void *argument) {
    struct epoll_event event;
    (void)argument;
    return (void *)(long)epoll_wait(set, &event, 1, 2000);
}

static void handler(int signal) { (void)signal; }

int main(void) {
    int first[2], second[2];
    char buffer[100];
    uint64_t value = 1;
    MUST(pipe2(first, O_NONBLOCK)), MUST(pipe2(second, O_NONBLOCK));

    section("level");
    set = DONE(epoll_create1(EPOLL_CLOEXEC));
    CALL(control(EPOLL_CTL_ADD, first[0], EPOLLIN, 1));
    CALL(control(EPOLL_CTL_ADD, first[0], EPOLLIN, 1));
    wait_now(0);
    write(first[1], "ab", 2);
    wait_now(0);
    wait_now(0);
    read(first[0], buffer, 1);
    wait_now(0);
    read(first[0], buffer, 1);
    wait_now(0);

    section("edge");
    CALL(control(EPOLL_CTL_ADD, second[0], EPOLLIN | EPOLLET, 2));
    write(second[1], "ab", 2);
    wait_now(0);
    wait_now(0);
    write(second[1], "c", 1);
    wait_now(0);
    wait_now(0);
    CALL(control(EPOLL_CTL_MOD, second[0], EPOLLIN | EPOLLET, 22));
    wait_now(0);
    read(second[0], buffer, 100);
    wait_now(0);

    section("one shot");
    CALL(control(EPOLL_CTL_MOD, first[0], EPOLLIN | EPOLLONESHOT, 11));
    write(first[1], "x", 1);
    wait_now(0);
    wait_now(0);
    write(first[1], "y", 1);
    wait_now(0);
    CALL(control(EPOLL_CTL_MOD, first[0], EPOLLIN | EPOLLONESHOT, 12));
    wait_now(0);
    CALL(control(EPOLL_CTL_MOD, first[0], EPOLLIN, 1));
    read(first[0], buffer, 100);

    section("writing and several");
    CALL(control(EPOLL_CTL_ADD, first[1], EPOLLOUT, 3));
    int event = MUST(eventfd(0, EFD_NONBLOCK));
    CALL(control(EPOLL_CTL_ADD, event, EPOLLIN | EPOLLOUT, 4));
    wait_now(0);
    write(event, &value, 8);
    wait_now(0);
    CALL(control(EPOLL_CTL_DEL, first[1], 0, 0));
    CALL(control(EPOLL_CTL_DEL, first[1], 0, 0));
    CALL(control(EPOLL_CTL_MOD, first[1], EPOLLIN, 0));
    CALL(control(EPOLL_CTL_MOD, event, EPOLLIN, 4));
    wait_now(0);
    read(event, &value, 8);

    section("errors");
    struct epoll_event events[4];
    CALL(epoll_wait(set, events, 0, 0));
    CALL(epoll_wait(set, events, -1, 0));
    CALL(epoll_wait(event, events, 4, 0));
    CALL(epoll_wait(99, events, 4, 0));
    CALL(control(EPOLL_CTL_ADD, 99, EPOLLIN, 0));
    CALL(control(EPOLL_CTL_ADD, set, EPOLLIN, 0));
    CALL(control(77, first[0], EPOLLIN, 0));
    CALL(epoll_create1(1));
    CALL(epoll_create(0));
    enter_work_directory();
    int file = MUST(open("file", O_CREAT | O_RDWR, 0600));
    CALL(control(EPOLL_CTL_ADD, file, EPOLLIN, 0));

    section("timeouts and wake-ups");
    int64_t before = now(CLOCK_MONOTONIC);
    wait_now(20);
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);
    pthread_t thread;
    pthread_create(&thread, NULL, add_soon, &event);
    wait_now(-1);
    pthread_join(thread, NULL);
    read(event, &value, 8);
    int timer = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    CALL(control(EPOLL_CTL_ADD, timer, EPOLLIN, 5));
    struct itimerspec setting = {{0, 0}, {0, 10 * MILLISECOND}};
    timerfd_settime(timer, 0, &setting, NULL);
    wait_now(-1);
    read(timer, &value, 8);
    sigset_t none;
    sigemptyset(&none);
    CALL(epoll_pwait(set, events, 4, 1, &none));
    struct timespec brief = {0, 2000000};
    CALL(epoll_pwait2(set, events, 4, &brief, NULL));
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    timer_t alarm_timer;
    struct sigevent how = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    timer_create(CLOCK_MONOTONIC, &how, &alarm_timer);
    timer_settime(alarm_timer, 0, &setting, NULL);
    CALL(epoll_wait(set, events, 4, -1));

    section("hang-ups");
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
    CALL(control(EPOLL_CTL_ADD, pair[0], EPOLLIN | EPOLLOUT | EPOLLRDHUP, 6));
    wait_now(0);
    shutdown(pair[1], SHUT_WR);
    wait_now(0);
    close(pair[1]);
    wait_now(0);
    close(pair[0]);
    wait_now(0);
    close(second[1]);
    wait_now(0);
    wait_now(0);

    section("closing takes out, unless there is a duplicate");
    int third[2];
    MUST(pipe2(third, O_NONBLOCK));
    write(third[1], "x", 1);
    CALL(control(EPOLL_CTL_ADD, third[0], EPOLLIN, 7));
    int duplicate = MUST(dup(third[0]));
    close(third[0]);
    wait_now(0);
    close(duplicate);
    wait_now(0);

    section("nesting");
    int outer = MUST(epoll_create1(0)), inner = set;
    struct epoll_event entry = {.events = EPOLLIN, .data.u64 = 100};
    CALL(epoll_ctl(outer, EPOLL_CTL_ADD, inner, &entry));
    CALL(epoll_ctl(inner, EPOLL_CTL_ADD, outer, &entry));
    set = outer;
    wait_now(0);
    value = 1;
    write(event, &value, 8);
    wait_now(0);
    read(event, &value, 8);
    wait_now(0);
    set = inner;

    section("one event wakes one waiter");
    pthread_t waiters[4];
    CALL(control(EPOLL_CTL_MOD, event, EPOLLIN | EPOLLONESHOT, 4));
    for (int i = 0; i < 4; i++)
        pthread_create(&waiters[i], NULL, wait_one, NULL);
    pause_for(20 * MILLISECOND);
    value = 1;
    write(event, &value, 8);
    long woken = 0;
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(waiters[i], &result);
        woken += (long)result;
    }
    SHOW(woken);

    section("many");
    static int many[500];
    set = MUST(epoll_create1(0));
    for (int i = 0; i < 500; i++) {
        many[i] = MUST(eventfd(i % 5 == 0, EFD_NONBLOCK));
        MUST(control(EPOLL_CTL_ADD, many[i], EPOLLIN | EPOLLET, i));
    }
    int ready = 0;
    struct epoll_event batch[7];
    for (int count; (count = epoll_wait(set, batch, 7, 0)) > 0;)
        ready += count;
    SHOW(ready);
    return finish();
}
