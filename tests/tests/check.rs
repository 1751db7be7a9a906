//! `kiln check`: what will not work is said before anything boots.

use kiln_tests::{Kiln, programs, workspace};

const FORKING: &str = "#include <stdio.h>\n#include <sys/wait.h>\n#include <unistd.h>\n\
    int main(void) { if (fork() == 0) execl(\"/bin/true\", \"true\", (char *)0); wait(0); return 0; }\n";

#[test]
fn a_site_has_nothing_to_say_against_it() {
    let kiln = Kiln::new();
    kiln.succeed([
        "check",
        workspace()
            .join("examples/site")
            .to_str()
            .expect("the path is text"),
    ]);
}

#[test]
fn a_program_that_forks_is_told() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "forking", FORKING);
    let outcome = kiln.run(["check", program.to_str().expect("the path is text")]);
    let told = format!("{}{}", outcome.output, outcome.errors);
    assert!(told.contains("fork") && told.contains("exec"), "{outcome}");
}

#[test]
fn debians_servers_can_be_checked() {
    let kiln = Kiln::new();
    for program in ["/usr/bin/redis-server", "/usr/sbin/nginx"] {
        let outcome = kiln.run(["check", program]);
        assert!([0, 1].contains(&outcome.code()), "{program}: {outcome}");
        assert!(
            !outcome.output.contains("missing librar"),
            "{program}: {outcome}"
        );
    }
}

#[test]
fn findings_are_there_for_machines() {
    let kiln = Kiln::new();
    let program = programs::compile(kiln.folder(), "forking", FORKING);
    let output = kiln
        .run([
            "check",
            "--json",
            program.to_str().expect("the path is text"),
        ])
        .output;
    assert!(output.trim_start().starts_with(['{', '[']), "{output}");
}
