/* Directories: making, listing, walking, the calls that take a directory. */
#include "check.h"
#include <dirent.h>

static int compare(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static void list(const char *path) {
    char *names[600];
    int count = 0;
    DIR *directory = opendir(path);
    if (!directory) {
        printf("%s: %s\n", path, error_name(errno));
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        char line[300];
        snprintf(line, sizeof line, "%s%s", entry->d_name,
                 entry->d_type == DT_DIR ? "/" : entry->d_type == DT_LNK ? "@" : entry->d_type == DT_FIFO ? "|" : "");
        names[count++] = strdup(line);
    }
    closedir(directory);
    qsort(names, count, sizeof *names, compare);
    printf("%s has %d:", path, count);
    for (int i = 0; i < count; i++) {
        if (count < 20)
            printf(" %s", names[i]);
        free(names[i]);
    }
    printf("\n");
}

int main(void) {
    struct stat status;
    char buffer[4096];
    enter_work_directory();

    section("mkdir and rmdir");
    CALL(mkdir("a", 0755));
    CALL(mkdir("a", 0755));
    CALL(mkdir("x/y", 0755));
    CALL(mkdir("a/b", 0700));
    CALL(mkdir("a/b/c/", 0700));
    CALL(stat("a", &status));
    SHOW(status.st_mode & 07777);
    SHOW(S_ISDIR(status.st_mode));
    CALL(rmdir("a"));
    CALL(rmdir("none"));
    CALL(unlink("a"));
    CALL(rmdir("a/b/c/."));
    CALL(rmdir("a/b/c"));
    list("a");
    list("none");

    section("types in lists");
    close(MUST(open("a/file", O_CREAT | O_WRONLY, 0600)));
    CALL(symlink("file", "a/link"));
    CALL(mkfifo("a/pipe", 0600));
    CALL(rmdir("a/file"));
    list("a");
    CALL(stat("a/pipe", &status));
    SHOW(S_ISFIFO(status.st_mode));

    section("many");
    CALL(mkdir("many", 0755));
    for (int i = 0; i < 500; i++) {
        snprintf(buffer, sizeof buffer, "many/%d", i);
        close(MUST(open(buffer, O_CREAT | O_WRONLY, 0600)));
    }
    list("many");
    /* Each entry once, though entries go while they are read. */
    DIR *directory = opendir("many");
    int seen = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.')
            continue;
        seen++;
        MUST(unlinkat(dirfd(directory), entry->d_name, 0));
    }
    SHOW(seen);
    rewinddir(directory);
    seen = 0;
    while (readdir(directory))
        seen++;
    SHOW(seen);
    closedir(directory);
    CALL(rmdir("many"));

    section("current directory");
    CALL(chdir("a/b"));
    char *path = getcwd(buffer, sizeof buffer);
    printf("%s\n", path + strlen(work_directory));
    CALL(chdir(".."));
    CALL(chdir("file"));
    CALL(chdir("none"));
    int fd = MUST(open("b", O_RDONLY | O_DIRECTORY));
    CALL(fchdir(fd));
    CALL(access("../file", F_OK));
    errno = 0;
    SHOW(getcwd(buffer, 3) == NULL);
    printf("%s\n", error_name(errno));
    CALL(chdir(work_directory));

    section("calls relative to a directory");
    int a = MUST(open("a", O_PATH | O_DIRECTORY));
    CALL(mkdirat(a, "deep", 0755));
    DONE(openat(a, "deep/new", O_CREAT | O_WRONLY, 0600));
    CALL(fstatat(a, "link", &status, AT_SYMLINK_NOFOLLOW));
    SHOW(S_ISLNK(status.st_mode));
    CALL(fstatat(a, "", &status, AT_EMPTY_PATH));
    SHOW(S_ISDIR(status.st_mode));
    CALL(fstatat(a, "", &status, 0));
    CALL(renameat(a, "deep/new", a, "new"));
    CALL(linkat(a, "new", a, "linked", 0));
    CALL(symlinkat("new", a, "soft"));
    CALL(readlinkat(a, "soft", buffer, sizeof buffer));
    CALL(faccessat(a, "soft", R_OK, 0));
    CALL(unlinkat(a, "deep", 0));
    CALL(unlinkat(a, "deep", AT_REMOVEDIR));
    CALL(openat(fd, "../file", O_RDONLY) >= 0);
    CALL(openat(99, "file", O_RDONLY));
    int file = MUST(open("a/file", O_RDONLY));
    CALL(openat(file, "x", O_RDONLY));
    CALL(read(a, buffer, 1));
    CALL(read(fd, buffer, 1));
    CALL(fchdir(file));
    list("a");

    section("moving directories");
    CALL(mkdir("p", 0755));
    CALL(mkdir("p/q", 0755));
    CALL(rename("p", "p/q/r"));
    CALL(rename("p", "a/file"));
    CALL(rename("a/file", "p"));
    CALL(rename("p", "a"));
    CALL(rename("p/q", "a/b"));
    list("a/b");
    list("p");
    CALL(rename("p", "s"));
    CALL(stat("s", &status));
    SHOW(status.st_nlink);
    CALL(rename("a/b", "s/b"));
    CALL(stat("s", &status));
    SHOW(status.st_nlink);

    section("a removed current directory");
    CALL(chdir("s/b"));
    CALL(rmdir("../b"));
    errno = 0;
    SHOW(getcwd(buffer, sizeof buffer) == NULL);
    printf("%s\n", error_name(errno));
    CALL(open("new", O_CREAT | O_WRONLY, 0600));
    CALL(chdir(work_directory));

    section("paths");
    CALL(stat("a//file", &status));
    CALL(stat("./a/../a/file", &status));
    CALL(stat("a/file/", &status));
    CALL(stat("a/file/..", &status));
    CALL(stat("/..", &status));
    memset(buffer, 'a', sizeof buffer);
    buffer[sizeof buffer - 1] = 0;
    CALL(stat(buffer, &status));
    for (int i = 0; i < 4094; i += 2)
        memcpy(buffer + i, "./", 2);
    buffer[4094] = 0;
    CALL(stat(buffer, &status));

    return finish();
}
