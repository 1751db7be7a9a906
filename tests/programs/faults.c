/* Faults of the program as signals, and what their handlers are told. */
#include "check.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

static sigjmp_buf back;
static volatile char *expected;
static long page;

static void handler(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    printf("signal %d code %d address %s, exception %lld error %#llx cr2 %s\n", signal, info->si_code,
           info->si_addr == expected ? "as expected" : info->si_addr ? "other" : "none", registers[REG_TRAPNO],
           registers[REG_ERR], registers[REG_CR2] == (greg_t)expected ? "as expected" : "other");
    siglongjmp(back, 1);
}

#define TRY(address, action)                                                                                           \
    do {                                                                                                               \
        expected = (char *)(address);                                                                                  \
        printf("%s: ", #action);                                                                                       \
        if (sigsetjmp(back, 1) == 0) {                                                                                 \
            action;                                                                                                    \
            printf("no fault\n");                                                                                      \
        }                                                                                                              \
    } while (0)

static volatile int sink;

/* Goes on after the faulting instruction, by way of the saved registers. */
static void skip_two_bytes(int signal, siginfo_t *info, void *context) {
    (void)info;
    ucontext_t *user = context;
    printf("signal %d, skipped\n", signal);
    user->uc_mcontext.gregs[REG_RIP] += 2;
    user->uc_mcontext.gregs[REG_RBX] = 77;
}

/* Makes the page writable, so that the store succeeds when it is tried again. */
static void repair(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    void *start = (void *)((uintptr_t)info->si_addr & -page);
    mprotect(start, page, PROT_READ | PROT_WRITE);
}

#pragma GCC diagnostic ignored "-Winfinite-recursion"
static __attribute__((noinline)) int deep(int level) {
    volatile char space[4096];
    space[0] = (char)level;
    return deep(level + 1) + space[0];
}

static void install(int signal, void (*action)(int, siginfo_t *, void *), int flags) {
    struct sigaction new = {.sa_sigaction = action, .sa_flags = SA_SIGINFO | flags};
    sigaction(signal, &new, NULL);
}

int main(void) {
    page = sysconf(_SC_PAGESIZE);
    enter_work_directory();
    int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        install(signals[i], handler, SA_ONSTACK);
    stack_t stack = {.ss_sp = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                     .ss_size = 65536};
    MUST(sigaltstack(&stack, NULL));
    volatile char *map = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap((char *)map + 3 * page, page);
    mprotect((char *)map + 2 * page, page, PROT_NONE);
    mprotect((char *)map + page, page, PROT_READ);
    volatile char *volatile null = NULL;

    section("memory");
    TRY(map, map[0] = 1);
    TRY(map + page, sink = map[page]);
    TRY(map + page, map[page] = 1);
    TRY(map + page + 5, map[page + 5] = 1);
    TRY(map + 2 * page, sink = map[2 * page]);
    TRY(map + 3 * page, sink = map[3 * page]);
    TRY(map + 3 * page, map[3 * page] = 1);
    TRY(null, sink = *null);
    TRY(null + 8, null[8] = 1);
    TRY(map, ((void (*)(void))map)());
    TRY(null, ((void (*)(void))null)());
    TRY(NULL, sink = *(volatile char *)0x8000000000000000);

    section("file mapping");
    int fd = MUST(open("short", O_CREAT | O_RDWR, 0600));
    MUST(write(fd, "x", 1));
    volatile char *file = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    TRY(file, sink = file[page - 1]);
    TRY(file + page, sink = file[page]);
    TRY(file + page, file[page] = 1);
    CALL(pread(fd, (char *)file + page, 1, 0));
    CALL(mprotect((char *)file, 2 * page, PROT_READ));
    TRY(file + page, sink = file[page]);
    CALL(mprotect((char *)file, 2 * page, PROT_READ | PROT_WRITE));
    TRY(file + page, sink = file[page]);
    MUST(ftruncate(fd, 2 * page));
    TRY(file + page, file[page] = 'g');
    char grown = 0;
    CALL(pread(fd, &grown, 1, page));
    SHOW(grown);
    volatile char *volatile copy = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    TRY(copy + page, SHOW(copy[page]));
    TRY(copy + 2 * page, sink = copy[2 * page]);
    copy[0] = 'c';
    copy = mremap((char *)copy, 4 * page, 8 * page, MREMAP_MAYMOVE);
    SHOW(copy[0]);
    SHOW(copy[page]);
    TRY(copy + 2 * page, sink = copy[2 * page]);
    TRY(copy + 7 * page, sink = copy[7 * page]);
    MUST(ftruncate(fd, 3 * page));
    TRY(copy + 2 * page, SHOW(copy[2 * page]));
    TRY(copy + 3 * page, sink = copy[3 * page]);

    section("instructions");
    TRY(NULL, __asm__ volatile("ud2"));
    TRY(NULL, __asm__ volatile("hlt"));
    TRY(NULL, __asm__ volatile("int3"));
    TRY(NULL, __asm__ volatile("int $0x70"));
    TRY(NULL, __asm__ volatile("xor %%edx, %%edx; xor %%ecx, %%ecx; mov $1, %%eax; div %%ecx" ::: "eax", "ecx", "edx"));

    section("after an exception");
    install(SIGUSR1, handler, 0);
    TRY(NULL, raise(SIGUSR1));

    section("continuing");
    install(SIGILL, skip_two_bytes, 0);
    long value = 5;
    __asm__ volatile("ud2" : "+b"(value));
    SHOW(value);
    install(SIGSEGV, repair, 0);
    map[page] = 42;
    SHOW(map[page]);
    map[2 * page + 1] = 43;
    SHOW(map[2 * page + 1]);

    section("stack overflow");
    install(SIGSEGV, handler, SA_ONSTACK);
    expected = (char *)-1;
    if (sigsetjmp(back, 1) == 0)
        SHOW(deep(0));

    section("many faults");
    install(SIGSEGV, repair, 0);
    int faults = 0;
    for (int i = 0; i < 2000; i++) {
        mprotect((char *)map, page, PROT_READ);
        map[0] = (char)i;
        faults++;
    }
    SHOW(faults);
    return finish();
}
