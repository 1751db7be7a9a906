//! What the link runs over.

use kiln_abi::host::Event;

use crate::{Result, host::Host};

/// A byte stream to the monitor: a Unix socket on engine `process`, a virtio console on virtual machines.
pub trait ByteStream: Send + Sync {
    /// Number of the events that tell of it ([`Event::source`]).
    fn source(&self) -> u32;

    /// Takes note of an event (a device's interrupt status, freed buffers) before data is moved.
    fn acknowledge(&self, event: Event) {
        let _ = event;
    }

    /// Receives what there is: bytes, and descriptors where the engine has them. Returns how many of each; 0 bytes is
    /// the end of the stream.
    ///
    /// # Errors
    /// `EAGAIN` when there is nothing now; other errors end the link.
    fn receive(&self, bytes: &mut [u8], descriptors: &mut [i32]) -> Result<(usize, usize)>;

    /// Sends as much as there is room for.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room now (an event tells when there is); other errors end the link.
    fn send(&self, bytes: &[u8]) -> Result<usize>;

    /// Whether the other side has taken all that was sent, so that it arrives even if the instance ends now. When not, an event
    /// tells of more.
    fn taken(&self) -> bool {
        true
    }

    /// Whether a receive that gives fewer bytes than there was room for means that nothing is left, so that more makes
    /// an event.
    fn short_means_drained(&self) -> bool {
        false
    }
}

/// A stream socket of the host.
pub struct DescriptorStream {
    host: Host,
    descriptor: i32,
}

impl DescriptorStream {
    /// A stream over `descriptor`, whose events are switched on.
    ///
    /// # Errors
    /// What the host says when it cannot watch the descriptor.
    pub fn new(host: Host, descriptor: i32) -> Result<DescriptorStream> {
        host.descriptor_watch(descriptor)?;
        Ok(DescriptorStream { host, descriptor })
    }
}

impl ByteStream for DescriptorStream {
    fn source(&self) -> u32 {
        self.descriptor.cast_unsigned()
    }

    fn receive(&self, bytes: &mut [u8], descriptors: &mut [i32]) -> Result<(usize, usize)> {
        self.host
            .descriptor_receive(self.descriptor, bytes, descriptors)
    }

    fn send(&self, bytes: &[u8]) -> Result<usize> {
        self.host.descriptor_send(self.descriptor, bytes)
    }
}
