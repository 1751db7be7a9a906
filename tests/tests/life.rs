//! The life of instances: what a program is given, what is seen of it, how it ends.

use std::fs;

use kiln_tests::{Kiln, engines, eventually, programs};

/// Shows what a program is given, then does what its first argument says.
const TELLER: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>
#include <signal.h>
static void stop(int signal) { printf("stopping for %d\n", signal); fflush(stdout); _exit(3); }
int main(int argc, char **argv) {
    char directory[200], host[100];
    signal(SIGTERM, stop);
    for (int i = 1; i < argc; i++) printf("argument %s\n", argv[i]);
    printf("directory %s\n", getcwd(directory, sizeof directory));
    gethostname(host, sizeof host);
    printf("host %s\nuser %d:%d\n", host, getuid(), getgid());
    printf("greeting %s\n", getenv("GREETING") ? getenv("GREETING") : "none");
    fflush(stdout);
    if (argc > 1 && !strcmp(argv[1], "wait")) for (;;) pause();
    if (argc > 2 && !strcmp(argv[1], "write")) {
        int fd = open(argv[2], O_CREAT | O_WRONLY | O_TRUNC, 0644);
        if (fd < 0) { perror(argv[2]); return 1; }
        if (write(fd, "written inside", 14) != 14 || fsync(fd)) { perror("write"); return 1; }
        char found[100] = "";
        if (argc > 3) { int in = open(argv[3], O_RDONLY); if (in < 0 || read(in, found, 99) < 0) { perror(argv[3]); return 1; } printf("found %s\n", found); }
    }
    if (argc > 1 && !strcmp(argv[1], "crash")) *(volatile int *volatile)(long)argc = 1;
    return 0;
}
"#;

#[test]
fn a_program_gets_what_the_run_says() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "teller", TELLER));
    for engine in engines() {
        let mut words = vec![
            "run",
            "--engine",
            &engine,
            "-e",
            "GREETING=good morning",
            "-w",
            "/tmp",
            "--hostname",
            "potter",
            "--user",
            "12:34",
        ];
        words.extend([
            image.to_str().expect("the path is text"),
            "--",
            "one",
            "two words",
        ]);
        let output = kiln.succeed(words);
        assert_eq!(
            output,
            "argument one\nargument two words\ndirectory /tmp\nhost potter\nuser 12:34\ngreeting good morning\n",
            "{engine}"
        );
    }
}

#[test]
fn an_instance_from_start_to_removal() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "teller", TELLER));
    let image = image.to_str().expect("the path is text");
    for engine in engines() {
        kiln.start("one", &["--engine", &engine, image, "--", "wait"]);
        eventually("its output in the log", || {
            kiln.succeed(["logs", "one"])
                .contains("greeting none")
                .then_some(())
        });
        assert_eq!(kiln.succeed(["ps", "-q"]), "one\n");
        assert!(kiln.succeed(["ps", "--json"]).contains("\"one\""));
        assert!(kiln.succeed(["inspect", "one"]).contains("one"));
        // The name is taken, and a running instance is not removed by mistake.
        assert_ne!(kiln.run(["run", "-d", "--name", "one", image]).code(), 0);
        assert_ne!(kiln.run(["rm", "one"]).code(), 0);
        kiln.succeed(["stop", "one"]);
        let log = kiln.succeed(["logs", "one"]);
        assert!(log.contains("stopping for 15"), "{engine}: {log}");
        assert_eq!(kiln.succeed(["ps", "-q", "--running"]), "");
        kiln.succeed(["rm", "one"]);
        assert_eq!(kiln.succeed(["ps", "-q"]), "");

        kiln.start("two", &["--engine", &engine, image, "--", "wait"]);
        kiln.succeed(["kill", "two"]);
        eventually("its end", || {
            kiln.succeed(["ps", "-q", "--running"])
                .is_empty()
                .then_some(())
        });
        kiln.succeed(["rm", "two"]);
    }
}

