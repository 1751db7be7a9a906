//! What the kernel's own TCP/IP runs over.

use kiln_abi::host::Event;

/// An Ethernet link: a virtio network device, or a stream of frames to the monitor.
///
/// No call blocks. Frames are without a check sequence.
pub trait FrameDevice: Send {
    /// Own Ethernet address.
    fn mac(&self) -> [u8; 6];

    /// Largest IP packet in bytes.
    fn mtu(&self) -> usize;

    /// Number of the events that tell of it ([`Event::source`]).
    fn source(&self) -> u32;

    /// Takes note of an event (a device's interrupt status) before frames are moved.
    fn acknowledge(&mut self, event: Event) {
        let _ = event;
    }

    /// The next received frame, valid until the next call.
    fn receive(&mut self) -> Option<&[u8]>;

    /// Whether a frame of the largest size can be sent now. When not, an event comes when it can.
    fn has_room(&self) -> bool;

    /// Room for one frame of `length` bytes, whose content is undefined; `None` when there is none.
    fn reserve(&mut self, length: usize) -> Option<&mut [u8]>;

    /// Queues the frame that was last reserved.
    fn commit(&mut self);

    /// Hands all queued frames to the other side (one doorbell, one write).
    fn flush(&mut self);
}
