//! Shared ports: several units behind one address and port, told apart by the name that a client asks for.
//!
//! | protocol | the name comes from | what the unit gets |
//! |---|---|---|
//! | `http` | target or `Host` header of the first request | the accepted connection |
//! | `tls` | server name in the ClientHello | the accepted connection; it has the certificate |
//! | `https` | server name in the ClientHello | what was inside TLS, over a socket pair |
//!
//! The first bytes are only looked at (`MSG_PEEK`) and stay where they are: with `http` and `tls` the unit gets the
//! socket itself and nothing passes through here afterwards, so such connections also survive the end of the
//! summoner. With `https` every byte passes through here, and connections end with the summoner.
//!
//! A connection belongs to the unit of its first request: a later request on it (keep-alive) for the name of another unit
//! reaches the first one all the same. Browsers do that only where one certificate is good for both names (RFC 9110,
//! section 7.4 says how a server tells them: 421).
//!
//! What always holds: a client that is not yet decided costs bounded memory and time ([`MAX_UNDECIDED`], [`HEAD_BYTES`],
//! [`PATIENCE`]); whoever asks for a name that no unit has is refused, also if there is one unit only; what a reload
//! does not change goes on listening, and no connection is touched by it.
//!
//! Not here: starting the unit and waiting for its program ([`crate::unit`]).

mod certificate;
pub mod http;
mod refuse;
mod routes;
mod serve;
mod terminate;
pub mod tls;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use kiln_abi::manifest::Protocol;
use kiln_monitor::sockets::bind_held;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::configuration::{Configuration, FrontProtocol, Unit};
use crate::unit::Handle;
use certificate::Certificates;
use routes::{Routes, Target};
use serve::{Limits, Rules};

/// Longest head of a first request, and longest ClientHello with its record headers, in bytes.
pub const HEAD_BYTES: usize = 16 << 10;
/// How long a client may take to say for whom it comes.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Most clients that have not yet said for whom they come, of all fronts. One more, and the oldest has to go.
pub const MAX_UNDECIDED: usize = 1024;
/// Most connections whose TLS ends here, of all fronts. More wait, as long as [`PATIENCE`] lasts.
pub const MAX_TERMINATED: usize = 4096;

/// Who is behind a name, by the unit's name.
struct Planned {
    pattern: String,
    unit: String,
    guest: u16,
    tls: Option<Arc<ServerConfig>>,
}

struct PlannedFront {
    name: String,
    protocol: FrontProtocol,
    listen: Vec<SocketAddr>,
    routes: Vec<Planned>,
}

/// Fronts as they are to be.
pub struct Plan {
    fronts: Vec<PlannedFront>,
}

