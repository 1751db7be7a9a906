//! What a program on engine process cannot do to the host.

use std::fs;

use kiln_tests::{Kiln, programs};

/// Tries to get at the host with the instruction itself, from its own code and from code it made.
const ESCAPER: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
static long raw(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
int main(int argc, char **argv) {
    char text[4096] = "";
    long fd = raw(SYS_open, (long)argv[1], O_RDONLY, 0);
    printf("host file: %ld\n", fd);
    fd = raw(SYS_open, (long)"/etc/passwd", O_RDONLY, 0);
    long length = fd < 0 ? 0 : raw(SYS_read, fd, (long)text, 4095);
    printf("marker in /etc/passwd: %d\n", length > 0 && strstr(text, argv[2]) != NULL);
    printf("made outside: %ld\n", raw(SYS_open, (long)argv[3], O_CREAT | O_WRONLY, 0600) >= 0 ? 0L : -1L);
    unsigned char code[] = {0x89, 0xf8, 0x48, 0x89, 0xf7, 0x48, 0x89, 0xd6, 0x31, 0xd2, 0x0f, 0x05, 0xc3};
    unsigned char *made = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(made, code, sizeof code);
    mprotect(made, 4096, PROT_READ | PROT_EXEC);
    printf("host file, own code: %ld\n", ((long (*)(int, long, long))made)(SYS_open, (long)argv[1], O_RDONLY));
    void *both = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("writable and executable: %d\n", both != MAP_FAILED);
    printf("page zero: %d\n", mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    (void)argc;
    return 0;
}
"#;

#[test]
fn raw_system_calls_do_not_reach_the_host() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "escaper", ESCAPER));
    let secret = kiln.folder().join("secret");
    fs::write(&secret, "secret").expect("a file");
    let made = kiln.folder().join("made");
    let output = kiln.succeed([
        "run",
        "--engine",
        "process",
        image.to_str().expect("the path is text"),
        "--",
        secret.to_str().expect("the path is text"),
        // Every Debian has this user; an image made from one program has no use for it.
        "games:",
        made.to_str().expect("the path is text"),
    ]);
    // ENOENT is 2.
    assert!(output.contains("host file: -2\n"), "{output}");
    assert!(output.contains("host file, own code: -2\n"), "{output}");
    assert!(output.contains("marker in /etc/passwd: 0\n"), "{output}");
    assert!(output.contains("writable and executable: 0\n"), "{output}");
    assert!(output.contains("page zero: 0\n"), "{output}");
    assert!(!made.exists(), "{output}");
}
