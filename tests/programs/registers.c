/* Registers survive what happens to the program: calls, signals, faults and other threads. */
#include "check.h"
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>

static volatile sig_atomic_t signals;

/* A handler that uses the vector registers itself. */
static void handler(int signal) {
    (void)signal;
    signals++;
    volatile double values[8];
    for (int i = 0; i < 8; i++)
        values[i] = signals * 1.5 + i;
    (void)values[7];
    __asm__ volatile("pxor %%xmm0, %%xmm0; pxor %%xmm7, %%xmm7; pxor %%xmm15, %%xmm15" ::: "xmm0", "xmm7", "xmm15");
    if (__builtin_cpu_supports("avx"))
        __asm__ volatile("vzeroall" :::);
}

/* All general registers but rax, rcx and r11 keep their values over a call. */
static int general_registers(void) {
    uint64_t in[12], out[12], rsp_before, rsp_after;
    for (int i = 0; i < 12; i++)
        in[i] = UINT64_C(0x1111111111111111) * (i + 1);
    __asm__ volatile("push %%rbp\n\t"
                     "push %%rbx\n\t"
                     "mov %[in], %%rax\n\t"
                     "push %[out]\n\t"
                     "mov 0(%%rax), %%rbx\n\t"
                     "mov 8(%%rax), %%rdx\n\t"
                     "mov 16(%%rax), %%rsi\n\t"
                     "mov 24(%%rax), %%rdi\n\t"
                     "mov 32(%%rax), %%rbp\n\t"
                     "mov 40(%%rax), %%r8\n\t"
                     "mov 48(%%rax), %%r9\n\t"
                     "mov 56(%%rax), %%r10\n\t"
                     "mov 64(%%rax), %%r12\n\t"
                     "mov 72(%%rax), %%r13\n\t"
                     "mov 80(%%rax), %%r14\n\t"
                     "mov 88(%%rax), %%r15\n\t"
                     "mov $39, %%eax\n\t"
                     "syscall\n\t"
                     "pop %%rax\n\t"
                     "mov %%rbx, 0(%%rax)\n\t"
                     "mov %%rdx, 8(%%rax)\n\t"
                     "mov %%rsi, 16(%%rax)\n\t"
                     "mov %%rdi, 24(%%rax)\n\t"
                     "mov %%rbp, 32(%%rax)\n\t"
                     "mov %%r8, 40(%%rax)\n\t"
                     "mov %%r9, 48(%%rax)\n\t"
                     "mov %%r10, 56(%%rax)\n\t"
                     "mov %%r12, 64(%%rax)\n\t"
                     "mov %%r13, 72(%%rax)\n\t"
                     "mov %%r14, 80(%%rax)\n\t"
                     "mov %%r15, 88(%%rax)\n\t"
                     "pop %%rbx\n\t"
                     "pop %%rbp\n\t"
                     :
                     : [in] "r"(in), [out] "r"(out)
                     : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
    (void)rsp_before, (void)rsp_after;
    return memcmp(in, out, sizeof in) == 0;
}

static int vector_registers(long number, long first, long second) {
    double in[4] = {1.25, -2.5, 3.75, 1e300}, out[4];
    long result;
    __asm__ volatile("movups (%[in]), %%xmm3\n\t"
                     "movups 16(%[in]), %%xmm14\n\t"
                     "syscall\n\t"
                     "movups %%xmm3, (%[out])\n\t"
                     "movups %%xmm14, 16(%[out])\n\t"
                     : "=a"(result)
                     : "0"(number), "D"(first), "S"(second), [in] "r"(in), [out] "r"(out)
                     : "rcx", "r11", "xmm3", "xmm14", "memory");
    return memcmp(in, out, sizeof in) == 0;
}

__attribute__((target("avx"))) static int wide_registers(long number, long first, long second) {
    double in[4] = {1.25, -2.5, 3.75, 1e300}, out[4];
    long result;
    __asm__ volatile("vmovups (%[in]), %%ymm5\n\t"
                     "syscall\n\t"
                     "vmovups %%ymm5, (%[out])\n\t"
                     "vzeroupper\n\t"
                     : "=a"(result)
                     : "0"(number), "D"(first), "S"(second), [in] "r"(in), [out] "r"(out)
                     : "rcx", "r11", "xmm5", "memory");
    return memcmp(in, out, sizeof in) == 0;
}

/* Computes for a while with values that only live in registers. */
static double compute(int rounds, double start) {
    double a = start, b = 1.0, c = 0.5, d = start * 2;
    for (int i = 0; i < rounds; i++) {
        a = a * 1.0000001 + b * 0.25;
        b = b * 0.9999999 + c * 0.125;
        c = c + d * 1e-9;
        d = d * 0.9999998 + 1e-3;
    }
    return a + b + c + d;
}

static void *compute_in_thread(void *argument) {
    double *place = argument;
    *place = compute(2000000, *place);
    return NULL;
}

/* The red zone below the stack pointer survives signals. */
static int red_zone(void) {
    long ok = 1;
    __asm__ volatile("movq $0x1234, -8(%%rsp)\n\t"
                     "movq $0x5678, -128(%%rsp)\n\t"
                     "mov $100000000, %%rcx\n\t"
                     "1: cmpq $0x1234, -8(%%rsp)\n\t"
                     "jne 2f\n\t"
                     "cmpq $0x5678, -128(%%rsp)\n\t"
                     "jne 2f\n\t"
                     "cmpl $0, %[signals]\n\t"
                     "jne 3f\n\t"
                     "dec %%rcx\n\t"
                     "jnz 1b\n\t"
                     "2: mov $0, %[ok]\n\t"
                     "3:\n\t"
                     : [ok] "+r"(ok)
                     : [signals] "m"(signals)
                     : "rcx", "cc", "memory");
    return (int)ok;
}

int main(void) {
    signal(SIGALRM, handler);

    section("over calls");
    SHOW(general_registers());
    SHOW(vector_registers(SYS_getpid, 0, 0));
    SHOW(vector_registers(SYS_sched_yield, 0, 0));
    struct timespec brief = {0, 2000000};
    SHOW(vector_registers(SYS_nanosleep, (long)&brief, 0));
    if (__builtin_cpu_supports("avx")) {
        SHOW(wide_registers(SYS_getpid, 0, 0));
        SHOW(wide_registers(SYS_nanosleep, (long)&brief, 0));
    } else {
        /* The same lines on a machine without, which has nothing to lose. */
        printf("wide_registers(SYS_getpid, 0, 0) = 1\nwide_registers(SYS_nanosleep, (long)&brief, 0) = 1\n");
    }
    uint64_t flags;
    __asm__ volatile("std; mov $39, %%eax; syscall; pushfq; pop %0; cld" : "=r"(flags)::"rax", "rcx", "r11", "memory", "cc");
    SHOW((flags >> 10) & 1);
    uint64_t after, address;
    __asm__ volatile("mov $39, %%eax; syscall; 1: mov %%rcx, %0; lea 1b(%%rip), %1" : "=r"(after), "=r"(address)::"rax", "rcx", "r11");
    SHOW(after == address);

    section("over signals");
    double expected = compute(3000000, 1.5);
    struct itimerval often = {{0, 1000}, {0, 1000}};
    setitimer(ITIMER_REAL, &often, NULL);
    int same = 1;
    while (signals < 20)
        same &= compute(3000000, 1.5) == expected;
    SHOW(same);
    signals = 0;
    SHOW(red_zone());
    setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL);

    section("over other threads");
    double places[8];
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        places[i] = i;
        pthread_create(&threads[i], NULL, compute_in_thread, &places[i]);
    }
    same = 1;
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
        same &= places[i] == compute(2000000, i);
    }
    SHOW(same);

    section("control words");
    unsigned control;
    __asm__ volatile("stmxcsr %0" : "=m"(control));
    /* Without the sticky status bits, which depend on the computations before. */
    printf("%#x\n", control & ~0x3fu);
    unsigned short x87;
    __asm__ volatile("fnstcw %0" : "=m"(x87));
    printf("%#x\n", x87);
    unsigned rounded = (control & ~0x6000u) | 0x4000u;
    __asm__ volatile("ldmxcsr %0" ::"m"(rounded));
    sched_yield();
    pause_for(MILLISECOND);
    unsigned kept;
    __asm__ volatile("stmxcsr %0" : "=m"(kept));
    SHOW((kept & 0x6000u) == 0x4000u);
    __asm__ volatile("ldmxcsr %0" ::"m"(control));
    return finish();
}
