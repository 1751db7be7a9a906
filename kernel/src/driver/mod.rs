//! Devices: what the link and the network run over on each engine.

pub mod frames;
pub mod virtio;

use alloc::{boxed::Box, format, string::String, sync::Arc};

use kiln_abi::{
    configuration::Network,
    host::{BootInformation, Engine, MmioDevice},
};

use crate::{
    Kernel, Result,
    driver::frames::FrameStream,
    host::Host,
    link::{ByteStream, DescriptorStream},
    net::FrameDevice,
};

/// Largest packet where nobody says another.
const DEFAULT_MTU: usize = 1500;

/// The byte stream to the monitor.
///
/// # Errors
/// In words, when the engine has none although the run's configuration says that there is a monitor.
pub fn link(
    kernel: &Arc<Kernel>,
    boot: &'static BootInformation,
) -> core::result::Result<Arc<dyn ByteStream>, String> {
    match kernel.engine {
        Engine::Process => {
            let stream = DescriptorStream::new(kernel.host, boot.link_descriptor)
                .map_err(|error| format!("the link to the monitor cannot be used: {error}"))?;
            Ok(Arc::new(stream))
        }
        Engine::Vm => {
            let device = find(boot, virtio::kind::CONSOLE)
                .ok_or("there is no virtio console for the link to the monitor")?;
            Ok(Arc::new(virtio::console::Console::new(device)?))
        }
    }
}

/// The network device, if there is one.
///
/// # Errors
/// In words, when there is one that cannot be used.
pub fn network(
    kernel: &Arc<Kernel>,
    boot: &'static BootInformation,
) -> core::result::Result<Option<Box<dyn FrameDevice>>, String> {
    match kernel.engine {
        Engine::Process if boot.network_descriptor < 0 => Ok(None),
        Engine::Process => {
            let (mac, mtu) = match &kernel.configuration.network {
                Network::Static(network) => (network.mac, network.mtu),
                _ => (None, None),
            };
            let mac = mac.map_or_else(|| random_address(&kernel.host), Ok);
            let mtu = mtu.map_or(DEFAULT_MTU, usize::from);
            let stream = mac
                .and_then(|mac| FrameStream::new(kernel.host, boot.network_descriptor, mac, mtu));
            Ok(Some(stream.map_err(|error| {
                format!("the frames of the network cannot be used: {error}")
            })?))
        }
        Engine::Vm => match find(boot, virtio::kind::NETWORK) {
            Some(device) => Ok(Some(virtio::network::Card::new(device)?)),
            None => Ok(None),
        },
    }
}

/// A random Ethernet address: locally administered, of one station.
fn random_address(host: &Host) -> Result<[u8; 6]> {
    let mut address = [0; 6];
    host.entropy(&mut address)?;
    address[0] = address[0] & 0xfc | 0x02;
    Ok(address)
}

/// The first virtio device of a kind.
fn find(boot: &'static BootInformation, kind: u32) -> Option<&'static MmioDevice> {
    virtio::memory::start(boot);
    boot.devices
        .iter()
        .take(boot.device_count as usize)
        .find(|device| device.kind == kind)
}
