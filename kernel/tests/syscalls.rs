//! SYSCALLS.md at the top of the project says what the table says.

use std::{fmt::Write, fs, path::Path};

use kiln_kernel::syscall::table;

fn page() -> String {
    let mut page = String::from(
        "# System calls\n\nWhat the kernel supports, made from its table (`kernel/src/syscall`). \
         Calls that are not listed give `ENOSYS` and one line in the log.\n\
         After a change of the table: `KILN_WRITE=1 cargo test -p kiln-kernel --test syscalls`.\n\n",
    );
    let count = table::supported().count();
    let full = table::supported()
        .filter(|entry| entry.limits.is_empty())
        .count();
    writeln!(
        page,
        "{count} calls, {full} of them without limits.\n\n| number | call | limits |\n|---|---|---|"
    )
    .unwrap();
    for entry in table::supported() {
        writeln!(
            page,
            "| {} | `{}` | {} |",
            entry.number, entry.name, entry.limits
        )
        .unwrap();
    }
    page
}

#[test]
fn the_page_of_system_calls_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../SYSCALLS.md");
    if std::env::var_os("KILN_WRITE").is_some() {
        fs::write(&path, page()).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page(),
        "SYSCALLS.md is not what the table says; run with KILN_WRITE=1 to write it anew"
    );
}