#[test]
fn a_crash_is_reported() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "teller", TELLER));
    for engine in engines() {
        let outcome = kiln.run([
            "run",
            "--engine",
            &engine,
            image.to_str().expect("the path is text"),
            "--",
            "crash",
        ]);
        assert_eq!(outcome.code(), 139, "{engine}: {outcome}");
        // Standard output is the program's alone, to the byte.
        assert!(
            outcome.output.starts_with("argument crash\ndirectory /\n")
                && outcome.output.ends_with("greeting none\n"),
            "{engine}: {outcome}"
        );
        let told = &outcome.errors;
        assert!(
            told.contains("kiln: teller[1]: SIGSEGV") && told.contains("0x2"),
            "{engine}: {told}"
        );
        assert!(told.contains("kiln: rax 0"), "{engine}: {told}");
        assert!(
            told.contains("main"),
            "{engine}: no symbol in the backtrace\n{told}"
        );
    }
}

/// Crashes or aborts some calls deep, also in a signal's handler.
const FALLER: &str = r#"
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#define APART __attribute__((noinline))
static volatile int zero;
APART int third(void) { *(volatile int *volatile)8 = 1; return zero; }
APART int second(int way) {
    char room[300];
    memset(room, way, sizeof room);
    if (way == 'a') abort();
    return third() + room[zero];
}
APART int first(int way) { return second(way) + 1; }
static void handler(int signal) { first(signal); }
int main(int argc, char **argv) {
    if (argv[1][0] == 's') { signal(SIGUSR1, handler); return raise(SIGUSR1) + zero; }
    if (argv[1][0] == 'n') { ((void (*volatile)(void))0)(); return zero; }
    return first(argv[1][0]) + argc;
}
"#;

#[test]
fn the_callers_of_a_crash_are_named_without_frame_pointers() {
    let kiln = Kiln::new();
    let program = programs::compile_with(
        kiln.folder(),
        "faller",
        FALLER,
        &["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"],
    );
    let image = kiln.build(&program);
    let image = image.to_str().expect("the path is text");
    for engine in engines() {
        for (way, code, signal, callers) in [
            (
                "c",
                139,
                "SIGSEGV",
                &["third", "second", "first", "main"][..],
            ),
            (
                "s",
                139,
                "SIGSEGV",
                &["third", "second", "first", "handler", "main"],
            ),
            ("n", 139, "SIGSEGV", &["main"]),
            ("a", 134, "SIGABRT", &["abort", "second", "first", "main"]),
        ] {
            let outcome = kiln.run(["run", "--engine", &engine, image, "--", way]);
            assert_eq!(outcome.code(), code, "{engine} {way}: {outcome}");
            assert!(outcome.errors.contains(signal), "{engine}: {outcome}");
            // The compiler may have split off a part that is seldom needed (`second.cold`).
            let mut rest = outcome.errors.as_str();
            for caller in callers {
                let call = format!("({caller}");
                let place = rest
                    .find(&call)
                    .unwrap_or_else(|| panic!("{engine} {way}: no {caller}\n{outcome}"));
                rest = &rest[place + call.len()..];
            }
            // The last one is the program's very beginning, and not an accident of what lies on the stack.
            let last = rest.lines().last().unwrap_or_default();
            assert!(last.contains("(_start+"), "{engine} {way}: {outcome}");
            assert_eq!(
                outcome.errors.contains("sent by process 1"),
                way == "a",
                "{engine} {way}: {outcome}"
            );
        }
    }
}

/// Copies its standard input to its standard output.
const READER: &str = r#"
#include <poll.h>
#include <stdio.h>
#include <unistd.h>
int main(void) {
    char bytes[4096];
    ssize_t count;
    struct pollfd wait = { .fd = 0, .events = POLLIN };
    if (poll(&wait, 1, -1) != 1) return 3;
    while ((count = read(0, bytes, sizeof bytes)) > 0)
        if (write(1, bytes, count) != count) return 1;
    puts("end");
    return count < 0;
}
"#;

