//! Wrong input: a clear message that names the thing, the right exit code, nothing left behind.

use std::{fs, net::TcpListener, path::Path};

use kiln_tests::{Kiln, programs};

const HELLO: &str = "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n";

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

#[test]
fn no_such_source() {
    Kiln::new().fail(2, &["/nowhere/at/all"], ["run", "/nowhere/at/all"]);
}

#[test]
fn not_a_program() {
    let kiln = Kiln::new();
    let script = kiln.folder().join("script");
    fs::write(&script, "#!/bin/sh\necho hello\n").expect("a file");
    kiln.fail(2, &["script"], ["run", text(&script)]);
}

#[test]
fn a_truncated_program() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "hello", HELLO);
    let bytes = fs::read(&program).expect("a program");
    for length in [10, 64, 200, bytes.len() / 2] {
        let short = kiln.folder().join("short");
        fs::write(&short, &bytes[..length]).expect("a file");
        kiln.fail(2, &["short"], ["run", text(&short)]);
    }
}

#[test]
fn a_program_for_another_machine() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "hello", HELLO);
    let mut bytes = fs::read(&program).expect("a program");
    // e_machine: EM_AARCH64.
    bytes[18..20].copy_from_slice(&183_u16.to_le_bytes());
    fs::write(&program, bytes).expect("a file");
    kiln.fail(2, &["hello", "x86-64"], ["run", text(&program)]);
}

#[test]
fn a_missing_library() {
    let kiln = Kiln::new();
    let folder = kiln.folder();
    let compiler = |words: &[&str]| {
        let status = std::process::Command::new("cc")
            .args(words)
            .current_dir(folder)
            .status();
        assert!(status.is_ok_and(|status| status.success()), "cc {words:?}");
    };
    fs::write(folder.join("gone.c"), "int gone(void) { return 1; }").expect("a file");
    fs::write(
        folder.join("needs.c"),
        "int gone(void); int main(void) { return gone(); }",
    )
    .expect("a file");
    compiler(&["-shared", "-fPIC", "-o", "libkilngone.so", "gone.c"]);
    compiler(&["-o", "needs", "needs.c", "-L.", "-lkilngone"]);
    fs::remove_file(folder.join("libkilngone.so")).expect("it can go");
    kiln.fail(2, &["libkilngone.so"], ["run", text(&folder.join("needs"))]);
}

#[test]
fn a_port_in_use() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "hello", HELLO);
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = holder.local_addr().expect("an address").port().to_string();
    kiln.fail(
        1,
        &[&port],
        ["run", "-p", &format!("127.0.0.1:{port}:80"), text(&program)],
    );
}

#[test]
fn wrong_words() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "hello", HELLO);
    kiln.fail(
        2,
        &["http", "8080:80"],
        ["run", "-p", "http", text(&program)],
    );
    kiln.fail(2, &["70000"], ["run", "-p", "70000:80", text(&program)]);
    kiln.fail(2, &["plenty"], ["run", "-m", "plenty", text(&program)]);
    kiln.fail(2, &["magic"], ["run", "--engine", "magic", text(&program)]);
    kiln.fail(2, &["--wrong"], ["run", "--wrong", text(&program)]);
    let run = |option: &str, value: &str, words: &[&str]| {
        kiln.fail(2, words, ["run", option, value, text(&program)]);
    };
    run("--hostname", "two words", &["two words", "host name"]);
    run("--hostname", &"a".repeat(65), &["host name", "64"]);
    run("--hostname", "", &["host name"]);
    run("-v", "/tmp:/data:rx", &["'rx'", "neither ro nor rw"]);
    for (first, second) in [
        ("8080:80", "8080:81"),
        ("8080:80", "127.0.0.1:8080:80"),
        ("8080-8082:80-82", "8081:90"),
    ] {
        kiln.fail(
            2,
            &["same port"],
            ["run", "-p", first, "-p", second, text(&program)],
        );
    }
}

