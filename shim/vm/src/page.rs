//! What a page table entry means: for present pages to the processor, for the others to the shim alone.
//!
//! Bits of a present entry beyond the processor's own: 9 to 11 hold the [`Kind`], 52 says that stores are allowed although the
//! processor must still refuse the first. Bits of an entry that is not present:
//!
//! | bits | meaning |
//! |---|---|
//! | 0 | 0: not present |
//! | 1 to 3 | the [`Protection`] |
//! | 4 | 1: mapped (an entry of 0 is not) |
//! | 5 | bits 12 to 51 are a frame that holds the contents; otherwise the page's index in its source |
//! | 9 to 11 | the [`Kind`] |
//!
//! The same encoding without a frame also stands in the higher tables, for a whole range that nobody has touched yet: there the
//! index is that of the first page.

use kiln_abi::host::Protection;

/// Entry is present.
pub const PRESENT: u64 = 1;
/// Stores allowed.
pub const WRITE: u64 = 1 << 1;
/// Ring 3 allowed.
pub const USER: u64 = 1 << 2;
/// Uncached: for device registers.
pub const UNCACHED: u64 = 1 << 4 | 1 << 3;
/// The processor need not set the accessed and dirty bits, since they are set already.
pub const TOUCHED: u64 = 1 << 5 | 1 << 6;
/// A large page, in the higher tables.
pub const LARGE: u64 = 1 << 7;
/// Stays in the TLB when the tables are reloaded.
pub const GLOBAL: u64 = 1 << 8;
/// No instruction fetches.
pub const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const KIND_SHIFT: u32 = 9;
const STORES_ALLOWED: u64 = 1 << 52;
const MAPPED: u64 = 1 << 4;
const HELD: u64 = 1 << 5;

/// Where the contents of a page come from and whom its frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Zero at first; the frame belongs to this page alone.
    Zero,
    /// A page of the root, in place.
    Root,
    /// A page of the root, copied for a store; the frame belongs to this page alone, its note is the root page's index.
    RootCopy,
    /// A page of the pool, which owns the frame; the frame's note counts the entries that point to it.
    Pool,
    /// A frame that stays where it is for good: the image, memory for devices. The index is the frame's number.
    Fixed,
    /// Registers of a device, uncached; otherwise as [`Kind::Fixed`].
    Device,
}

/// Where the contents of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere yet: page number so and so of the source.
    Index(u64),
    /// In the frame at this physical address.
    Frame(u64),
}

/// A mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// What it is.
    pub kind: Kind,
    /// Access allowed to it. The processor cannot forbid loads alone: where stores or fetches are allowed, loads are.
    pub protection: Protection,
    /// Where its contents are.
    pub place: Place,
}

impl Page {
    /// The table entry.
    #[must_use]
    pub fn encode(self) -> u64 {
        let kind = match self.kind {
            Kind::Zero => 1,
            Kind::Root => 2,
            Kind::RootCopy => 3,
            Kind::Pool => 4,
            Kind::Fixed => 5,
            Kind::Device => 6,
        } << KIND_SHIFT;
        let bits = u64::from(self.protection.bits());
        match self.place {
            Place::Index(index) => kind | MAPPED | bits << 1 | index << 12 & ADDRESS,
            Place::Frame(frame) if self.protection.is_empty() => kind | MAPPED | HELD | frame,
            Place::Frame(frame) => {
                let write = match (self.protection.contains(Protection::WRITE), self.kind) {
                    (false, _) => 0,
                    (true, Kind::Root) => STORES_ALLOWED,
                    (true, _) => WRITE,
                };
                let fetch = if self.protection.contains(Protection::EXECUTE) {
                    0
                } else {
                    NO_EXECUTE
                };
                let cache = if self.kind == Kind::Device {
                    UNCACHED
                } else {
                    0
                };
                kind | PRESENT | USER | TOUCHED | frame | write | fetch | cache
            }
        }
    }

    /// What an entry of the lowest tables, or one of the higher tables that is not present, means. `None`: not mapped.
    #[must_use]
    pub fn decode(entry: u64) -> Option<Self> {
        let kind = match entry >> KIND_SHIFT & 7 {
            1 => Kind::Zero,
            2 => Kind::Root,
            3 => Kind::RootCopy,
            4 => Kind::Pool,
            5 => Kind::Fixed,
            6 => Kind::Device,
            _ => return None,
        };
        let address = entry & ADDRESS;
        if entry & PRESENT != 0 {
            let mut protection = Protection::READ;
            protection.set(Protection::WRITE, entry & (WRITE | STORES_ALLOWED) != 0);
            protection.set(Protection::EXECUTE, entry & NO_EXECUTE == 0);
            return Some(Self {
                kind,
                protection,
                place: Place::Frame(address),
            });
        }
        let protection = Protection::from_bits_truncate((entry >> 1 & 7) as u32);
        let place = if entry & HELD != 0 {
            Place::Frame(address)
        } else {
            Place::Index(address >> 12)
        };
        Some(Self {
            kind,
            protection,
            place,
        })
    }

    /// Whether an access is allowed.
    #[must_use]
    pub fn allows(&self, access: Protection) -> bool {
        if access == Protection::READ {
            !self.protection.is_empty()
        } else {
            self.protection.contains(access)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_was_put_in() {
        let kinds = [
            Kind::Zero,
            Kind::Root,
            Kind::RootCopy,
            Kind::Pool,
            Kind::Fixed,
            Kind::Device,
        ];
        let protections = [
            Protection::empty(),
            Protection::READ,
            Protection::READ | Protection::WRITE,
            Protection::READ | Protection::EXECUTE,
        ];
        for kind in kinds {
            for protection in protections {
                for place in [
                    Place::Index(0),
                    Place::Index(0x12_3456),
                    Place::Frame(0x7654_3000),
                ] {
                    let page = Page {
                        kind,
                        protection,
                        place,
                    };
                    let entry = page.encode();
                    assert_ne!(entry, 0);
                    assert_eq!(Page::decode(entry), Some(page));
                    let present = matches!(place, Place::Frame(_)) && !protection.is_empty();
                    assert_eq!(entry & PRESENT != 0, present);
                }
            }
        }
        assert_eq!(Page::decode(0), None);
    }

    #[test]
    fn the_root_itself_is_never_writable() {
        let page = Page {
            kind: Kind::Root,
            protection: Protection::READ | Protection::WRITE,
            place: Place::Frame(0x1000),
        };
        assert_eq!(page.encode() & WRITE, 0);
    }
}
