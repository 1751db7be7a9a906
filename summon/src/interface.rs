//! Addresses of units on an interface of this machine, such as a bridge (rtnetlink(7)).
//!
//! What is added is noted in the store before it is there, and forgotten after it is gone. So a summoner that was killed leaves
//! nothing for ever: the next one takes over what is still wanted and takes away the rest. An address that the machine has already
//! is used as it is, and never taken away.
//!
//! Not here: which unit has which address ([`crate::address`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily as Family, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice};

use crate::store::{Change, Store};

/// How long the kernel may take to answer. It does so at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest message of the kernel in bytes (netlink(7) and its users: 32 KiB).
const LARGEST: usize = 64 << 10;

/// Whether this machine, or the network namespace that this process is in, has an interface. True if it cannot be told.
#[must_use]
pub fn exists(interface: &str) -> bool {
    let Ok(kernel) = Kernel::open() else {
        return true;
    };
    !matches!(
        netdevice::name_to_index(&kernel.socket, interface),
        Err(Errno::NODEV | Errno::NXIO)
    )
}

/// An address on an interface.
type Place = (String, IpAddr);

/// Addresses that were added, to be taken away again.
pub struct Addresses {
    store: Arc<Store>,
    /// What this one has added itself.
    new: BTreeSet<Place>,
}

