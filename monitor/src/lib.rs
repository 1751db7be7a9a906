//! Running one instance: its engine, its end of the kernel's link, its console, its published ports and volumes, and its place
//! in the state directory.
//!
//! One monitor process owns one running unikernel; there is no daemon. All monitors of a user meet only in the state
//! directory ([`state`]), so any of them, or any command, may die without harm to the others.
//!
//! Not here: building and storing images (`kiln-image`), the packet network of `--net direct` (`kiln-network`), and words for
//! people beyond error messages (`cli`).

#![deny(unsafe_code)]

pub mod arguments;
pub mod choice;
pub mod console;
pub mod control;
pub mod direct;
pub mod engine;
mod error;
pub mod launch;
pub mod link;
pub mod monitor;
pub mod names;
pub mod sockets;
pub mod state;
pub mod volume;

pub use error::{Error, Kind, Refusal};
pub use kiln_network::raise_descriptor_limit;