/// A listening socket and the task that accepts from it.
struct Listening {
    rules: Arc<ArcSwap<Rules>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Listening {
    /// Takes in who waits already, and closes.
    async fn close(self) {
        let _ = self.stop.send(());
        // It failed only if it panicked, and then it is closed too.
        let _ = self.task.await;
    }
}

/// The fronts that are open.
#[derive(Default)]
pub struct Fronts {
    open: HashMap<SocketAddr, Listening>,
    limits: Arc<Limits>,
}

impl Fronts {
    /// Checks what the fronts need (certificates) and who is behind them. Reads files.
    ///
    /// # Errors
    /// Says what is wrong, with the file and what to do.
    pub fn plan<'a>(
        configuration: &Configuration,
        units: impl Iterator<Item = &'a Unit>,
    ) -> Result<Plan, String> {
        let mut certificates = Certificates::default();
        let mut fronts: HashMap<&str, PlannedFront> = HashMap::new();
        for front in configuration.fronts.values() {
            if let (FrontProtocol::Https, Some(certificate), Some(key)) =
                (front.protocol, &front.certificate, &front.key)
            {
                // Also if each unit has its own: a mistake is told when it is made.
                certificates
                    .load(certificate, key)
                    .map_err(|error| format!("front '{}': {error}", front.name))?;
            }
            let planned = PlannedFront {
                name: front.name.clone(),
                protocol: front.protocol,
                listen: front.listen.clone(),
                routes: Vec::new(),
            };
            fronts.insert(&front.name, planned);
        }
        for unit in units {
            for one in &unit.fronts {
                let (Some(front), Some(planned)) = (
                    configuration.fronts.get(&one.front),
                    fronts.get_mut(one.front.as_str()),
                ) else {
                    return Err(format!(
                        "unit '{}': there is no front '{}'",
                        unit.name, one.front
                    ));
                };
                let tls = if front.protocol == FrontProtocol::Https {
                    let (owner, files) = match (&unit.certificate, &unit.key) {
                        (Some(certificate), Some(key)) => {
                            (format!("unit '{}'", unit.name), Some((certificate, key)))
                        }
                        _ => (
                            format!("front '{}'", front.name),
                            front.certificate.as_ref().zip(front.key.as_ref()),
                        ),
                    };
                    let (certificate, key) = files.ok_or_else(|| format!(
                        "front '{}': there is no certificate for unit '{}': add 'certificate' and 'key' to the front or the unit",
                        front.name, unit.name
                    ))?;
                    let config = certificates
                        .load(certificate, key)
                        .map_err(|error| format!("{owner}: {error}"))?;
                    for name in &unit.dns {
                        certificates.warn_of_name(certificate, name);
                    }
                    Some(config)
                } else {
                    None
                };
                planned.routes.extend(unit.dns.iter().map(|name| Planned {
                    pattern: name.clone(),
                    unit: unit.name.clone(),
                    guest: one.port,
                    tls: tls.clone(),
                }));
            }
        }
        Ok(Plan {
            fronts: fronts.into_values().collect(),
        })
    }

    /// Opens what is missing, closes what is no longer wanted, and leaves connections alone.
    ///
    /// # Errors
    /// Names the address that cannot be had.
    pub async fn set(
        &mut self,
        plan: Plan,
        unit: impl Fn(&str) -> Option<Handle>,
    ) -> Result<(), String> {
        let mut wanted: HashMap<SocketAddr, Arc<Rules>> = HashMap::new();
        for front in plan.fronts {
            let mut routes = Routes::default();
            for planned in front.routes {
                if let Some(unit) = unit(&planned.unit) {
                    let target = Target {
                        unit,
                        guest: planned.guest,
                        tls: planned.tls,
                    };
                    routes.insert(&planned.pattern, target);
                }
            }
            let rules = Arc::new(Rules {
                name: front.name,
                protocol: front.protocol,
                routes,
            });
            for address in front.listen {
                wanted.insert(address, Arc::clone(&rules));
            }
        }
        drop(unit);
        // Those that go, first: what is new may want their ports.
        let gone: Vec<_> = self
            .open
            .keys()
            .filter(|address| !wanted.contains_key(address))
            .copied()
            .collect();
        for address in gone {
            if let Some(listening) = self.open.remove(&address) {
                listening.close().await;
            }
        }
        for (address, rules) in wanted {
            if let Some(listening) = self.open.get(&address) {
                listening.rules.store(rules);
                continue;
            }
            let listener =
                listen(address).map_err(|error| format!("front '{}': {error}", rules.name))?;
            let rules = Arc::new(ArcSwap::new(rules));
            let (stop, stopped) = oneshot::channel();
            let task = tokio::spawn(serve::accept(
                listener,
                Arc::clone(&rules),
                Arc::clone(&self.limits),
                stopped,
            ));
            self.open.insert(address, Listening { rules, stop, task });
        }
        Ok(())
    }

    /// Where they listen.
    pub fn listening(&self) -> impl Iterator<Item = SocketAddr> {
        self.open.keys().copied()
    }
}

/// A socket that listens with Linux's longest queue; those for IPv6 take nothing else.
fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    let socket =
        bind_held(address, Protocol::Tcp, address.port()).map_err(|error| match error.help() {
            Some(help) => format!("{error} ({help})"),
            None => error.to_string(),
        })?;
    let cannot = |error: io::Error| format!("cannot listen at {address}: {error}");
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true).map_err(cannot)?;
    TcpListener::from_std(listener).map_err(cannot)
}
