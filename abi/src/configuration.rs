//! What one run adds to an image's manifest. The kernel gets it as [`crate::encoding`] says; the monitor keeps it as JSON.

use alloc::{collections::BTreeMap, string::String, vec::Vec};
use core::{mem, net::IpAddr};
use serde::{Deserialize, Serialize};

use crate::{
    encoding::{Error, Reader, Writer},
    manifest::{Program, User},
};

/// Configuration of one run. Every field may be missing: then the manifest, or a default, holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfiguration {
    /// Replaces the manifest's arguments.
    pub arguments: Option<Vec<String>>,
    /// Added to the manifest's environment, replacing what has the same name.
    pub environment: BTreeMap<String, String>,
    /// Replaces the working directory.
    pub working_directory: Option<String>,
    /// Replaces the user.
    pub user: Option<User>,
    /// Host name; default `kiln`.
    pub hostname: Option<String>,
    /// How the program reaches the network.
    pub network: Network,
    /// Directories of the host, in the order of their link channels (see [`crate::link`]).
    pub volumes: Vec<Volume>,
    /// True when a monitor is at the other end of the link (VM: the first virtio console device).
    pub link: bool,
    /// True when the monitor sends the program's standard input ([`crate::link::ToKernel::Input`]); else it is at its end from the
    /// start, as `/dev/null` would be.
    pub input: bool,
    /// Wall clock at the start in nanoseconds since 1970, for machines without a clock.
    pub realtime: Option<u64>,
    /// What to log, in the kernel's filter syntax (`syscall=trace,net=debug`).
    pub log: Option<String>,
}

impl RunConfiguration {
    /// The bytes that the kernel gets.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.option(self.arguments.as_deref(), Writer::texts);
        writer.number(self.environment.len() as u64);
        for (name, value) in &self.environment {
            writer.text(name);
            writer.text(value);
        }
        writer.optional_text(self.working_directory.as_deref());
        writer.option(self.user, |writer, user| user.write(writer));
        writer.optional_text(self.hostname.as_deref());
        self.network.write(&mut writer);
        writer.list(&self.volumes, |writer, volume| {
            writer.text(&volume.path);
            writer.number(volume.read_only);
        });
        writer.number(self.link);
        writer.number(self.input);
        writer.option(self.realtime, Writer::number);
        writer.optional_text(self.log.as_deref());
        writer.finish()
    }

    /// Reads what [`RunConfiguration::to_bytes`] wrote.
    ///
    /// # Errors
    ///
    /// The bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        let configuration = RunConfiguration {
            arguments: reader.option(Reader::texts),
            environment: reader
                .list(|reader| (reader.text(), reader.text()))
                .into_iter()
                .collect(),
            working_directory: reader.optional_text(),
            user: reader.option(User::read),
            hostname: reader.optional_text(),
            network: Network::read(&mut reader),
            volumes: reader.list(|reader| Volume {
                path: reader.text(),
                read_only: reader.flag(),
            }),
            link: reader.flag(),
            input: reader.flag(),
            realtime: reader.option(Reader::number),
            log: reader.optional_text(),
        };
        reader.finish(configuration)
    }

    /// Moves what this run says about the program into what the image says about it.
    pub fn apply(&mut self, program: &mut Program) {
        if let Some(arguments) = self.arguments.take() {
            program.arguments.truncate(1);
            program.arguments.extend(arguments);
        }
        if !self.environment.is_empty() {
            let added = mem::take(&mut self.environment);
            program.environment.retain(|entry| {
                let name = entry.split_once('=').map_or("", |(name, _)| name);
                !added.contains_key(name)
            });
            let added = added.iter();
            program
                .environment
                .extend(added.map(|(name, value)| [name, "=", value].concat()));
        }
        if let Some(directory) = self.working_directory.take() {
            program.working_directory = directory;
        }
        if let Some(user) = self.user.take() {
            program.user = user;
        }
    }
}

/// How the program reaches the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Network {
    /// Loopback only.
    None,
    /// The host's sockets, by capability, over the link. Engine `process` only.
    Socket {
        /// Name servers for `/etc/resolv.conf`.
        name_servers: Vec<IpAddr>,
    },
    /// The kernel's own TCP/IP over frames, if there is a network device; addresses by DHCP (IPv4) and router
    /// advertisement (IPv6).
    #[default]
    Dhcp,
    /// The kernel's own TCP/IP with given addresses.
    Static(StaticNetwork),
}

impl Network {
    fn write(&self, writer: &mut Writer) {
        match self {
            Network::None => writer.number(0u64),
            Network::Socket { name_servers } => {
                writer.number(1u64);
                writer.addresses(name_servers);
            }
            Network::Dhcp => writer.number(2u64),
            Network::Static(network) => {
                writer.number(3u64);
                writer.list(&network.addresses, |writer, (address, prefix)| {
                    writer.address(address);
                    writer.number(*prefix);
                });
                writer.addresses(&network.gateways);
                writer.addresses(&network.name_servers);
                writer.option(network.mac, |writer, mac| writer.array(&mac));
                writer.option(network.mtu, Writer::number);
                writer.option(network.gateway_mac, |writer, mac| writer.array(&mac));
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Network {
        match reader.number_up_to(3) {
            0 => Network::None,
            1 => Network::Socket {
                name_servers: reader.addresses(),
            },
            2 => Network::Dhcp,
            _ => Network::Static(StaticNetwork {
                addresses: reader
                    .list(|reader| (reader.address(), reader.number_up_to(u8::MAX.into()) as u8)),
                gateways: reader.addresses(),
                name_servers: reader.addresses(),
                mac: reader.option(Reader::array),
                mtu: reader.option(|reader| reader.number_up_to(u16::MAX.into()) as u16),
                gateway_mac: reader.option(Reader::array),
            }),
        }
    }
}

/// Addresses given by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StaticNetwork {
    /// Own addresses with prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, at most one for each family.
    pub gateways: Vec<IpAddr>,
    /// The gateways' MAC address, if it is known beforehand: then nobody has to ask for it.
    pub gateway_mac: Option<[u8; 6]>,
    /// Name servers for `/etc/resolv.conf`.
    pub name_servers: Vec<IpAddr>,
    /// MAC address (process engine, whose frame stream has no device to say it).
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet in bytes (process engine; default 1500).
    pub mtu: Option<u16>,
}

/// A directory of the host in the program's file tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Absolute path in the program's file tree.
    pub path: String,
    /// No changes allowed.
    #[serde(default)]
    pub read_only: bool,
}
