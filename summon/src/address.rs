//! The pool from which each unit has its own address.
//!
//! Leases are by unit name and last: a unit keeps its address when the summoner or its configuration is started anew, as
//! clients may have kept the name server's answer. Whoever calls this stores them ([`crate::store`]); nothing here touches an interface.
//!
//! What always holds: no two units have the same leased address, and none is reserved, or one that means something else to the
//! network or to other programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// Loopback addresses that other programs use by custom: everybody's localhost, systemd-resolved's two, the host's own name
/// on Debian, dnsmasq's and others' local resolvers.
const CUSTOMARY: [Ipv4Addr; 6] = [
    Ipv4Addr::new(127, 0, 0, 1),
    Ipv4Addr::new(127, 0, 0, 2),
    Ipv4Addr::new(127, 0, 0, 53),
    Ipv4Addr::new(127, 0, 0, 54),
    Ipv4Addr::new(127, 0, 1, 1),
    Ipv4Addr::new(127, 1, 1, 1),
];

/// No address is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "all {leased} addresses of {pool} are given out: choose a larger pool, or give units a fixed address"
)]
pub struct Exhausted {
    /// The pool.
    pub pool: IpNet,
    /// How many units have one.
    pub leased: usize,
}

/// A prefix of addresses, and who has which.
#[derive(Clone, Debug)]
pub struct Pool {
    prefix: IpNet,
    reserved: BTreeSet<IpAddr>,
    by_unit: BTreeMap<String, IpAddr>,
    taken: BTreeSet<IpAddr>,
    /// Where the search for a free one goes on: an address that was given back rests as long as possible.
    next: u128,
}

impl Pool {
    /// A pool with the leases of an earlier time. Those that no longer fit (another prefix, reserved since) are left out.
    #[must_use]
    pub fn new(
        prefix: IpNet,
        reserved: impl IntoIterator<Item = IpAddr>,
        leases: impl IntoIterator<Item = (String, IpAddr)>,
    ) -> Self {
        let mut pool = Self {
            prefix: prefix.trunc(),
            reserved: reserved.into_iter().collect(),
            by_unit: BTreeMap::new(),
            taken: BTreeSet::new(),
            next: 0,
        };
        for (unit, address) in leases {
            if pool.may_give(address)
                && !pool.by_unit.contains_key(&unit)
                && pool.taken.insert(address)
            {
                pool.next = pool.next.max(pool.offset(address).saturating_add(1));
                pool.by_unit.insert(unit, address);
            }
        }
        pool
    }

    /// The prefix.
    #[must_use]
    pub fn prefix(&self) -> IpNet {
        self.prefix
    }

    /// A unit's address: the one it has, or a free one.
    ///
    /// # Errors
    /// When none is free.
    pub fn lease(&mut self, unit: &str) -> Result<IpAddr, Exhausted> {
        if let Some(address) = self.by_unit.get(unit) {
            return Ok(*address);
        }
        let address = self.free().ok_or(Exhausted {
            pool: self.prefix,
            leased: self.by_unit.len(),
        })?;
        self.taken.insert(address);
        self.by_unit.insert(unit.to_owned(), address);
        self.next = self.offset(address).saturating_add(1);
        Ok(address)
    }

    /// The address that a unit has.
    #[must_use]
    pub fn get(&self, unit: &str) -> Option<IpAddr> {
        self.by_unit.get(unit).copied()
    }

    /// Gives a unit's address back. Returns it.
    pub fn release(&mut self, unit: &str) -> Option<IpAddr> {
        let address = self.by_unit.remove(unit)?;
        self.taken.remove(&address);
        Some(address)
    }

    /// All leases, by unit.
    pub fn leases(&self) -> impl Iterator<Item = (&str, IpAddr)> {
        self.by_unit
            .iter()
            .map(|(unit, address)| (unit.as_str(), *address))
    }

    /// The next address that may be given, from where the last search ended, once around.
    fn free(&self) -> Option<IpAddr> {
        let size = size(self.prefix);
        let start = if self.next < size { self.next } else { 0 };
        // Among one more than all that cannot be given lies one that can, so this ends soon in the largest prefix too.
        let unusable = self.reserved.len() + self.taken.len() + CUSTOMARY.len() + 2;
        let steps = u128::try_from(unusable)
            .unwrap_or(u128::MAX)
            .saturating_add(1)
            .min(size);
        (0..steps)
            .map(|step| {
                let offset = start + step;
                if offset < size { offset } else { offset - size }
            })
            .map(|offset| self.at(offset))
            .find(|address| !self.taken.contains(address) && self.may_give(*address))
    }

    fn at(&self, offset: u128) -> IpAddr {
        match self.prefix.network() {
            IpAddr::V4(first) => {
                let offset = u32::try_from(offset).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(first).wrapping_add(offset)))
            }
            IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first).wrapping_add(offset))),
        }
    }

    fn offset(&self, address: IpAddr) -> u128 {
        match (self.prefix.network(), address) {
            (IpAddr::V4(first), IpAddr::V4(address)) => {
                u128::from(u32::from(address).wrapping_sub(u32::from(first)))
            }
            (IpAddr::V6(first), IpAddr::V6(address)) => {
                u128::from(address).wrapping_sub(u128::from(first))
            }
            _ => 0,
        }
    }

    fn may_give(&self, address: IpAddr) -> bool {
        usable(self.prefix, address) && !self.reserved.contains(&address)
    }
}

