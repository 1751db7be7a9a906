/* Time: clocks, sleeping, interval timers, POSIX timers, timer descriptors. */
#include "check.h"
#include <poll.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/times.h>
#include <sys/resource.h>

static volatile sig_atomic_t alarms;

static void handler(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info, (void)context;
    alarms++;
}

int main(void) {
    struct timespec time, rest;

    section("clocks");
    int64_t previous = now(CLOCK_MONOTONIC);
    int backwards = 0;
    for (int i = 0; i < 100000; i++) {
        int64_t this = now(CLOCK_MONOTONIC);
        if (this < previous)
            backwards++;
        previous = this;
    }
    SHOW(backwards);
    clockid_t clocks[] = {CLOCK_REALTIME,         CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID,
                          CLOCK_MONOTONIC_RAW,    CLOCK_BOOTTIME,  CLOCK_REALTIME_COARSE,    CLOCK_MONOTONIC_COARSE};
    for (size_t i = 0; i < sizeof clocks / sizeof *clocks; i++) {
        CALL(clock_gettime(clocks[i], &time));
        SHOW(time.tv_nsec >= 0 && time.tv_nsec < 1000000000);
        CALL(clock_getres(clocks[i], &time));
        SHOW(time.tv_sec == 0 && time.tv_nsec > 0);
    }
    CALL(clock_gettime(1234, &time));
    SHOW(now(CLOCK_REALTIME) > 1600000000 * INT64_C(1000000000));
    struct timeval of_day;
    CALL(gettimeofday(&of_day, NULL));
    SHOW(llabs(of_day.tv_sec - now(CLOCK_REALTIME) / 1000000000) <= 1);
    SHOW(now(CLOCK_PROCESS_CPUTIME_ID) > 0);
    int64_t cpu = now(CLOCK_THREAD_CPUTIME_ID);
    for (volatile int i = 0; i < 3000000; i++) {
    }
    SHOW(now(CLOCK_THREAD_CPUTIME_ID) > cpu);
    struct tms spent;
    SHOW(times(&spent) != -1);

    section("sleeping");
    int64_t before = now(CLOCK_MONOTONIC);
    CALL(nanosleep(&(struct timespec){0, 20 * MILLISECOND}, &rest));
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);
    CALL(usleep(1000));
    clock_gettime(CLOCK_MONOTONIC, &time);
    int64_t until = now(CLOCK_MONOTONIC) + 20 * MILLISECOND;
    time = (struct timespec){until / 1000000000, until % 1000000000};
    PTHREAD(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL));
    SHOW(now(CLOCK_MONOTONIC) >= until);
    PTHREAD(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL));
    PTHREAD(clock_nanosleep(CLOCK_REALTIME, 0, &(struct timespec){0, 1000}, NULL));
    CALL(nanosleep(&(struct timespec){0, 1000000000}, NULL));
    CALL(nanosleep(&(struct timespec){-1, 0}, NULL));

    section("interval timer");
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    MUST(sigaction(SIGALRM, &action, NULL));
    struct itimerval interval = {{0, 5000}, {0, 5000}}, left;
    before = now(CLOCK_MONOTONIC);
    CALL(setitimer(ITIMER_REAL, &interval, NULL));
    while (alarms < 5)
        pause();
    SHOW(now(CLOCK_MONOTONIC) - before >= 25 * MILLISECOND);
    CALL(getitimer(ITIMER_REAL, &left));
    SHOW(left.it_interval.tv_usec);
    SHOW(left.it_value.tv_usec <= 5000);
    interval = (struct itimerval){{0, 0}, {0, 0}};
    CALL(setitimer(ITIMER_REAL, &interval, &left));
    CALL(alarm(100));
    CALL(alarm(0));
    CALL(alarm(0));
    CALL(setitimer(99, &interval, NULL));

    section("a timer while the program computes");
    alarms = 0;
    interval.it_value.tv_usec = 10000;
    CALL(setitimer(ITIMER_REAL, &interval, NULL));
    volatile unsigned long spins = 0;
    while (!alarms)
        spins++;
    SHOW(alarms);

    section("POSIX timer");
    alarms = 0;
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    CALL(timer_create(CLOCK_MONOTONIC, &event, &timer));
    struct itimerspec setting = {{0, 5 * MILLISECOND}, {0, 5 * MILLISECOND}}, current;
    CALL(timer_settime(timer, 0, &setting, NULL));
    while (alarms < 3)
        pause();
    CALL(timer_gettime(timer, &current));
    SHOW(current.it_interval.tv_nsec);
    CALL(timer_getoverrun(timer) >= 0);
    CALL(timer_delete(timer));
    CALL(timer_create(1234, &event, &timer));

    section("timer descriptor");
    int fd = DONE(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
    uint64_t count = 0;
    CALL(read(fd, &count, 8));
    setting = (struct itimerspec){{0, 0}, {0, 10 * MILLISECOND}};
    before = now(CLOCK_MONOTONIC);
    CALL(timerfd_settime(fd, 0, &setting, NULL));
    struct pollfd poll_entry = {fd, POLLIN, 0};
    CALL(poll(&poll_entry, 1, 5000));
    SHOW(now(CLOCK_MONOTONIC) - before >= 10 * MILLISECOND);
    CALL(read(fd, &count, 4));
    CALL(read(fd, &count, 8));
    SHOW(count);
    CALL(read(fd, &count, 8));
    setting = (struct itimerspec){{0, 2 * MILLISECOND}, {0, 2 * MILLISECOND}};
    CALL(timerfd_settime(fd, 0, &setting, NULL));
    pause_for(20 * MILLISECOND);
    CALL(read(fd, &count, 8));
    SHOW(count >= 9);
    CALL(timerfd_gettime(fd, &current));
    SHOW(current.it_interval.tv_nsec);
    until = now(CLOCK_MONOTONIC) - 5 * MILLISECOND;
    setting = (struct itimerspec){{0, 0}, {until / 1000000000, until % 1000000000}};
    CALL(timerfd_settime(fd, TFD_TIMER_ABSTIME, &setting, NULL));
    CALL(poll(&poll_entry, 1, 5000));
    CALL(read(fd, &count, 8));
    CALL(timerfd_create(1234, 0));
    CALL(timerfd_settime(0, 0, &setting, NULL) == -1 ? -1 : 0);

    section("resource use");
    struct rusage usage;
    CALL(getrusage(RUSAGE_SELF, &usage));
    SHOW(usage.ru_utime.tv_sec * 1000000 + usage.ru_utime.tv_usec > 0);
    SHOW(usage.ru_maxrss > 0);
    CALL(getrusage(99, &usage));
    return finish();
}