#[test]
fn too_little_memory() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "hello", HELLO));
    for engine in kiln_tests::engines() {
        let outcome = kiln.run(["run", "--engine", &engine, "-m", "64K", text(&image)]);
        assert!([1, 2].contains(&outcome.code()), "{engine}: {outcome}");
        assert!(outcome.errors.contains("memory"), "{engine}: {outcome}");
        assert_eq!(kiln.succeed(["ps", "-q"]), "");
    }
}

#[test]
fn a_damaged_image() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "hello", HELLO));
    let bytes = fs::read(&image).expect("an image");
    let damaged = kiln.folder().join("damaged.kiln");
    for length in [100, 5000, bytes.len() / 2] {
        fs::write(&damaged, &bytes[..length]).expect("a file");
        kiln.fail(2, &["damaged.kiln"], ["run", text(&damaged)]);
    }
}

#[test]
fn what_is_no_file_is_neither_read_nor_replaced() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "hello", HELLO);
    let pipe = kiln.folder().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.is_ok_and(|status| status.success()));
    for command in ["run", "build", "check", "inspect"] {
        // Not one of them waits for somebody who writes into it.
        kiln.fail(2, &["pipe", "file"], [command, text(&pipe)]);
    }
    kiln.fail(
        2,
        &["pipe", "regular file"],
        ["build", "-o", text(&pipe), text(&program)],
    );
    assert!(!pipe.is_file() && pipe.exists());
    kiln.fail(
        2,
        &["hello", "the program itself"],
        ["build", "-o", text(&program), text(&program)],
    );
    assert_eq!(kiln.succeed(["run", text(&program)]), "hello\n");
    kiln.fail(
        2,
        &["nowhere/hello.kiln", "there is no directory", "mkdir"],
        [
            "build",
            "-o",
            text(&kiln.folder().join("nowhere/hello.kiln")),
            text(&program),
        ],
    );
    kiln.fail(2, &["is not a file"], ["inspect", text(kiln.folder())]);
}

#[test]
fn a_directory_without_an_index() {
    let kiln = Kiln::new();
    let folder = kiln.folder().join("empty");
    fs::create_dir(&folder).expect("a folder");
    kiln.fail(
        2,
        &["empty", "index.html", "kiln.toml"],
        ["run", text(&folder)],
    );
}

#[test]
fn an_unknown_key() {
    let kiln = Kiln::new();
    let folder = kiln.folder().join("project");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("kiln.toml"), "site = \".\"\nprot = [80]\n").expect("a file");
    kiln.fail(2, &["kiln.toml", "prot"], ["run", text(&folder)]);
}

#[test]
fn no_qemu() {
    let kiln = Kiln::new();
    let image = kiln.build(&programs::compile(kiln.folder(), "hello", HELLO));
    // In a mount namespace where all its places are something else than a program.
    let hide = "for place in /usr/bin/qemu-system-x86_64 /usr/local/bin/qemu-system-x86_64 /usr/libexec/qemu-kvm \
        /usr/bin/qemu-kvm; do [ ! -e $place ] || mount --bind /dev/null $place || exit 99; done; exec \"$@\"";
    let run = kiln.command(["run", "--engine", "qemu", text(&image)]);
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", hide, "sh"])
        .arg(run.get_program())
        .args(run.get_args());
    command.env("KILN_STATE", kiln.state());
    let outcome = kiln_tests::run(&mut command, kiln_tests::RUN_DEADLINE);
    assert!([1, 2].contains(&outcome.code()), "{outcome}");
    assert!(outcome.errors.contains("qemu-system-x86"), "{outcome}");
}

#[test]
fn no_such_instance_or_image() {
    let kiln = Kiln::new();
    for verb in ["logs", "stop", "kill", "rm", "rmi", "inspect"] {
        let outcome = kiln.run([verb, "nobody"]);
        assert!([1, 2].contains(&outcome.code()), "{verb}: {outcome}");
        assert!(outcome.errors.contains("nobody"), "{verb}: {outcome}");
    }
}
