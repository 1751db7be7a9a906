/* The futex call itself: waiting, waking, timeouts, bit sets, requeueing, robust lists. */
#include "check.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>

static long futex(uint32_t *word, int operation, uint32_t value, const void *timeout, uint32_t *second, uint32_t third) {
    return syscall(SYS_futex, word, operation, value, timeout, second, third);
}

static uint32_t word, other, waiting;

static void *wait_plain(void *argument) {
    (void)argument;
    __atomic_fetch_add(&waiting, 1, __ATOMIC_SEQ_CST);
    long result;
    do
        result = futex(&word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    while (result == -1 && errno == EINTR);
    return (void *)result;
}

static void *wait_bits(void *argument) {
    __atomic_fetch_add(&waiting, 1, __ATOMIC_SEQ_CST);
    long result = futex(&word, FUTEX_WAIT_BITSET_PRIVATE, 0, NULL, NULL, (uint32_t)(long)argument);
    return (void *)result;
}

/* Until that many threads are about to sleep, and most likely do. */
static void wait_for_waiters(uint32_t count) {
    while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) != count)
        pause_for(MILLISECOND);
    pause_for(20 * MILLISECOND);
}

static void *die_with_lock(void *argument) {
    pthread_mutex_lock(argument);
    return NULL;
}

int main(void) {
    pthread_t threads[8];
    struct timespec brief = {0, 20 * MILLISECOND};

    section("immediate answers");
    word = 1;
    CALL(futex(&word, FUTEX_WAIT, 0, NULL, NULL, 0));
    CALL(futex(&word, FUTEX_WAKE, 1, NULL, NULL, 0));
    CALL(futex((uint32_t *)((char *)&word + 1), FUTEX_WAIT, 0, NULL, NULL, 0));
    CALL(futex(NULL, FUTEX_WAIT, 0, NULL, NULL, 0));
    CALL(futex(&word, 99, 0, NULL, NULL, 0));
    CALL(futex(&word, FUTEX_WAIT_BITSET, 1, NULL, NULL, 0));

    section("timeouts");
    int64_t before = now(CLOCK_MONOTONIC);
    CALL(futex(&word, FUTEX_WAIT_PRIVATE, 1, &brief, NULL, 0));
    SHOW(now(CLOCK_MONOTONIC) - before >= 20 * MILLISECOND);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    CALL(futex(&word, FUTEX_WAIT_BITSET_PRIVATE, 1, &until, NULL, ~0u));
    clock_gettime(CLOCK_REALTIME, &until);
    CALL(futex(&word, FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME, 1, &until, NULL, ~0u));
    struct timespec wrong = {0, 1000000000};
    CALL(futex(&word, FUTEX_WAIT_PRIVATE, 1, &wrong, NULL, 0));

    section("waking");
    word = 0;
    for (int i = 0; i < 6; i++)
        pthread_create(&threads[i], NULL, wait_plain, NULL);
    wait_for_waiters(6);
    CALL(futex(&word, FUTEX_WAKE_PRIVATE, 2, NULL, NULL, 0));
    CALL(futex(&word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
    CALL(futex(&word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
    for (int i = 0; i < 6; i++) {
        void *result;
        pthread_join(threads[i], &result);
        SHOW((long)result);
    }

    section("bit sets");
    waiting = 0;
    for (long i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, wait_bits, (void *)(1L << i));
    wait_for_waiters(4);
    CALL(futex(&word, FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, NULL, NULL, 1 << 6));
    CALL(futex(&word, FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, NULL, NULL, 5));
    CALL(futex(&word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);

    section("requeue");
    waiting = 0;
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, wait_plain, NULL);
    wait_for_waiters(4);
    CALL(futex(&word, FUTEX_CMP_REQUEUE_PRIVATE, 1, (void *)INT_MAX, &other, 99));
    CALL(futex(&word, FUTEX_CMP_REQUEUE_PRIVATE, 1, (void *)2, &other, 0));
    CALL(futex(&other, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
    CALL(futex(&word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);

    section("wake and operate");
    waiting = 0;
    pthread_create(&threads[0], NULL, wait_plain, NULL);
    wait_for_waiters(1);
    other = 5;
    CALL(futex(&word, FUTEX_WAKE_OP_PRIVATE, 1, (void *)1, &other, FUTEX_OP(FUTEX_OP_ADD, 3, FUTEX_OP_CMP_EQ, 5)));
    SHOW(other);
    pthread_join(threads[0], NULL);

    section("robust mutex");
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_t mutex;
    pthread_mutex_init(&mutex, &attributes);
    pthread_create(&threads[0], NULL, die_with_lock, &mutex);
    pthread_join(threads[0], NULL);
    PTHREAD(pthread_mutex_lock(&mutex));
    PTHREAD(pthread_mutex_consistent(&mutex));
    PTHREAD(pthread_mutex_unlock(&mutex));
    PTHREAD(pthread_mutex_lock(&mutex));
    return finish();
}
