/* How programs end, chosen by the first argument. Prints the state of buffers and handlers; the exit code is
 * compared too. */
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>

static void *volatile bad_address = (void *)8;

static void first(void) { printf("first registered, last run\n"); }
static void second(void) { printf("second registered, first run\n"); }

static void *exit_process(void *argument) {
    (void)argument;
    exit(7);
}

static void *sleep_long(void *argument) {
    (void)argument;
    pause_for(100000 * MILLISECOND);
    return NULL;
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "return";
    pthread_t thread;
    atexit(first);
    atexit(second);
    printf("%s\n", how);
    if (!strcmp(how, "return"))
        return finish();
    if (!strcmp(how, "exit"))
        exit(42);
    if (!strcmp(how, "immediately"))
        _exit(43);
    if (!strcmp(how, "large-code"))
        exit(256 + 9);
    if (!strcmp(how, "thread")) {
        pthread_create(&thread, NULL, exit_process, NULL);
        pthread_join(thread, NULL);
    }
    if (!strcmp(how, "others-run")) {
        for (int i = 0; i < 10; i++)
            pthread_create(&thread, NULL, sleep_long, NULL);
        return 5;
    }
    if (!strcmp(how, "main-thread-first")) {
        pthread_create(&thread, NULL, exit_process, NULL);
        syscall(SYS_exit, 0);
    }
    if (!strcmp(how, "abort"))
        abort();
    if (!strcmp(how, "fault"))
        *(volatile int *)bad_address = 1;
    if (!strcmp(how, "invalid"))
        __asm__ volatile("ud2");
    if (!strcmp(how, "terminate"))
        raise(SIGTERM);
    if (!strcmp(how, "kill"))
        raise(SIGKILL);
    return 99;
}
