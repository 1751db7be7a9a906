//! `/sys`: what programs ask about the machine.
//!
//! There is one CPU, no NUMA, no control groups (their directory is there and empty, so that nobody takes it for
//! unlimited resources by mistake: programs then fall back to `/proc/meminfo`, which knows the limit).

use alloc::{format, sync::Arc, vec};

use linux_raw_sys::general as linux;

use super::{
    Inode, device_number,
    synthetic::{Origin, TextDirectory, TextFile},
};
use crate::Kernel;

const ORIGIN: Origin = Origin {
    device: device_number(0, 23),
    magic: linux::SYSFS_MAGIC,
};

fn directory(entries: alloc::vec::Vec<(&'static str, Arc<dyn Inode>)>) -> Arc<dyn Inode> {
    TextDirectory::inode(ORIGIN, entries)
}

fn text(text: &'static str) -> Arc<dyn Inode> {
    TextFile::fixed(ORIGIN, text)
}

/// The root directory.
#[must_use]
pub fn root(_: &Arc<Kernel>) -> Arc<dyn Inode> {
    TextDirectory::later(ORIGIN, vec![], make_root)
}

fn make_root() -> Arc<dyn Inode> {
    let cpu = || {
        directory(vec![
            ("online", text("0\n")),
            ("possible", text("0\n")),
            ("present", text("0\n")),
            ("offline", text("\n")),
            ("kernel_max", text("0\n")),
            (
                "cpu0",
                directory(vec![(
                    "topology",
                    directory(vec![
                        ("core_id", text("0\n")),
                        ("physical_package_id", text("0\n")),
                        ("thread_siblings_list", text("0\n")),
                        ("core_siblings_list", text("0\n")),
                    ]),
                )]),
            ),
        ])
    };
    let pages = directory(vec![
        ("enabled", text("always madvise [never]\n")),
        (
            "defrag",
            text("always defer defer+madvise madvise [never]\n"),
        ),
        (
            "hpage_pmd_size",
            TextFile::inode(ORIGIN, || Ok(format!("{}\n", 2 << 20).into_bytes())),
        ),
        (
            "shmem_enabled",
            text("always within_size advise [never] deny force\n"),
        ),
    ]);
    let node = directory(vec![
        ("online", text("0\n")),
        ("possible", text("0\n")),
        (
            "node0",
            directory(vec![("cpulist", text("0\n")), ("cpumap", text("1\n"))]),
        ),
    ]);
    directory(vec![
        (
            "devices",
            directory(vec![(
                "system",
                directory(vec![("cpu", cpu()), ("node", node)]),
            )]),
        ),
        (
            "kernel",
            directory(vec![(
                "mm",
                directory(vec![
                    ("transparent_hugepage", pages),
                    ("hugepages", directory(vec![])),
                ]),
            )]),
        ),
        ("fs", directory(vec![("cgroup", directory(vec![]))])),
        ("class", directory(vec![("net", directory(vec![]))])),
    ])
}
