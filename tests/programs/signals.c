/* Signals: handlers, what they are told, masks, waiting, interrupting calls. */
#include "check.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static volatile int calls, last, nested, on_stack, order[16], ordered;
static stack_t alternate;

static void simple(int signal) {
    calls++;
    last = signal;
}

static void informed(int signal, siginfo_t *info, void *context) {
    (void)context;
    printf("signal %d code %d value %d from us %d\n", signal, info->si_code, info->si_value.sival_int,
           info->si_pid == getpid() && info->si_uid == getuid());
}

static void in_order(int signal, siginfo_t *info, void *context) {
    (void)context;
    order[ordered++] = signal * 1000 + info->si_value.sival_int;
}

static void raise_again(int signal) {
    static volatile int depth;
    depth++;
    if (depth > nested)
        nested = depth;
    if (calls++ < 3)
        raise(signal);
    depth--;
}

static void where(int signal) {
    (void)signal;
    char here;
    on_stack = &here >= (char *)alternate.ss_sp && &here < (char *)alternate.ss_sp + alternate.ss_size;
}

static void install(int signal, void (*handler)(int), int flags) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    MUST(sigaction(signal, &action, NULL));
}

static void inform(int signal, void (*handler)(int, siginfo_t *, void *)) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    sigfillset(&action.sa_mask);
    MUST(sigaction(signal, &action, NULL));
}

static void *kill_main(void *argument) {
    pause_for(20 * MILLISECOND);
    pthread_kill(*(pthread_t *)argument, SIGUSR1);
    return NULL;
}

static void *write_later(void *argument) {
    pause_for(60 * MILLISECOND);
    write(*(int *)argument, "z", 1);
    return NULL;
}

static void *wait_for_signal(void *argument) {
    int signal = 0;
    sigwait(argument, &signal);
    return (void *)(long)signal;
}

static sigjmp_buf back;
static void jump(int signal) { siglongjmp(back, signal); }

