//! Sockets.
#![allow(missing_docs)]

mod device;

use alloc::{boxed::Box, sync::Arc};

use kiln_abi::{configuration::Network, link::ToKernel};

use crate::{
    event::Events,
    host::Host,
    link::{HostDescriptor, Link},
};

pub use device::FrameDevice;

/// The network of the kernel.
pub struct Net {}

impl Net {
    /// The network as configured: loopback and Unix sockets always; `link` serves `--net socket`, `device` the kernel's
    /// own TCP/IP (when there is none, addresses other than the machine's own are unreachable).
    #[must_use]
    pub fn new(
        host: Host,
        events: &Arc<Events>,
        link: Option<&Arc<Link>>,
        configuration: &Network,
        device: Option<Box<dyn FrameDevice>>,
    ) -> Net {
        let _ = (host, events, link, configuration, device);
        Net {}
    }

    /// Does what is due at `now` (monotonic nanoseconds): packets that came, timers, packets to send. To be called by the
    /// main loop after events and before it waits. Gives the next deadline, if there is one.
    pub fn poll(&self, now: u64) -> Option<u64> {
        let _ = now;
        None
    }

    /// A message of the monitor about connections or datagram sockets.
    pub fn receive(&self, message: ToKernel, descriptor: Option<HostDescriptor>) {
        let _ = (message, descriptor);
    }
}
