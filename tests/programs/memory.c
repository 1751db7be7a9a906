/* Memory: mapping, protecting, moving and giving back. */
#include "check.h"
#include <pthread.h>
#include <sys/mman.h>

static long page;

static int all_bytes(const char *start, size_t length, char value) {
    for (size_t i = 0; i < length; i++)
        if (start[i] != value)
            return 0;
    return 1;
}

/* Whether a page is mapped, by asking a call that says so. */
static int mapped(void *address) {
    unsigned char state;
    return mincore(address, page, &state) == 0;
}

int main(void) {
    page = sysconf(_SC_PAGESIZE);
    SHOW(page);
    enter_work_directory();

    section("anonymous");
    char *map = mmap(NULL, 16 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    SHOW(map != MAP_FAILED && (uintptr_t)map % page == 0);
    SHOW(all_bytes(map, 16 * page, 0));
    memset(map, 7, 16 * page);
    SHOW(all_bytes(map, 16 * page, 7));
    CALL(munmap(map + 4 * page, 2 * page));
    SHOW(mapped(map + 3 * page));
    SHOW(mapped(map + 4 * page));
    SHOW(mapped(map + 6 * page));
    CALL(munmap(map + 4 * page, 2 * page));
    CALL(munmap(map + 1, page));
    CALL(munmap(map, 0));

    section("fixed");
    char *same = mmap(map + 4 * page, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    SHOW(same == map + 4 * page);
    SHOW(all_bytes(same, page, 0));
    SHOW(all_bytes(map, 4 * page, 7));
    same = mmap(map, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    SHOW(same == map && all_bytes(map, page, 0) && map[page] == 7);
    errno = 0;
    SHOW(mmap(map, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED);
    printf("%s\n", error_name(errno));
    same = mmap(map + 5 * page, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    SHOW(same == map + 5 * page);
    CALL(mmap(map + 1, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? -1 : 0);
    CALL(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0);
    CALL(mmap(NULL, page, PROT_READ, MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0);
    CALL(mmap(NULL, page, PROT_READ, MAP_PRIVATE, 99, 0) == MAP_FAILED ? -1 : 0);
    CALL(mmap(NULL, SIZE_MAX / 2, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0);

    section("protect");
    CALL(mprotect(map, 2 * page, PROT_READ));
    CALL(mprotect(map, 2 * page, PROT_READ | PROT_WRITE));
    SHOW(map[page]);
    CALL(mprotect(map + 1, page, PROT_READ));
    CALL(munmap(map + 8 * page, page));
    CALL(mprotect(map + 7 * page, 3 * page, PROT_READ));
    CALL(mprotect(map + 9 * page, page, PROT_READ | PROT_WRITE));
    map[9 * page] = 1;

    section("advice");
    memset(map, 5, 4 * page);
    CALL(madvise(map, 4 * page, MADV_WILLNEED));
    CALL(madvise(map, 4 * page, MADV_NORMAL));
    CALL(madvise(map, 2 * page, MADV_DONTNEED));
    SHOW(all_bytes(map, 2 * page, 0));
    SHOW(all_bytes(map + 2 * page, 2 * page, 5));
    CALL(madvise(map + 1, page, MADV_DONTNEED));
    CALL(madvise(map, page, 9999));
    CALL(madvise(map + 8 * page, page, MADV_DONTNEED));
    CALL(madvise(map, 2 * page, MADV_FREE));

    section("move and resize");
    char *grown = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(grown, 3, 4 * page);
    grown = mremap(grown, 4 * page, 64 * page, MREMAP_MAYMOVE);
    SHOW(grown != MAP_FAILED);
    SHOW(all_bytes(grown, 4 * page, 3));
    SHOW(all_bytes(grown + 4 * page, 60 * page, 0));
    grown[63 * page] = 9;
    char *shrunk = mremap(grown, 64 * page, 2 * page, 0);
    SHOW(shrunk == grown);
    SHOW(mapped(grown + 2 * page));
    char *place = mmap(NULL, 8 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *moved = mremap(grown, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, place + 2 * page);
    SHOW(moved == place + 2 * page);
    SHOW(all_bytes(moved, 2 * page, 3));
    SHOW(mapped(grown));
    CALL(mremap(moved + 1, page, page, 0) == MAP_FAILED ? -1 : 0);
    CALL(mremap(moved, page, 0, 0) == MAP_FAILED ? -1 : 0);
    CALL(mremap(moved, 2 * page, 8 * page, 0) == MAP_FAILED ? -1 : 0);
    CALL(mremap(grown, page, 2 * page, MREMAP_MAYMOVE) == MAP_FAILED ? -1 : 0);

    section("break");
    char *end = sbrk(0);
    SHOW(brk(end + 10 * page) == 0);
    SHOW((char *)sbrk(0) == end + 10 * page);
    SHOW(all_bytes(end, 10 * page, 0));
    memset(end, 1, 10 * page);
    SHOW(brk(end + page) == 0);
    SHOW(brk(end + 10 * page) == 0);
    SHOW(all_bytes(end + 2 * page, 8 * page, 0));
    SHOW(brk(end) == 0);

    section("private file");
    int fd = MUST(open("file", O_CREAT | O_RDWR, 0600));
    for (int i = 0; i < 3; i++) {
        char block[4096];
        memset(block, 'a' + i, sizeof block);
        MUST(write(fd, block, sizeof block));
    }
    MUST(write(fd, "tail", 4));
    char *file = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    SHOW(file != MAP_FAILED);
    SHOW(file[0] == 'a' && file[page] == 'b' && file[3 * page] == 't' && file[3 * page + 4] == 0);
    file[page] = 'X';
    char byte;
    CALL(pread(fd, &byte, 1, page));
    SHOW(byte == 'b');
    char *second = mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, 2 * page);
    SHOW(second[0] == 'c' && second[page - 1] == 'c');
    CALL(mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, 100) == MAP_FAILED ? -1 : 0);
    CALL(madvise(file + page, page, MADV_DONTNEED));
    SHOW(file[page] == 'b');

    section("shared file");
    char *shared = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *again = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    SHOW(shared != MAP_FAILED && again != MAP_FAILED);
    shared[10] = '!';
    SHOW(again[10] == '!');
    CALL(pread(fd, &byte, 1, 10));
    SHOW(byte == '!');
    CALL(pwrite(fd, "?", 1, 11));
    SHOW(shared[11] == '?' && again[11] == '?');
    CALL(msync(shared, 4 * page, MS_SYNC));
    CALL(msync(shared + 1, page, MS_SYNC));
    CALL(munmap(shared, 4 * page));
    CALL(close(fd));
    SHOW(again[10] == '!');
    again[12] = '#';
    fd = MUST(open("file", O_RDONLY));
    CALL(pread(fd, &byte, 1, 12));
    SHOW(byte == '#');
    CALL(mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0);
    CALL(mprotect(mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0), page, PROT_READ | PROT_WRITE));
    CALL(munmap(again, 4 * page));

    section("memfd");
    int memory = DONE(memfd_create("name", MFD_CLOEXEC));
    CALL(ftruncate(memory, 2 * page));
    char *one = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    char *two = mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, memory, 0);
    one[page] = 'm';
    SHOW(two[page] == 'm');
    CALL(lseek(memory, 0, SEEK_END) == 2 * page);

    section("shared anonymous");
    char *common = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    SHOW(common != MAP_FAILED && all_bytes(common, 2 * page, 0));
    common[0] = 1;

    section("execution");
    unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3}; /* mov eax, 42; ret */
    unsigned char *text = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(text, code, sizeof code);
    CALL(mprotect(text, page, PROT_READ | PROT_EXEC));
    SHOW(((int (*)(void))text)());

    section("what is no file");
    int device = MUST(open("/dev/zero", O_RDWR));
    char *zeros = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, device, 0);
    SHOW(zeros != MAP_FAILED && zeros[page] == 0);
    zeros[page] = 1;
    zeros = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);
    SHOW(zeros != MAP_FAILED && zeros[page] == 0);
    zeros[page] = 1;
    close(device);
    device = MUST(open("/dev/null", O_RDWR));
    DONE(mmap(NULL, page, PROT_READ, MAP_PRIVATE, device, 0));
    close(device);
    int directory = MUST(open("/", O_RDONLY | O_DIRECTORY));
    DONE(mmap(NULL, page, PROT_READ, MAP_PRIVATE, directory, 0));
    close(directory);

    section("large");
    size_t huge = (size_t)1 << 36;
    char *reserved = mmap(NULL, huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    SHOW(reserved != MAP_FAILED);
    CALL(mprotect(reserved + huge / 2, page, PROT_READ | PROT_WRITE));
    reserved[huge / 2] = 1;
    CALL(munmap(reserved, huge));

    section("heap");
    unsigned checksum = 0;
    for (int round = 0; round < 50; round++) {
        char *blocks[40];
        for (int i = 0; i < 40; i++) {
            size_t length = (size_t)1 << (i % 18);
            blocks[i] = malloc(length);
            memset(blocks[i], i, length);
        }
        for (int i = 0; i < 40; i++) {
            checksum += blocks[i][((size_t)1 << (i % 18)) - 1];
            free(blocks[i]);
        }
    }
    SHOW(checksum);
    return finish();
}
