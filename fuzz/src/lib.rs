//! Fuzz targets for everything that Kiln parses from outside.
//!
//! A target is a function that takes any bytes and must neither panic nor hang; some check what came out as well.
//! Each runs in two ways:
//!
//! * `cargo test -p kiln-fuzz`: on the stable toolchain, without feedback, for a short while: seeds, cut and mutated
//!   ([`mutate`]). `KILN_FUZZ_SECONDS` makes it longer (seconds for each target);
//! * `cargo +nightly fuzz run TARGET --features libfuzzer`: with coverage feedback, for as long as one likes.
//!
//! An input that failed once goes to `regressions/TARGET/`, and is tried first ever after.

#![forbid(unsafe_code)]

pub mod front;
pub mod mutate;
pub mod name_server;
pub mod network;
pub mod program;
pub mod summon;

/// A parser to be fed with anything.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, as for cargo-fuzz.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Good inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "elf",
        run: program::elf,
        seeds: program::elf_seeds,
    },
    Target {
        name: "image",
        run: program::image,
        seeds: program::image_seeds,
    },
    Target {
        name: "root",
        run: program::root,
        seeds: program::root_seeds,
    },
    Target {
        name: "project",
        run: program::project,
        seeds: program::project_seeds,
    },
    Target {
        name: "loader_cache",
        run: program::loader_cache,
        seeds: program::loader_cache_seeds,
    },
    Target {
        name: "manifest",
        run: program::manifest,
        seeds: program::manifest_seeds,
    },
    Target {
        name: "link",
        run: network::link,
        seeds: network::link_seeds,
    },
    Target {
        name: "dns",
        run: network::dns,
        seeds: network::dns_seeds,
    },
    Target {
        name: "dhcp",
        run: network::dhcp,
        seeds: network::dhcp_seeds,
    },
    Target {
        name: "frames",
        run: network::frames,
        seeds: network::frames_seeds,
    },
    Target {
        name: "summon",
        run: summon::summon,
        seeds: summon::summon_seeds,
    },
    Target {
        name: "name_server",
        run: name_server::name_server,
        seeds: name_server::name_server_seeds,
    },
    Target {
        name: "front",
        run: front::front,
        seeds: front::front_seeds,
    },
];
