//! What a stack is told once, when it is made.

use core::time::Duration;

/// Who computes and verifies checksums of IP, ICMP, UDP and TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksums {
    /// Computed on sending, verified on receiving.
    #[default]
    Software,
    /// Neither: for a link inside one machine that loses and changes nothing, or a device that does it.
    /// Both ends must agree.
    Trusted,
}

/// Configuration of a [`crate::Stack`].
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Own Ethernet address. Must be unicast: a multicast bit is cleared.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes, without the Ethernet header; brought into 1280..=65521.
    pub mtu: usize,
    /// Checksums on the link. Packets to own addresses never have any.
    pub checksums: Checksums,
    /// Start of the pseudo random numbers for TCP sequence numbers, ports and identifiers: different for each boot.
    pub seed: u64,
    /// Bytes that the buffers of all TCP connections together aim at. New connections get smaller buffers the more of
    /// it is in use, so that few connections are fast and many fit.
    pub buffer_budget: usize,
    /// Smallest buffer of one direction of one TCP connection in bytes.
    pub buffer_minimum: usize,
    /// Largest buffer of one direction of one TCP connection in bytes.
    pub buffer_maximum: usize,
    /// TCP connections that may be half open at one time, over all listeners: what a flood of SYN packets can take.
    pub half_open_maximum: usize,
    /// How long a closed TCP connection is remembered (TIME-WAIT, RFC 9293 section 3.3.2). It holds no buffers.
    pub time_wait: Duration,
    /// Accept packets to any address, for a gateway: connections and datagrams to addresses that are not the stack's
    /// own are *intercepted* (see [`crate::Event::Intercepted`]) in place of being dropped.
    pub intercept: bool,
    /// With `intercept`: TCP and UDP to own addresses are intercepted too, where no socket wants them.
    pub intercept_own: bool,
}

impl Default for Configuration {
    fn default() -> Self {
        Configuration {
            mac: [0x02, 0, 0, 0, 0, 1],
            mtu: 1500,
            checksums: Checksums::Software,
            seed: 0,
            buffer_budget: 4 << 20,
            buffer_minimum: 4 << 10,
            buffer_maximum: 64 << 10,
            half_open_maximum: 4096,
            time_wait: Duration::from_secs(10),
            intercept: false,
            intercept_own: false,
        }
    }
}