int main(void) {
    sigset_t set, old, pending;
    pthread_t self = pthread_self(), thread;

    section("actions");
    install(SIGUSR1, simple, 0);
    CALL(raise(SIGUSR1));
    SHOW(calls);
    CALL(kill(getpid(), SIGUSR1));
    SHOW(calls);
    CALL(syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGUSR1));
    SHOW(calls);
    CALL(kill(getpid(), 0));
    CALL(kill(getpid(), 65));
    CALL(syscall(SYS_tgkill, getpid(), 999999, SIGUSR1));
    CALL(sigaction(SIGKILL, &(struct sigaction){.sa_handler = simple}, NULL));
    CALL(sigaction(99, NULL, NULL));
    struct sigaction action;
    CALL(sigaction(SIGUSR1, NULL, &action));
    SHOW(action.sa_handler == simple);
    install(SIGUSR2, SIG_IGN, 0);
    CALL(raise(SIGUSR2));
    CALL(raise(SIGCHLD));
    CALL(raise(SIGWINCH));
    CALL(raise(SIGURG));
    install(SIGUSR2, simple, SA_RESETHAND);
    CALL(raise(SIGUSR2));
    CALL(sigaction(SIGUSR2, NULL, &action));
    SHOW(action.sa_handler == SIG_DFL);

    section("information");
    inform(SIGUSR2, informed);
    CALL(raise(SIGUSR2));
    CALL(kill(getpid(), SIGUSR2));
    CALL(sigqueue(getpid(), SIGUSR2, (union sigval){.sival_int = 1234}));

    section("masks");
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CALL(sigprocmask(SIG_BLOCK, &set, &old));
    SHOW(sigismember(&old, SIGUSR1));
    calls = 0;
    raise(SIGUSR1);
    raise(SIGUSR1);
    SHOW(calls);
    CALL(sigpending(&pending));
    SHOW(sigismember(&pending, SIGUSR1));
    CALL(sigprocmask(SIG_SETMASK, &old, NULL));
    SHOW(calls);
    CALL(sigprocmask(99, &set, NULL));
    sigfillset(&set);
    CALL(sigprocmask(SIG_SETMASK, &set, NULL));
    CALL(sigprocmask(SIG_SETMASK, &old, &set));
    SHOW(sigismember(&set, SIGKILL));
    SHOW(sigismember(&set, SIGTERM));

    section("real-time signals queue, in order");
    sigemptyset(&set);
    for (int i = 0; i < 3; i++) {
        inform(SIGRTMIN + i, in_order);
        sigaddset(&set, SIGRTMIN + i);
    }
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (int i = 2; i >= 0; i--)
        for (int j = 0; j < 3; j++)
            sigqueue(getpid(), SIGRTMIN + i, (union sigval){.sival_int = j});
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    SHOW(ordered);
    for (int i = 0; i < ordered; i++)
        printf("%d ", order[i] - SIGRTMIN * 1000);
    printf("\n");

    section("nesting");
    calls = nested = 0;
    install(SIGUSR1, raise_again, 0);
    raise(SIGUSR1);
    SHOW(nested);
    calls = nested = 0;
    install(SIGUSR1, raise_again, SA_NODEFER);
    raise(SIGUSR1);
    SHOW(nested);

    section("alternate stack");
    alternate.ss_size = 65536;
    alternate.ss_sp = mmap(NULL, alternate.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CALL(sigaltstack(&alternate, NULL));
    stack_t now_used;
    CALL(sigaltstack(NULL, &now_used));
    SHOW(now_used.ss_sp == alternate.ss_sp && now_used.ss_size == alternate.ss_size);
    SHOW(now_used.ss_flags);
    install(SIGUSR1, where, 0);
    raise(SIGUSR1);
    SHOW(on_stack);
    install(SIGUSR1, where, SA_ONSTACK);
    raise(SIGUSR1);
    SHOW(on_stack);
    CALL(sigaltstack(&(stack_t){.ss_sp = alternate.ss_sp, .ss_size = 10}, NULL));
    CALL(sigaltstack(&(stack_t){.ss_flags = SS_DISABLE}, NULL));

    section("interrupted calls");
    int pipes[2];
    MUST(pipe(pipes));
    char byte;
    install(SIGUSR1, simple, 0);
    pthread_create(&thread, NULL, kill_main, &self);
    CALL(read(pipes[0], &byte, 1));
    pthread_join(thread, NULL);
    pthread_create(&thread, NULL, kill_main, &self);
    struct timespec rest, second = {10, 0};
    CALL(nanosleep(&second, &rest));
    SHOW(rest.tv_sec == 9);
    pthread_join(thread, NULL);
    pthread_create(&thread, NULL, kill_main, &self);
    CALL(pause());
    pthread_join(thread, NULL);
    install(SIGUSR1, simple, SA_RESTART);
    calls = 0;
    pthread_create(&thread, NULL, kill_main, &self);
    pthread_t writer;
    pthread_create(&writer, NULL, write_later, &pipes[1]);
    CALL(read(pipes[0], &byte, 1));
    SHOW(byte);
    SHOW(calls);
    pthread_join(thread, NULL);
    pthread_join(writer, NULL);
    pthread_create(&thread, NULL, kill_main, &self);
    CALL(nanosleep(&second, &rest));
    pthread_join(thread, NULL);

    section("sigsuspend");
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, &old);
    calls = 0;
    raise(SIGUSR1);
    CALL(sigsuspend(&old));
    SHOW(calls);
    sigprocmask(SIG_SETMASK, NULL, &pending);
    SHOW(sigismember(&pending, SIGUSR1));

    section("waiting for signals");
    raise(SIGUSR1);
    int signal = 0;
    CALL(sigwait(&set, &signal));
    SHOW(signal);
    siginfo_t info;
    sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 77});
    CALL(sigwaitinfo(&set, &info));
    SHOW(info.si_value.sival_int);
    SHOW(info.si_code == SI_QUEUE);
    struct timespec brief = {0, 5 * MILLISECOND};
    CALL(sigtimedwait(&set, &info, &brief));
    pthread_create(&thread, NULL, wait_for_signal, &set);
    pause_for(10 * MILLISECOND);
    kill(getpid(), SIGUSR1);
    void *value;
    pthread_join(thread, &value);
    SHOW((long)value);

    section("signalfd");
    int fd = DONE(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
    struct signalfd_siginfo record;
    CALL(read(fd, &record, sizeof record));
    raise(SIGUSR1);
    CALL(read(fd, &record, 10));
    CALL(read(fd, &record, sizeof record));
    SHOW(record.ssi_signo);
    SHOW(record.ssi_pid == (uint32_t)getpid());
    sigprocmask(SIG_SETMASK, &old, NULL);

    section("broken pipe");
    close(pipes[0]);
    install(SIGPIPE, simple, 0);
    calls = 0;
    CALL(write(pipes[1], "x", 1));
    SHOW(calls);
    SHOW(last == SIGPIPE);
    install(SIGPIPE, SIG_IGN, 0);
    CALL(write(pipes[1], "x", 1));

    section("jumping out of a handler");
    install(SIGUSR1, jump, 0);
    int jumped = sigsetjmp(back, 1);
    if (!jumped)
        raise(SIGUSR1);
    SHOW(jumped);
    sigprocmask(SIG_SETMASK, NULL, &pending);
    SHOW(sigismember(&pending, SIGUSR1));

    section("abort can be caught");
    install(SIGABRT, jump, 0);
    jumped = sigsetjmp(back, 1);
    if (!jumped)
        abort();
    SHOW(jumped);
    return finish();
}