/// How many addresses a pool can give, with those that are reserved left out.
#[must_use]
pub fn capacity(prefix: IpNet, reserved: &[IpAddr]) -> u128 {
    let prefix = prefix.trunc();
    let mut never: BTreeSet<IpAddr> = reserved.iter().copied().collect();
    never.extend(CUSTOMARY.map(IpAddr::V4));
    never.extend([prefix.network(), prefix.broadcast()]);
    let never = never
        .iter()
        .filter(|address| prefix.contains(*address))
        .count();
    size(prefix).saturating_sub(never as u128)
}

/// Not the first (of all routers in IPv6, RFC 4291, section 2.6.1; of the network in IPv4), not the last (broadcast), and none that others use by
/// custom.
fn usable(prefix: IpNet, address: IpAddr) -> bool {
    prefix.contains(&address)
        && address != prefix.network()
        && address != prefix.broadcast()
        && !matches!(address, IpAddr::V4(address) if CUSTOMARY.contains(&address))
}

/// Addresses in a prefix; one less than there are for all of IPv6.
fn size(prefix: IpNet) -> u128 {
    let bits = u32::from(prefix.max_prefix_len() - prefix.prefix_len());
    1u128.checked_shl(bits).unwrap_or(u128::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(prefix: &str, reserved: &[&str], leases: &[(&str, &str)]) -> Pool {
        Pool::new(
            prefix.parse().unwrap(),
            reserved.iter().map(|text| text.parse().unwrap()),
            leases
                .iter()
                .map(|(unit, text)| ((*unit).to_owned(), text.parse().unwrap())),
        )
    }

    fn lease(pool: &mut Pool, unit: &str) -> String {
        pool.lease(unit).unwrap().to_string()
    }

    #[test]
    fn a_unit_keeps_its_address() {
        let mut first = pool("127.78.0.0/16", &[], &[]);
        assert_eq!(lease(&mut first, "a"), "127.78.0.1");
        assert_eq!(lease(&mut first, "b"), "127.78.0.2");
        assert_eq!(lease(&mut first, "a"), "127.78.0.1");
        let leases: Vec<(String, IpAddr)> = first
            .leases()
            .map(|(unit, address)| (unit.to_owned(), address))
            .collect();
        let mut second = Pool::new(first.prefix(), [], leases);
        assert_eq!(lease(&mut second, "c"), "127.78.0.3");
        assert_eq!(lease(&mut second, "b"), "127.78.0.2");
        assert_eq!(second.get("a"), first.get("a"));
        assert_eq!(second.get("x"), None);
    }

    #[test]
    fn addresses_with_a_meaning_are_not_given_out() {
        let mut small = pool("127.0.0.0/29", &["127.0.0.4"], &[]);
        assert_eq!(capacity(small.prefix(), &["127.0.0.4".parse().unwrap()]), 3);
        let given: Vec<String> = ["a", "b", "c"].map(|unit| lease(&mut small, unit)).into();
        assert_eq!(given, ["127.0.0.3", "127.0.0.5", "127.0.0.6"]);
        let error = small.lease("d").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("all 3 addresses of 127.0.0.0/29"),
            "{error}"
        );
        assert!(error.to_string().contains("larger pool"));
    }

    #[test]
    fn what_is_given_back_rests_before_it_is_used_again() {
        let mut small = pool("10.0.0.0/29", &[], &[]);
        assert_eq!(lease(&mut small, "a"), "10.0.0.1");
        assert_eq!(small.release("a").unwrap().to_string(), "10.0.0.1");
        assert_eq!(small.release("a"), None);
        for (unit, address) in [("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 6), ("g", 1)] {
            assert_eq!(lease(&mut small, unit), format!("10.0.0.{address}"));
        }
        assert!(small.lease("h").is_err());
    }

    #[test]
    fn leases_that_no_longer_fit_are_replaced() {
        let mut moved = pool(
            "127.78.0.0/16",
            &["127.78.0.9"],
            &[
                ("old", "127.5.0.1"),
                ("taken", "127.78.0.9"),
                ("kept", "127.78.0.7"),
                ("twin", "127.78.0.7"),
                ("six", "fd00::1"),
            ],
        );
        assert_eq!(moved.leases().count(), 1);
        assert_eq!(lease(&mut moved, "kept"), "127.78.0.7");
        assert_eq!(lease(&mut moved, "old"), "127.78.0.8");
        assert_eq!(lease(&mut moved, "taken"), "127.78.0.10");
    }

    #[test]
    fn large_and_tiny_pools() {
        let mut huge = pool("::/0", &[], &[]);
        assert_eq!(lease(&mut huge, "a"), "::1");
        let mut six = pool("fd00:1::/64", &["fd00:1::1"], &[]);
        assert_eq!(lease(&mut six, "a"), "fd00:1::2");
        for prefix in ["10.0.0.1/32", "10.0.0.0/31", "fd00::/128"] {
            assert!(pool(prefix, &[], &[]).lease("a").is_err(), "{prefix}");
            assert_eq!(capacity(prefix.parse().unwrap(), &[]), 0, "{prefix}");
        }
        assert_eq!(capacity("127.78.0.0/16".parse().unwrap(), &[]), 65534);
    }

    #[test]
    fn capacity_is_what_can_really_be_given() {
        for prefix in ["127.0.0.0/26", "127.0.1.0/28", "10.0.0.0/30", "fd00::/122"] {
            let reserved: Vec<IpAddr> = ["127.0.0.9", "10.0.0.1", "fd00::5"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect();
            let mut pool = Pool::new(prefix.parse().unwrap(), reserved.iter().copied(), []);
            let mut count = 0u128;
            let mut given = BTreeSet::new();
            while let Ok(address) = pool.lease(&count.to_string()) {
                assert!(given.insert(address) && !reserved.contains(&address));
                count += 1;
            }
            assert_eq!(count, capacity(pool.prefix(), &reserved), "{prefix}");
        }
    }
}
