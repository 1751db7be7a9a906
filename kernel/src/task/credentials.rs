//! Who a process acts as.

use alloc::vec::Vec;

/// User and group identities, as of `credentials(7)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective and saved user.
    pub uid: [u32; 3],
    /// Real, effective and saved group.
    pub gid: [u32; 3],
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// All identities the same.
    #[must_use]
    pub fn new(uid: u32, gid: u32) -> Credentials {
        Credentials {
            uid: [uid; 3],
            gid: [gid; 3],
            groups: Vec::new(),
        }
    }

    /// The user that file accesses are checked for.
    #[must_use]
    pub fn effective_uid(&self) -> u32 {
        self.uid[1]
    }

    /// The group that file accesses are checked for.
    #[must_use]
    pub fn effective_gid(&self) -> u32 {
        self.gid[1]
    }

    /// Whether it may do everything.
    #[must_use]
    pub fn is_privileged(&self) -> bool {
        self.effective_uid() == 0
    }

    /// Whether it belongs to a group.
    #[must_use]
    pub fn in_group(&self, gid: u32) -> bool {
        self.effective_gid() == gid || self.groups.contains(&gid)
    }
}