impl Addresses {
    /// Those that are noted in a store.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            new: BTreeSet::new(),
        }
    }

    /// Adds to an interface what is missing. Loopback addresses are there without that.
    ///
    /// # Errors
    /// Says what cannot be added.
    pub fn add<'a>(
        &mut self,
        interface: &str,
        addresses: impl Iterator<Item = &'a IpAddr>,
    ) -> Result<(), String> {
        let wanted: BTreeSet<IpAddr> = addresses
            .filter(|address| !address.is_loopback())
            .copied()
            .collect();
        let ours = self.ours()?;
        let mut kernel = Kernel::open().map_err(|error| format!("cannot use netlink: {error}"))?;
        let index = kernel.index(interface)?;
        let present = kernel
            .addresses()
            .map_err(|error| format!("cannot list this machine's addresses: {error}"))?;
        let missing: Vec<IpAddr> = wanted
            .into_iter()
            .filter(|address| !present.contains_key(address))
            .collect();
        let notes: Vec<Change> = missing
            .iter()
            .map(|address| (interface.to_owned(), *address))
            .filter(|place| !ours.contains(place))
            .map(|(interface, address)| Change::Address(interface, address, true))
            .collect();
        self.store
            .write(&notes)
            .map_err(|error| error.to_string())?;
        for address in missing {
            self.new.insert((interface.to_owned(), address));
            match kernel.change(index, address, true) {
                Ok(()) => tracing::debug!("added {address} to {interface}"),
                Err(Errno::PERM) => {
                    return Err(format!(
                        "adding {address} to {interface} needs root (CAP_NET_ADMIN)"
                    ));
                }
                Err(error) => return Err(format!("cannot add {address} to {interface}: {error}")),
            }
        }
        Ok(())
    }

    /// Takes away what was added and is not among these.
    pub fn keep<'a>(
        &mut self,
        interface: Option<&str>,
        addresses: impl Iterator<Item = &'a IpAddr>,
    ) {
        let wanted: BTreeSet<IpAddr> = addresses.copied().collect();
        match self.ours() {
            Ok(mut ours) => {
                ours.retain(|(on, address)| {
                    Some(on.as_str()) != interface || !wanted.contains(address)
                });
                self.remove(ours);
            }
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// Takes away what this one has added, and leaves what was there before.
    pub fn undo(&mut self) {
        let new = std::mem::take(&mut self.new);
        self.remove(new);
    }

    fn remove(&mut self, gone: BTreeSet<Place>) {
        if gone.is_empty() {
            return;
        }
        let mut kernel = match Kernel::open() {
            Ok(kernel) => kernel,
            Err(error) => {
                tracing::error!("cannot use netlink: {error}");
                return;
            }
        };
        let mut forgotten = Vec::with_capacity(gone.len());
        for (on, address) in gone {
            let outcome = match netdevice::name_to_index(&kernel.socket, &on) {
                Ok(index) => kernel.change(index, address, false),
                Err(error) => Err(error),
            };
            match outcome {
                // Not there any more, or the interface is not.
                Ok(()) | Err(Errno::ADDRNOTAVAIL | Errno::NODEV | Errno::NXIO) => {
                    tracing::debug!("took {address} from {on}");
                    forgotten.push(Change::Address(on, address, false));
                }
                Err(error) => tracing::error!(
                    "cannot take {address} from {on}: {error} (as root: ip address del {address} dev {on})"
                ),
            }
        }
        if let Err(error) = self.store.write(&forgotten) {
            tracing::error!("{error}");
        }
    }

    /// Takes all away that were added.
    pub fn clear(&mut self) {
        self.keep(None, std::iter::empty());
    }

    fn ours(&self) -> Result<BTreeSet<Place>, String> {
        self.store.addresses().map_err(|error| error.to_string())
    }
}

/// A conversation with the kernel about addresses.
struct Kernel {
    socket: OwnedFd,
    number: u32,
}

impl Kernel {
    fn open() -> Result<Self, Errno> {
        // Protocol 0 is NETLINK_ROUTE. A socket without a destination speaks to the kernel.
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, number: 0 })
    }

    fn index(&self, interface: &str) -> Result<u32, String> {
        netdevice::name_to_index(&self.socket, interface).map_err(|error| match error {
            Errno::NODEV | Errno::NXIO => {
                format!("there is no interface {interface} here: 'ip link' lists the interfaces")
            }
            error => format!("cannot use the interface {interface}: {error}"),
        })
    }

    /// Asks, and takes the parts of the answer until its end.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut part: impl FnMut(RouteNetlinkMessage),
    ) -> Result<(), Errno> {
        self.number = self.number.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.number;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; LARGEST];
        loop {
            let (_, length) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC)?;
            let mut rest = buffer.get(..length).ok_or(Errno::MSGSIZE)?;
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|_| Errno::PROTO)?;
                let length = usize::try_from(answer.header.length).map_err(|_| Errno::PROTO)?;
                // Messages begin at multiples of four bytes.
                let next = length.max(1).next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
                if answer.header.sequence_number != self.number {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => part(inner),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(code) => Err(Errno::from_raw_os_error(-code.get())),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    /// All addresses of this machine, with their interfaces.
    fn addresses(&mut self) -> Result<BTreeMap<IpAddr, u32>, Errno> {
        let mut all = BTreeMap::new();
        self.ask(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            NLM_F_DUMP,
            |part| {
                let RouteNetlinkMessage::NewAddress(message) = part else {
                    return;
                };
                let (mut local, mut other) = (None, None);
                for attribute in &message.attributes {
                    match attribute {
                        AddressAttribute::Local(address) => local = Some(*address),
                        AddressAttribute::Address(address) => other = Some(*address),
                        _ => {}
                    }
                }
                // On a point-to-point link the other one is the far end's.
                if let Some(address) = local.or(other) {
                    all.insert(address, message.header.index);
                }
            },
        )?;
        Ok(all)
    }

    /// Adds an address, by itself (/32, /128), or takes it away. One that is there already is fine.
    fn change(&mut self, index: u32, address: IpAddr, add: bool) -> Result<(), Errno> {
        let mut message = AddressMessage::default();
        (message.header.family, message.header.prefix_len) = match address {
            IpAddr::V4(_) => (Family::Inet, 32),
            IpAddr::V6(_) => (Family::Inet6, 128),
        };
        message.header.index = index;
        message.header.scope = AddressScope::Universe;
        // To be bound at once: without waiting whether another machine has it (RFC 4862, section 5.4).
        message.header.flags = if address.is_ipv6() {
            AddressHeaderFlags::Nodad
        } else {
            AddressHeaderFlags::empty()
        };
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        if !add {
            return self.ask(RouteNetlinkMessage::DelAddress(message), NLM_F_ACK, |_| {});
        }
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self.ask(RouteNetlinkMessage::NewAddress(message), flags, |_| {}) {
            Err(Errno::EXIST) => Ok(()),
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Runs a test again in a network namespace of its own, with an interface `bridge0`. True: it is to do its work, in there.
    /// Needs root.
    fn in_namespace(name: &str) -> bool {
        if std::env::var_os("KILN_TEST_NAMESPACE").is_some() {
            return true;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: not tested");
            return false;
        }
        let script = "ip link set lo up && ip link add bridge0 type bridge && ip link set bridge0 up && exec \"$0\" --exact \"$1\" --nocapture";
        let status = Command::new("unshare")
            .args(["-n", "sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .arg(format!("interface::tests::{name}"))
            .env("KILN_TEST_NAMESPACE", "1")
            .stdin(Stdio::null())
            .status()
            .expect("unshare is installed");
        assert!(status.success());
        false
    }

    fn shown() -> String {
        let output = Command::new("ip")
            .args(["-o", "address", "show", "dev", "bridge0", "scope", "global"])
            .output()
            .expect("ip is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn store(folder: &tempfile::TempDir) -> Arc<Store> {
        Arc::new(Store::open(&folder.path().join("store.redb")).unwrap())
    }

    #[test]
    fn addresses_come_and_go() {
        if !in_namespace("addresses_come_and_go") {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let all: Vec<IpAddr> = [
            "192.0.2.7",
            "192.0.2.8",
            "fd00:7::7",
            "127.5.5.5",
            "192.0.2.1",
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect();
        let status = Command::new("ip")
            .args(["address", "add", "192.0.2.1/24", "dev", "bridge0"])
            .status();
        assert!(status.unwrap().success());
        let mut addresses = Addresses::new(store(&folder));
        addresses.add("bridge0", all.iter()).unwrap();
        addresses.add("bridge0", all.iter()).unwrap();
        let now = shown();
        for word in [
            "192.0.2.7/32",
            "192.0.2.8/32",
            "fd00:7::7/128",
            "192.0.2.1/24",
        ] {
            assert!(now.contains(word), "{word}: {now}");
        }
        assert!(
            !now.contains("127.5.5.5") && !now.contains("192.0.2.1/32"),
            "{now}"
        );
        // They can be bound at once.
        for address in &all {
            std::net::TcpListener::bind((*address, 80)).unwrap();
        }
        addresses.keep(Some("bridge0"), all[..1].iter());
        let now = shown();
        assert!(
            now.contains("192.0.2.7/32") && now.contains("192.0.2.1/24"),
            "{now}"
        );
        assert!(
            !now.contains("192.0.2.8") && !now.contains("fd00:7::7"),
            "{now}"
        );
        // A summoner that was killed: the next one knows, also if somebody has taken one away in between.
        drop(addresses);
        let mut addresses = Addresses::new(store(&folder));
        addresses.add("bridge0", all[..2].iter()).unwrap();
        let status = Command::new("ip")
            .args(["address", "del", "192.0.2.8/32", "dev", "bridge0"])
            .status();
        assert!(status.unwrap().success());
        drop(addresses);
        let mut addresses = Addresses::new(store(&folder));
        addresses.clear();
        let now = shown();
        assert!(
            now.contains("192.0.2.1/24") && now.lines().count() == 1,
            "{now}"
        );
        assert!(addresses.ours().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let mut addresses = Addresses::new(store(&folder));
        let address = ["192.0.2.7".parse().unwrap()];
        let error = addresses.add("none0", address.iter()).unwrap_err();
        assert!(
            error.contains("no interface none0") && error.contains("ip link"),
            "{error}"
        );
        addresses.clear();
        if !in_namespace("what_cannot_be_is_said") {
            return;
        }
        // Without the right to change anything.
        let nobody = Command::new("setpriv")
            .args([
                "--bounding-set",
                "-net_admin",
                "--inh-caps",
                "-net_admin",
                "sh",
                "-c",
            ])
            .arg("exec \"$0\" --exact interface::tests::without_right --ignored --nocapture")
            .arg(std::env::current_exe().unwrap())
            .status()
            .expect("setpriv is installed");
        assert!(nobody.success());
    }

    #[test]
    #[ignore = "a part of the test before"]
    fn without_right() {
        if std::env::var_os("KILN_TEST_NAMESPACE").is_none() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut addresses = Addresses::new(store(&folder));
        let address = ["192.0.2.7".parse().unwrap()];
        let error = addresses.add("bridge0", address.iter()).unwrap_err();
        assert!(error.contains("needs root"), "{error}");
        assert!(!shown().contains("192.0.2.7"));
    }
}
