//! The name server in front: it answers for the units' names when the unit says so, and asks others about the rest.
//!
//! It knows nothing of instances: a name belongs to a [`Unit`], which is told that somebody asks and says whether to
//! answer now, later or never.
//!
//! * [`Zone`]: what is known; replaced as a whole on reload.
//! * [`Server`]: sockets, waiting, limits, statistics.
//! * [`respond`]: the wire, as a pure function.
//!
//! Not for: recursion (other servers do it), DNSSEC (no name here is signed), zone transfers.

mod answer;
mod forward;
mod name;
mod network;
mod query;
mod server;
mod statistics;
#[cfg(test)]
mod tests;
mod zone;

pub use answer::{Circumstances, Outcome, Sent, respond};
pub use forward::Forward;
pub use server::{Configuration, Error, Limits, Server};
pub use statistics::Statistics;
pub use zone::{Asked, Name, NotReady, Unit, Zone, ZoneBuilder, ZoneError};
