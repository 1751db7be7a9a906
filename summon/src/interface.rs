//! Addresses of units on an interface of this machine, such as a bridge.

use std::net::IpAddr;

/// Addresses that were added, to be taken away again.
#[derive(Default)]
pub struct Addresses {}

impl Addresses {
    /// Adds what is missing to the interface and takes away what was added and is no longer wanted.
    ///
    /// # Errors
    /// Says what cannot be added.
    pub async fn set<'a>(
        &mut self,
        interface: &str,
        addresses: impl Iterator<Item = &'a IpAddr>,
    ) -> Result<(), String> {
        let _ = addresses;
        Err(format!(
            "addresses on the interface {interface} are not built yet"
        ))
    }

    /// Takes all away that were added.
    pub fn clear(&mut self) {}
}
