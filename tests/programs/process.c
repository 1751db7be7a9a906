/* The process as the program sees it: identity, limits, arguments, environment, auxiliary vector, /proc. */
#include "check.h"
#include <elf.h>
#include <grp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>

extern char **environ;

static long read_file(const char *path, char *buffer, size_t size) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) {
        printf("%s: %s\n", path, error_name(errno));
        return -1;
    }
    size_t total = 0;
    for (ssize_t count; total < size - 1 && (count = read(fd, buffer + total, size - 1 - total)) > 0;)
        total += count;
    buffer[total] = 0;
    close(fd);
    return (long)total;
}

static int has_line(const char *text, const char *start) {
    for (const char *line = text; line; line = strchr(line, '\n')) {
        if (*line == '\n')
            line++;
        if (strncmp(line, start, strlen(start)) == 0)
            return 1;
    }
    return 0;
}

static void *slack(void *unused) {
    CALL(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    CALL(prctl(PR_SET_TIMERSLACK, 70, 0, 0, 0));
    CALL(prctl(PR_SET_TIMERSLACK, 0, 0, 0, 0));
    CALL(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    return unused;
}

int main(int argc, char **argv) {
    static char buffer[200000];
    (void)argc;

    section("identity");
    SHOW(getpid() > 0);
    SHOW(getppid() >= 0);
    SHOW(syscall(SYS_gettid) == getpid());
    SHOW(getuid());
    SHOW(geteuid());
    SHOW(getgid());
    SHOW(getegid());
    uid_t real, effective, saved;
    CALL(getresuid(&real, &effective, &saved));
    SHOW(saved);
    CALL(getpgid(0) == getpgrp());
    CALL(getsid(0) >= 0);
    CALL(getpriority(PRIO_PROCESS, 0));
    CALL(setpriority(PRIO_PROCESS, 0, 5));
    CALL(getpriority(PRIO_PROCESS, getpid()));
    CALL(nice(100));
    CALL(getpriority(PRIO_PROCESS, 0));
    CALL(setpriority(PRIO_PROCESS, 999999, 1));
    CALL(setpriority(PRIO_PGRP, 999999, 1));
    CALL(setpriority(9, 0, 1));
    CALL(getpriority(9, 0));
    struct utsname name;
    CALL(uname(&name));
    printf("%s %s\n", name.sysname, name.machine);
    SHOW(strlen(name.nodename) > 0);
    SHOW(atoi(name.release) >= 4);
    CALL(gethostname(buffer, sizeof buffer));
    SHOW(strcmp(buffer, name.nodename));
    CALL(prctl(PR_SET_NAME, "differential-program"));
    CALL(prctl(PR_GET_NAME, buffer));
    printf("%s\n", buffer);
    CALL(prctl(PR_SET_NAME, "n\xff\xfe\xc3"));
    CALL(prctl(PR_GET_NAME, buffer));
    SHOW(memcmp(buffer, "n\xff\xfe\xc3", 5));
    SHOW(read_file("/proc/self/comm", buffer, sizeof buffer));
    SHOW(memcmp(buffer, "n\xff\xfe\xc3\n", 5));
    memset(buffer, 'x', 10000);
    CALL(prctl(PR_SET_NAME, buffer));
    CALL(prctl(PR_SET_NAME, "differential-program"));
    CALL(prctl(PR_SET_NAME, 8));
    CALL(prctl(PR_GET_NAME, 8));
    CALL(prctl(987654));

    section("process controls");
    CALL(prctl(PR_GET_DUMPABLE, 5, 5, 5, 5));
    CALL(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
    CALL(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0));
    CALL(prctl(PR_SET_DUMPABLE, 2, 0, 0, 0));
    CALL(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
    CALL(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0));
    CALL(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    CALL(prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0));
    CALL(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    pthread_t thread;
    pthread_create(&thread, NULL, slack, NULL);
    pthread_join(thread, NULL);
    CALL(prctl(PR_SET_TIMERSLACK, 0, 0, 0, 0));
    CALL(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    SHOW(syscall(SYS_prctl, PR_SET_TIMERSLACK, 5000000000, 0, 0, 0));
    SHOW(syscall(SYS_prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0));
    CALL(prctl(PR_GET_NO_NEW_PRIVS, 1, 0, 0, 0));
    CALL(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0));
    CALL(prctl(PR_SET_NO_NEW_PRIVS, 1, 1, 0, 0));
    CALL(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    CALL(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    SHOW(read_file("/proc/self/status", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "NoNewPrivs:\t1\n"));
    int control = -1;
    CALL(prctl(PR_GET_PDEATHSIG, &control));
    SHOW(control);
    CALL(prctl(PR_SET_PDEATHSIG, 65));
    CALL(prctl(PR_SET_PDEATHSIG, SIGUSR1));
    CALL(prctl(PR_GET_PDEATHSIG, &control));
    SHOW(control);
    CALL(prctl(PR_SET_CHILD_SUBREAPER, 7));
    CALL(prctl(PR_GET_CHILD_SUBREAPER, &control));
    SHOW(control);
    CALL(prctl(PR_SET_CHILD_SUBREAPER, 0));
    CALL(prctl(PR_GET_CHILD_SUBREAPER, &control));
    SHOW(control);
    CALL(prctl(PR_GET_KEEPCAPS));
    CALL(prctl(PR_SET_KEEPCAPS, 0));
    CALL(prctl(PR_SET_KEEPCAPS, 2));
    CALL(prctl(PR_SET_THP_DISABLE, 1, 1, 0, 0));
    CALL(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    CALL(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
    CALL(prctl(PR_GET_THP_DISABLE, 1, 0, 0, 0));
    CALL(prctl(PR_CAPBSET_READ, 40));
    CALL(prctl(PR_CAPBSET_READ, 1000));
    CALL(prctl(PR_GET_SECUREBITS));

    section("limits");
    struct rlimit limit;
    CALL(getrlimit(RLIMIT_NOFILE, &limit));
    SHOW(limit.rlim_cur >= 256 && limit.rlim_max >= limit.rlim_cur);
    limit.rlim_cur = 64;
    CALL(setrlimit(RLIMIT_NOFILE, &limit));
    CALL(getrlimit(RLIMIT_NOFILE, &limit));
    SHOW(limit.rlim_cur);
    int opened = 0, last = -1;
    for (int fd; opened < 100 && (fd = open("/dev/null", O_RDONLY)) >= 0; opened++)
        last = fd;
    printf("%s\n", error_name(errno));
    SHOW(last);
    for (int fd = 3; fd <= last; fd++)
        close(fd);
    CALL(dup2(0, 64));
    CALL(getrlimit(RLIMIT_STACK, &limit));
    SHOW(limit.rlim_cur >= 1 << 20);
    CALL(getrlimit(99, &limit));
    limit = (struct rlimit){10, 5};
    CALL(setrlimit(RLIMIT_CORE, &limit));

    section("scheduling");
    cpu_set_t cpus;
    CALL(sched_getaffinity(0, sizeof cpus, &cpus));
    SHOW(CPU_COUNT(&cpus) >= 1);
    SHOW(sysconf(_SC_NPROCESSORS_ONLN) >= 1);
    CALL(sched_yield());
    CALL(sched_getscheduler(0));
    CALL(sched_setparam(0, &(struct sched_param){0}));
    CALL(sched_setparam(0, &(struct sched_param){1}));
    SHOW(sched_getcpu() >= 0);
    SHOW(sched_get_priority_max(SCHED_FIFO));
    SHOW(sched_get_priority_min(SCHED_FIFO));

    section("auxiliary vector");
    SHOW(getauxval(AT_PAGESZ));
    SHOW(getauxval(AT_UID));
    SHOW(getauxval(AT_SECURE));
    SHOW(getauxval(AT_CLKTCK));
    SHOW(getauxval(AT_PHDR) != 0);
    SHOW(getauxval(AT_PHENT) == sizeof(Elf64_Phdr));
    SHOW(getauxval(AT_RANDOM) != 0);
    SHOW(getauxval(AT_ENTRY) != 0);
    printf("%s\n", (const char *)getauxval(AT_PLATFORM));
    SHOW(strcmp((const char *)getauxval(AT_EXECFN), argv[0]) == 0 || strchr((const char *)getauxval(AT_EXECFN), '/') != NULL);

    section("environment");
    CALL(setenv("ADDED", "value", 1));
    printf("%s\n", getenv("ADDED"));
    SHOW(getenv("SURELY_NOT_SET") == NULL);
    SHOW(environ != NULL);

    section("randomness");
    unsigned char one[32] = {0}, two[32] = {0};
    CALL(getrandom(one, sizeof one, 0));
    CALL(getrandom(two, sizeof two, GRND_NONBLOCK));
    SHOW(memcmp(one, two, sizeof one) != 0);
    CALL(getrandom(one, sizeof one, 0x1000));
    CALL(getentropy(one, sizeof one));

    section("memory and load");
    struct sysinfo info;
    CALL(sysinfo(&info));
    SHOW(info.totalram > 0 && info.freeram > 0 && info.mem_unit > 0);
    SHOW(sysconf(_SC_PHYS_PAGES) > 0);

    section("/proc");
    CALL(readlink("/proc/self/exe", buffer, sizeof buffer) > 0 ? 0 : -1);
    SHOW(buffer[0]);
    struct stat status;
    CALL(stat("/proc/self/exe", &status));
    SHOW(S_ISREG(status.st_mode));
    SHOW(read_file("/proc/self/exe", buffer, 5));
    SHOW(memcmp(buffer, ELFMAG, 4));
    SHOW(read_file("/proc/self/comm", buffer, sizeof buffer));
    printf("%s", buffer);
    SHOW(read_file("/proc/self/maps", buffer, sizeof buffer) > 0);
    SHOW(strstr(buffer, "[stack]") != NULL);
    SHOW(strstr(buffer, "r-xp") != NULL);
    SHOW(strstr(buffer, "rwxp") == NULL);
    SHOW(read_file("/proc/self/cmdline", buffer, sizeof buffer) > 0);
    SHOW(strcmp(buffer, argv[0]));
    SHOW(read_file("/proc/self/status", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "Name:\tdifferential-pr\n"));
    SHOW(has_line(buffer, "Threads:\t1\n"));
    SHOW(has_line(buffer, "VmRSS:"));
    SHOW(has_line(buffer, "Uid:\t0\t0\t0\t0\n"));
    SHOW(read_file("/proc/self/stat", buffer, sizeof buffer) > 0);
    SHOW(strstr(buffer, "(differential-pr) R ") != NULL);
    SHOW(read_file("/proc/self/statm", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/self/environ", buffer, sizeof buffer) >= 0);
    SHOW(read_file("/proc/self/auxv", buffer, sizeof buffer) > 100);
    SHOW(read_file("/proc/self/limits", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "Max open files"));
    SHOW(read_file("/proc/meminfo", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "MemTotal:") && has_line(buffer, "MemAvailable:"));
    SHOW(read_file("/proc/cpuinfo", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "processor\t: 0"));
    SHOW(read_file("/proc/stat", buffer, sizeof buffer) > 0);
    SHOW(has_line(buffer, "cpu "));
    SHOW(read_file("/proc/uptime", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/loadavg", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/version", buffer, sizeof buffer) > 0);
    SHOW(strncmp(buffer, "Linux version ", 14));
    SHOW(read_file("/proc/filesystems", buffer, sizeof buffer) > 0);
    SHOW(strstr(buffer, "\ttmpfs") != NULL);
    SHOW(read_file("/proc/mounts", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/sys/kernel/ostype", buffer, sizeof buffer));
    SHOW(read_file("/proc/sys/net/core/somaxconn", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/sys/vm/overcommit_memory", buffer, sizeof buffer) > 0);
    SHOW(read_file("/proc/none", buffer, sizeof buffer));
    int fd = MUST(open("/dev/null", O_RDONLY));
    snprintf(buffer, sizeof buffer, "/proc/self/fd/%d", fd);
    char target[64] = "";
    CALL(readlink(buffer, target, sizeof target));
    printf("%s\n", target);
    DONE(open(buffer, O_RDWR));
    close(fd);
    CALL(readlink(buffer, target, sizeof target));
    CALL(access("/proc/1", F_OK));
    CALL(access("/sys", F_OK));
    CALL(access("/dev/fd/0", F_OK));

    section("identity given up");
    CALL(setgroups(0, NULL));
    CALL(getgroups(0, NULL));
    CALL(setresgid(1000, 1000, 1000));
    CALL(setresuid(1000, 1000, 1000));
    SHOW(getuid());
    SHOW(getegid());
    SHOW(prctl(PR_GET_DUMPABLE) == 1);
    CALL(prctl(PR_GET_PDEATHSIG, &control));
    SHOW(control);
    CALL(setuid(0));
    CALL(setgroups(1, (gid_t[]){1}));
    CALL(setpriority(PRIO_PROCESS, 0, 0));

    section("no children");
    CALL(waitpid(-1, NULL, 0));
    CALL(wait4(-1, NULL, WNOHANG, NULL));
    return finish();
}
