//! Building, storing and reading images.
//!
//! An image is one ELF file with everything a program needs (see [`kiln_abi::image`] for the
//! layout). This crate makes images from programs, projects and sites, keeps them in a store, and reads them back:
//!
//! * [`source`]: what an image can be made from, and how it is recognised;
//! * [`project`]: the file `kiln.toml`;
//! * [`tree`]: the file tree that is being put together, and how files of the host get into it;
//! * [`program`]: what a program needs beside itself: loader, libraries, data files;
//! * [`erofs`]: the tree as a file system;
//! * [`file`](mod@file): the image file: writing, opening, checking;
//! * [`builder`]: source in, image file out;
//! * [`store`]: images by digest and name;
//! * [`inspect`](mod@inspect): what an image says about itself;
//! * [`code`]: the instructions of programs: where they make which system calls;
//! * [`check`](mod@check): what will not work, before it is started;
//! * [`rewrite`](mod@rewrite): system call instructions turned into jumps.
//!
//! It runs nothing and talks to no network. Everything read from outside is checked; no input makes it panic.
//! The same input gives the same bytes.

#![forbid(unsafe_code)]

pub mod builder;
pub mod check;
pub mod code;

pub mod elf;
pub mod erofs;
pub mod error;
pub mod file;
pub mod inspect;
pub mod program;
pub mod project;
pub mod rewrite;

pub mod source;
pub mod store;
pub mod tree;

pub use builder::{BuildOptions, Built, Guest, NoProgress, Progress, build};
pub use check::{Finding, Severity, Support, check};
pub use error::{Error, Kind, Result};
pub use file::Image;
pub use inspect::{Inspection, inspect};
pub use project::Include;
pub use source::Source;
pub use store::Store;