#[test]
fn standard_input_is_given_if_asked_for_and_else_at_its_end() {
    use std::{io::Write as _, process::Stdio};
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "reader", READER));
    let image = image.to_str().expect("the path is text");
    for engine in engines() {
        // A terminal that nobody types at, so to speak: the writing end stays open.
        let (_typist, keyboard) = std::io::pipe().expect("a pipe");
        let mut command = kiln.command(["run", "--engine", &engine, image]);
        let outcome = kiln_tests::run(command.stdin(keyboard), kiln_tests::RUN_DEADLINE);
        assert_eq!(outcome.code(), 0, "{engine}: {outcome}");
        assert_eq!(outcome.output, "end\n", "{engine}");

        let mut command = kiln.command(["run", "-i", "--engine", &engine, image]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut input = child.stdin.take().expect("a pipe");
        input.write_all(b"some words\n").expect("it reads");
        drop(input);
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{engine}");
        assert_eq!(output.stdout, b"some words\nend\n", "{engine}");

        kiln.start("reader", &["--engine", &engine, image]);
        eventually("its end", || {
            let ended = kiln.succeed(["ps", "-q", "--running"]).is_empty();
            ended.then_some(())
        });
        assert_eq!(kiln.succeed(["logs", "reader"]), "end\n", "{engine}");
        kiln.succeed(["rm", "reader"]);
    }
}

#[test]
fn a_closed_terminal_ends_the_program_in_order() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "teller", TELLER));
    for engine in engines() {
        let command = format!(
            "{} run --name one --engine {engine} {} -- wait",
            kiln_tests::kiln().display(),
            image.display()
        );
        let mut terminal = std::process::Command::new("script")
            .args(["--quiet", "--command", &command, "/dev/null"])
            .env("KILN_STATE", kiln.state())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("script is there");
        eventually("its output in the log", || {
            let log = kiln.run(["logs", "one"]).output;
            log.contains("greeting none").then_some(())
        });
        // The terminal goes with the program that holds its other side.
        assert!(kiln_tests::signal(terminal.id(), "KILL"));
        terminal.wait().expect("it ends");
        eventually("its end", || {
            kiln.succeed(["ps", "-q", "--running"])
                .is_empty()
                .then_some(())
        });
        let log = kiln.succeed(["logs", "one"]);
        assert!(log.contains("stopping for 15"), "{engine}: {log}");
        let listed = kiln.succeed(["ps"]);
        assert!(listed.contains("exited (3)"), "{engine}: {listed}");
        kiln.succeed(["rm", "one"]);
    }
}

/// Says much, then ends with 3.
const TALKER: &str = r#"
#include <stdio.h>
int main(void) {
    for (int i = 0; i < 100000; i++) printf("line %d\n", i);
    return 3;
}
"#;

#[test]
fn a_full_disk_ends_no_program_and_hides_no_output() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "talker", TALKER));
    let image = image.to_str().expect("the path is text");
    fs::create_dir(kiln.state()).expect("a folder");
    // A state directory on a disk of its own, which the log fills.
    let script = "mount -t tmpfs -o size=256k none \"$KILN_STATE\" && exec \"$@\"";
    let run = kiln.command(["run", image]);
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(run.get_program())
        .args(run.get_args())
        .env("KILN_STATE", kiln.state());
    let outcome = kiln_tests::run(&mut command, kiln_tests::RUN_DEADLINE);
    assert_eq!(outcome.code(), 3, "{}", outcome.errors);
    let lines: String = (0..100_000).map(|i| format!("line {i}\n")).collect();
    assert!(outcome.output == lines, "{}", outcome.errors);
}

/// Writes while it makes remarks of the kernel's, the last of them right before it ends.
const REMARKED: &str = r#"
#include <stdio.h>
#include <unistd.h>
#include <sys/syscall.h>
int main(void) {
    for (int i = 0; i < 40; i++) {
        char line[40];
        syscall(4000 + i);
        int length = sprintf(line, "line %d\n", i);
        if (write(1, line, length) != length) return 1;
    }
    if (write(1, "no end of line", 14) != 14) return 1;
    syscall(4100);
    _exit(0);
}
"#;

