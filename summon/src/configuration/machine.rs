//! What the checks must know about this machine.

use std::fs;

/// What this machine allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Lowest port that may be bound (ip(7), `ip_unprivileged_port_start`; 0 with `CAP_NET_BIND_SERVICE`).
    pub first_port: u16,
    /// Addresses may be added to interfaces (`CAP_NET_ADMIN`).
    pub may_add_addresses: bool,
    /// Named files and directories must exist. False: they are not looked for.
    pub look_for_files: bool,
}

/// Bits of the capabilities in `CapEff` of proc_pid_status(5); numbers from capabilities(7), `linux/capability.h`.
const NET_BIND_SERVICE: u32 = 10;
const NET_ADMIN: u32 = 12;

impl Machine {
    /// This machine, for this process.
    #[must_use]
    pub fn current() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let start = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
        Self::from_texts(&status, start.as_deref().unwrap_or_default())
    }

    fn from_texts(status: &str, start: &str) -> Self {
        let capabilities = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .unwrap_or(0);
        let has = |bit: u32| capabilities >> bit & 1 == 1;
        let first_port = if has(NET_BIND_SERVICE) {
            0
        } else {
            start.trim().parse().unwrap_or(1024)
        };
        Self {
            first_port,
            may_add_addresses: has(NET_ADMIN),
            look_for_files: true,
        }
    }

    /// A machine that allows everything and has no files: for checks of a text alone.
    #[must_use]
    pub fn anything() -> Self {
        Self {
            first_port: 0,
            may_add_addresses: true,
            look_for_files: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_decide_not_the_user_number() {
        let root = Machine::from_texts("Name:\tx\nCapEff:\t000001ffffffffff\n", "1024\n");
        assert_eq!((root.first_port, root.may_add_addresses), (0, true));
        let user = Machine::from_texts("CapEff:\t0000000000000000\n", "80\n");
        assert_eq!((user.first_port, user.may_add_addresses), (80, false));
        let unknown = Machine::from_texts("", "");
        assert_eq!(
            (unknown.first_port, unknown.may_add_addresses),
            (1024, false)
        );
        assert!(Machine::current().look_for_files);
    }
}
