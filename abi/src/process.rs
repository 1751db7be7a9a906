//! How the monitor starts the process shim.
//!
//! The monitor executes the shim with a handful of descriptors at fixed numbers ([`descriptor`]), so that the seccomp
//! filter can name them. One of them, [`descriptor::PARAMETERS`], is a file that begins with [`Parameters`] and
//! holds the run's configuration and the seccomp filter. Arguments and environment say nothing (the first argument
//! is a name for process lists).
//!
//! The shim ends with [`EXIT_SHIM`] when it cannot start the kernel, after a line on [`descriptor::CONSOLE`] that
//! names cause and remedy.

/// Numbers of the descriptors that the shim finds open. Everything else is closed.
pub mod descriptor {
    /// The image file, open for reading.
    pub const IMAGE: i32 = 0;
    /// Console output, and the shim's own messages.
    pub const CONSOLE: i32 = 1;
    /// Memory file of the shared pool, [`super::Parameters::pool_length`] bytes long (sparse).
    pub const POOL: i32 = 2;
    /// The shim's own `/proc/PID/statm`: what is in memory.
    pub const STATM: i32 = 3;
    /// The parameters. Stays open, so that nothing else gets the number; so do the link's and the frame stream's
    /// numbers when there are none.
    pub const PARAMETERS: i32 = 4;
    /// The shim's own ELF file, until the shim needs no more to execute itself once more.
    pub const SHIM: i32 = 5;
    /// The shim's epoll descriptor, in the place of [`SHIM`].
    pub const EPOLL: i32 = SHIM;
    /// The link to the monitor, if there is one: a Unix stream socket.
    pub const LINK: i32 = 6;
    /// The frame stream of `--net direct`, if there is one: a Unix stream socket.
    pub const NETWORK: i32 = 7;
    /// Descriptors that arrive over the link get numbers from here on.
    pub const FIRST_FREE: i32 = 8;
}

/// Exit code of a shim that could not start the kernel.
pub const EXIT_SHIM: i32 = 125;

/// Exit code of an instance that went on taking memory far beyond its limit: that of a process killed by
/// Linux's own handling of exhausted memory, 128 + SIGKILL.
pub const EXIT_MEMORY: i32 = 137;

/// [`Parameters`] begins with this.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KilnPrc1");

/// A piece of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Offset in bytes from the file's start.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// What the monitor tells the shim: the first [`Parameters::SIZE`] bytes of [`descriptor::PARAMETERS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// The kernel's ELF file in the image; at a page boundary.
    pub kernel: Extent,
    /// What the manifest says to the kernel, in the image.
    pub program: Extent,
    /// The root file system in the image; at a page boundary.
    pub root: Extent,
    /// The run's configuration in the parameter file.
    pub configuration: Extent,
    /// The seccomp filter in the parameter file: an array of Linux's `struct sock_filter`.
    pub filter: Extent,
    /// Bytes of memory that the instance may use.
    pub memory_limit: u64,
    /// Length of the pool's file.
    pub pool_length: u64,
    /// True when [`descriptor::LINK`] is open.
    pub link: bool,
    /// True when [`descriptor::NETWORK`] is open.
    pub network: bool,
}

impl Parameters {
    /// Words of the encoding.
    pub const WORDS: usize = 15;
    /// Length of the encoding in bytes.
    pub const SIZE: usize = Self::WORDS * 8;

    /// The bytes as they lie in the file.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let words: [u64; Self::WORDS] = [
            MAGIC,
            self.kernel.offset,
            self.kernel.length,
            self.program.offset,
            self.program.length,
            self.root.offset,
            self.root.length,
            self.configuration.offset,
            self.configuration.length,
            self.filter.offset,
            self.filter.length,
            self.memory_limit,
            self.pool_length,
            u64::from(self.link),
            u64::from(self.network),
        ];
        let mut bytes = [0; Self::SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads the encoding. `None` when it does not begin with [`MAGIC`]: monitor and shim are not of one build.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut words = [0; Self::WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut piece = [0; 8];
            piece.copy_from_slice(chunk);
            *word = u64::from_le_bytes(piece);
        }
        let [
            magic,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
            i,
            j,
            memory_limit,
            pool_length,
            link,
            network,
        ] = words;
        let extent = |offset, length| Extent { offset, length };
        (magic == MAGIC).then_some(Self {
            kernel: extent(a, b),
            program: extent(c, d),
            root: extent(e, f),
            configuration: extent(g, h),
            filter: extent(i, j),
            memory_limit,
            pool_length,
            link: link != 0,
            network: network != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Extent, MAGIC, Parameters};

    #[test]
    fn parameters_survive_the_way() {
        let extent = |n: u64| Extent {
            offset: n * 4096,
            length: n + 7,
        };
        let parameters = Parameters {
            kernel: extent(1),
            program: extent(2),
            root: extent(3),
            configuration: extent(4),
            filter: extent(5),
            memory_limit: 6,
            pool_length: 7,
            link: true,
            network: false,
        };
        let bytes = parameters.to_bytes();
        assert_eq!(Parameters::from_bytes(&bytes), Some(parameters));
        assert_eq!(bytes[..8], MAGIC.to_le_bytes());
    }

    #[test]
    fn foreign_bytes_are_refused() {
        assert_eq!(Parameters::from_bytes(&[0; Parameters::SIZE]), None);
    }
}