#[test]
fn remarks_of_the_kernel_are_apart_from_the_programs_output_and_none_is_lost() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "remarked", REMARKED));
    let image = image.to_str().expect("the path is text");
    let lines: String = (0..40).map(|number| format!("line {number}\n")).collect();
    for engine in engines() {
        let outcome = kiln.run(["run", "--name", "one", "--engine", &engine, image]);
        assert_eq!(outcome.code(), 0, "{engine}: {outcome}");
        assert_eq!(
            outcome.output,
            format!("{lines}no end of line"),
            "{engine}: {outcome}"
        );
        for number in (4000..4040).chain([4100]) {
            let remark = format!("kiln: warning: not supported: system call {number} ");
            let times = outcome
                .errors
                .lines()
                .filter(|line| line.starts_with(&remark))
                .count();
            assert_eq!(times, 1, "{engine} {number}: {outcome}");
        }
        // The log has both, each remark as a line of its own, the last one last.
        let log = kiln.run(["logs", "one"]).output;
        let last = log.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("kiln: warning: not supported: system call 4100 "),
            "{engine}: {log}"
        );
        let (remarks, program): (Vec<_>, Vec<_>) =
            log.lines().partition(|line| line.starts_with("kiln: "));
        assert_eq!(remarks.len(), 41, "{engine}: {log}");
        assert_eq!(
            program.concat(),
            outcome.output.replace('\n', ""),
            "{engine}: {log}"
        );
        kiln.run(["rm", "one"]);
    }
}

#[test]
fn a_volume_is_the_hosts_directory_and_no_more() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "teller", TELLER));
    let shared = kiln.folder().join("shared");
    fs::create_dir(&shared).expect("a folder");
    fs::write(shared.join("in"), "from outside").expect("a file");
    fs::write(kiln.folder().join("secret"), "secret").expect("a file");
    let volume = format!("{}:/data", shared.display());
    for engine in engines() {
        let run = |words: &[&str]| {
            let mut all = vec![
                "run",
                "--engine",
                &engine,
                "-v",
                &volume,
                image.to_str().expect("the path is text"),
                "--",
            ];
            all.extend(words);
            kiln.run(all)
        };
        let outcome = run(&["write", "/data/out", "/data/in"]);
        assert_eq!(outcome.code(), 0, "{engine}: {outcome}");
        assert!(
            outcome.output.contains("found from outside"),
            "{engine}: {outcome}"
        );
        assert_eq!(
            fs::read_to_string(shared.join("out")).expect("a file"),
            "written inside"
        );
        fs::remove_file(shared.join("out")).expect("it can go");
        std::os::unix::fs::symlink("../secret", shared.join("way-out")).expect("a link");
        let outcome = run(&["write", "/data/out", "/data/way-out"]);
        assert!(
            !outcome.output.contains("found secret"),
            "{engine}: {outcome}"
        );
        fs::remove_file(shared.join("way-out")).expect("it can go");
    }
}

#[test]
fn images_are_kept_by_name_until_removed() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "teller", TELLER);
    kiln.succeed(["build", program.to_str().expect("the path is text")]);
    assert!(kiln.succeed(["images"]).contains("teller"));
    assert!(kiln.succeed(["run", "teller"]).contains("greeting none"));
    kiln.succeed(["rmi", "teller"]);
    assert!(!kiln.succeed(["images"]).contains("teller"));
}

#[test]
fn the_version_is_said() {
    assert!(
        Kiln::new()
            .succeed(["version"])
            .contains(env!("CARGO_PKG_VERSION"))
    );
}

/// Has the kernel panic, as root may on Linux (`proc_sysrq-trigger(5)`).
const PANICKER: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(void) {
    int trigger = open("/proc/sysrq-trigger", O_WRONLY);
    if (trigger < 0) { perror("/proc/sysrq-trigger"); return 1; }
    puts("before");
    fflush(stdout);
    write(trigger, "c", 1);
    puts("after");
    return 3;
}
"#;

