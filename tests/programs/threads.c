/* Threads: starting, joining, mutexes, conditions, barriers, thread-local storage, cancelling. */
#include "check.h"
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/syscall.h>

#define THREADS 16
#define ROUNDS 2000

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static pthread_rwlock_t readers_writers = PTHREAD_RWLOCK_INITIALIZER;
static pthread_spinlock_t spin;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static sem_t semaphore;
static __thread int local = 5;
static long counter, total, once_runs, destroyed, cleaned;
static int turn;

static void *count(void *argument) {
    for (int i = 0; i < ROUNDS; i++) {
        pthread_mutex_lock(&mutex);
        counter++;
        pthread_mutex_unlock(&mutex);
        if (i % 100 == 0)
            sched_yield();
    }
    return (void *)((long)argument * 2);
}

static void *take_turns(void *argument) {
    int me = (int)(long)argument;
    for (int i = 0; i < 50; i++) {
        pthread_mutex_lock(&mutex);
        while (turn % 4 != me)
            pthread_cond_wait(&condition, &mutex);
        turn++;
        pthread_cond_broadcast(&condition);
        pthread_mutex_unlock(&mutex);
    }
    return NULL;
}

static void *meet(void *argument) {
    (void)argument;
    long serial = 0;
    for (int i = 0; i < 50; i++)
        if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD)
            serial++;
    __atomic_fetch_add(&total, serial, __ATOMIC_SEQ_CST);
    return NULL;
}

static void run_once(void) { once_runs++; }

static void destroy(void *value) { __atomic_fetch_add(&destroyed, (long)value, __ATOMIC_SEQ_CST); }

static void *locals(void *argument) {
    pthread_once(&once, run_once);
    local += (int)(long)argument;
    pthread_setspecific(key, argument);
    sched_yield();
    return (void *)(long)(local + (pthread_getspecific(key) == argument ? 100 : 0));
}

static void *consume(void *argument) {
    (void)argument;
    for (int i = 0; i < 100; i++)
        sem_wait(&semaphore);
    return NULL;
}

static void clean(void *argument) { cleaned += (long)argument; }

static void *wait_for_ever(void *argument) {
    (void)argument;
    pthread_cleanup_push(clean, (void *)7);
    for (;;)
        pause();
    pthread_cleanup_pop(0);
    return NULL;
}

static void *read_and_write(void *argument) {
    for (int i = 0; i < 200; i++) {
        if ((long)argument % 4 == 0) {
            pthread_rwlock_wrlock(&readers_writers);
            total++;
            pthread_rwlock_unlock(&readers_writers);
        } else {
            pthread_rwlock_rdlock(&readers_writers);
            pthread_rwlock_unlock(&readers_writers);
        }
        pthread_spin_lock(&spin);
        counter++;
        pthread_spin_unlock(&spin);
    }
    return NULL;
}

static void *detached(void *argument) {
    sem_post(argument);
    return NULL;
}

static void *leave(void *argument) {
    pthread_exit((char *)argument + 1);
}

static void *identities(void *argument) {
    pid_t *ids = argument;
    ids[0] = getpid();
    ids[1] = (pid_t)syscall(SYS_gettid);
    return NULL;
}

static void start(pthread_t *threads, int count_, void *(*function)(void *)) {
    for (long i = 0; i < count_; i++)
        if (pthread_create(&threads[i], NULL, function, (void *)i))
            MUST(-1);
}

static long join(pthread_t *threads, int count_) {
    long sum = 0;
    for (int i = 0; i < count_; i++) {
        void *value;
        pthread_join(threads[i], &value);
        sum += (long)value;
    }
    return sum;
}

int main(void) {
    pthread_t threads[200];

    section("mutex");
    start(threads, THREADS, count);
    SHOW(join(threads, THREADS));
    SHOW(counter);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_t checked;
    pthread_mutex_init(&checked, &attributes);
    PTHREAD(pthread_mutex_lock(&checked));
    PTHREAD(pthread_mutex_lock(&checked));
    PTHREAD(pthread_mutex_trylock(&checked));
    PTHREAD(pthread_mutex_unlock(&checked));
    PTHREAD(pthread_mutex_unlock(&checked));
    pthread_mutex_lock(&mutex);
    struct timespec soon;
    clock_gettime(CLOCK_REALTIME, &soon);
    soon.tv_nsec += 20000000;
    if (soon.tv_nsec >= 1000000000)
        soon.tv_sec++, soon.tv_nsec -= 1000000000;
    PTHREAD(pthread_mutex_timedlock(&mutex, &soon));
    PTHREAD(pthread_cond_timedwait(&condition, &mutex, &soon));
    pthread_mutex_unlock(&mutex);

    section("condition");
    start(threads, 4, take_turns);
    join(threads, 4);
    SHOW(turn);

    section("barrier");
    pthread_barrier_init(&barrier, NULL, THREADS);
    start(threads, THREADS, meet);
    join(threads, THREADS);
    SHOW(total);

    section("thread-local storage");
    PTHREAD(pthread_key_create(&key, destroy));
    start(threads, THREADS, locals);
    SHOW(join(threads, THREADS));
    SHOW(local);
    SHOW(once_runs);
    SHOW(destroyed);

    section("semaphore");
    sem_init(&semaphore, 0, 0);
    start(threads, 4, consume);
    for (int i = 0; i < 400; i++)
        sem_post(&semaphore);
    join(threads, 4);
    CALL(sem_trywait(&semaphore));

    section("readers and writers");
    total = counter = 0;
    pthread_spin_init(&spin, PTHREAD_PROCESS_PRIVATE);
    start(threads, 8, read_and_write);
    join(threads, 8);
    SHOW(total);
    SHOW(counter);

    section("cancelling");
    start(threads, 1, wait_for_ever);
    pause_for(5 * MILLISECOND);
    PTHREAD(pthread_cancel(threads[0]));
    void *value;
    PTHREAD(pthread_join(threads[0], &value));
    SHOW(value == PTHREAD_CANCELED);
    SHOW(cleaned);

    section("detached and exiting");
    pthread_attr_t detachable;
    pthread_attr_init(&detachable);
    pthread_attr_setdetachstate(&detachable, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&detachable, 128 * 1024);
    for (int i = 0; i < 50; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &detachable, detached, &semaphore))
            MUST(-1);
    }
    for (int i = 0; i < 50; i++)
        sem_wait(&semaphore);
    pthread_create(&threads[0], NULL, leave, (void *)41);
    pthread_join(threads[0], &value);
    SHOW((long)value);

    section("identities");
    pid_t ids[2];
    pthread_create(&threads[0], NULL, identities, ids);
    pthread_join(threads[0], NULL);
    SHOW(ids[0] == getpid());
    SHOW(ids[1] != ids[0]);
    SHOW(syscall(SYS_gettid) == getpid());

    section("many");
    counter = 0;
    for (int round = 0; round < 5; round++) {
        start(threads, 200, locals);
        join(threads, 200);
        counter += 200;
    }
    SHOW(counter);
    return finish();
}
