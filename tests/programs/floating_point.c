/* Exceptions of floating point arithmetic as signals. Argument: sse or x87. */
#include "check.h"
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static sigjmp_buf back;

static void handler(int signal, siginfo_t *info, void *context) {
    ucontext_t *user = context;
    printf("signal %d code %d, at the instruction %d, exception %lld error %#llx\n", signal, info->si_code,
           (greg_t)info->si_addr == user->uc_mcontext.gregs[REG_RIP], user->uc_mcontext.gregs[REG_TRAPNO],
           user->uc_mcontext.gregs[REG_ERR]);
    siglongjmp(back, 1);
}

/* Asks for exceptions of some kinds (bits of MXCSR, and the same of the x87 status word), and forgets earlier ones. A
   handler begins with none asked for, and that is kept when it jumps away. */
static void ask_for(int kinds) {
    unsigned mxcsr = 0x1f80u & ~((unsigned)kinds << 7);
    unsigned short control = 0x37f & ~kinds;
    __asm__ volatile("fninit; fldcw %0; ldmxcsr %1" ::"m"(control), "m"(mxcsr));
}

/* An x87 exception waits for the next instruction that looks. */
#define TRY(kinds, action)                                                                                             \
    do {                                                                                                               \
        printf("%s: ", #action);                                                                                       \
        if (sigsetjmp(back, 1) == 0) {                                                                                 \
            ask_for(kinds);                                                                                            \
            action;                                                                                                    \
            __asm__ volatile("fwait");                                                                                 \
            ask_for(0);                                                                                                \
            printf("no exception\n");                                                                                  \
        }                                                                                                              \
    } while (0)

/* The same in the arithmetic of a type, whose largest and smallest numbers are about these. */
#define COMPUTE(name, type, largest, smallest)                                                                         \
    static void name(int kind) {                                                                                       \
        volatile type zero = 0, one = 1, large = largest, small = smallest, three = 3, result;                         \
        TRY(kind, result = zero / zero);                                                                               \
        TRY(kind, result = one / zero);                                                                                \
        TRY(kind, result = large * large);                                                                             \
        TRY(kind, result = small * small);                                                                             \
        TRY(kind, result = one / three);                                                                               \
        (void)result;                                                                                                  \
    }
COMPUTE(sse, double, 1e308, 1e-308)
COMPUTE(x87, long double, 1e4932L, 1e-4932L)

int main(int count, char **arguments) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    MUST(sigaction(SIGFPE, &action, NULL));
    void (*compute)(int) = count > 1 && strcmp(arguments[1], "sse") == 0 ? sse : x87;
    /* Invalid operation, division by zero, overflow, underflow, inexact result, all. */
    static const int kinds[] = {0x01, 0x04, 0x08, 0x10, 0x20, 0x3d};
    for (volatile size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        printf("asked for %#x\n", kinds[i]);
        compute(kinds[i]);
    }
    return finish();
}