#[test]
fn a_panic_of_the_kernel_ends_the_instance_with_a_backtrace_and_leaves_nothing() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "panicker", PANICKER));
    let image = image.to_str().expect("the path is text");
    for engine in engines() {
        let outcome = kiln.run(["run", "--name", "one", "--engine", &engine, image]);
        assert_eq!(outcome.code(), 254, "{engine}: {outcome}");
        assert!(
            outcome.errors.contains("the kernel panicked"),
            "{engine}: {outcome}"
        );
        let log = kiln.run(["logs", "one"]).output;
        for text in [&outcome.output, &log] {
            let (said, trace) = text
                .split_once("kiln: kernel panic: ")
                .unwrap_or_else(|| panic!("{engine}: no panic\n{outcome}\n{log}"));
            assert!(said.contains("before\n"), "{engine}: {text}");
            assert!(!text.contains("after\n"), "{engine}: {text}");
            assert!(trace.contains("sysrq triggered crash"), "{engine}: {text}");
            // From the cause to the main loop, by name.
            let mut frames = trace.lines().filter(|line| line.starts_with("  #"));
            for name in ["system_request+", "file::write+", "Kernel::run+"] {
                assert!(
                    frames.any(|frame| frame.contains(name)),
                    "{engine}: no {name} in its place\n{text}"
                );
            }
        }
        let listed = kiln.succeed(["ps"]);
        assert!(listed.contains("254"), "{engine}: {listed}");
        assert_eq!(kiln.succeed(["ps", "-q", "--running"]), "", "{engine}");
        kiln.succeed(["rm", "one"]);

        // In the background it ends the same way, and its processes are gone.
        kiln.start("two", &["--engine", &engine, image]);
        let listed = eventually("its end", || {
            let listed = kiln.succeed(["ps"]);
            listed.contains("254").then_some(listed)
        });
        assert!(listed.contains("two"), "{engine}: {listed}");
        let told = kiln.succeed(["inspect", "two"]);
        for key in ["\"monitor\": ", "\"process\": "] {
            let number = told
                .split_once(key)
                .map(|(_, rest)| rest.split([',', '\n']).next().unwrap_or(rest));
            if let Some(number) = number.and_then(|number| number.parse::<u32>().ok()) {
                eventually("the end of its processes", || {
                    (!std::path::Path::new(&format!("/proc/{number}")).exists()).then_some(())
                });
            }
        }
        kiln.succeed(["rm", "two"]);
        let left: Vec<_> = fs::read_dir(kiln.state().join("instances"))
            .expect("the folder of the instances")
            .collect();
        assert!(left.is_empty(), "{engine}: {left:?}");
    }
}

#[test]
fn only_root_makes_the_kernel_panic() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "panicker", PANICKER));
    let image = image.to_str().expect("the path is text");
    let outcome = kiln.run(["run", "--user", "12:34", image]);
    assert_eq!(outcome.code(), 1, "{outcome}");
    assert!(outcome.output.contains("Permission denied"), "{outcome}");
}

/// Writes a file on a volume, reads it back and another that the host wrote.
const COPIER: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#define BLOCK (1 << 20)
static unsigned char block[BLOCK], found[BLOCK];
static void fill(int number) { for (int i = 0; i < BLOCK; i++) block[i] = (unsigned char)(i * 7 + (i >> 9) + number); }
static int check(const char *path, int blocks) {
    int file = open(path, O_RDONLY);
    for (int number = 0; number < blocks; number++) {
        fill(number);
        for (int done = 0; done < BLOCK;) {
            ssize_t count = read(file, found + done, BLOCK - done);
            if (count <= 0) { perror(path); return 1; }
            done += count;
        }
        if (memcmp(block, found, BLOCK)) { printf("%s: block %d differs\n", path, number); return 1; }
    }
    return read(file, found, 1) != 0;
}
int main(void) {
    int file = open("/data/out", O_CREAT | O_WRONLY | O_TRUNC, 0644);
    for (int number = 0; number < 32; number++) {
        fill(number);
        if (write(file, block, BLOCK) != BLOCK) { perror("write"); return 1; }
    }
    if (fsync(file)) { perror("fsync"); return 1; }
    return check("/data/out", 32) || check("/data/in", 32);
}
"#;

/// More at once than any buffer between the kernel and the volume's server takes.
#[test]
fn much_data_goes_through_a_volume_and_back() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "copier", COPIER));
    let shared = kiln.folder().join("shared");
    fs::create_dir(&shared).expect("a folder");
    let content: Vec<u8> = (0..32_u32)
        .flat_map(|number| {
            (0..1_u32 << 20).map(move |place| (place * 7 + (place >> 9) + number) as u8)
        })
        .collect();
    fs::write(shared.join("in"), &content).expect("a file");
    let volume = format!("{}:/data", shared.display());
    for engine in engines() {
        let outcome = kiln.run([
            "run",
            "--engine",
            &engine,
            "-v",
            &volume,
            image.to_str().expect("the path is text"),
        ]);
        assert_eq!(outcome.code(), 0, "{engine}: {outcome}");
        assert!(
            fs::read(shared.join("out")).expect("a file") == content,
            "{engine}: the file differs"
        );
        fs::remove_file(shared.join("out")).expect("it can go");
    }
}
