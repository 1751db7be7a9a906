//! How an image file is laid out.
//!
//! An image is one ELF64 executable for x86-64:
//!
//! * program headers describe what a VM needs in memory: the VM shim (`PT_LOAD` at
//!   [`SHIM_PHYSICAL`]), and one `PT_LOAD` each for header page, kernel, program and root, at page-aligned file
//!   offsets and physical addresses; a `PT_NOTE` names the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`,
//!   type 18, name `Xen`), which QEMU's `-kernel`, Firecracker and Xen understand;
//! * section headers name the same pieces, so that `readelf -S` shows them and the monitor finds them:
//!   [`SECTION_KERNEL`], [`SECTION_PROGRAM`], [`SECTION_ROOT`], [`SECTION_SHIM`]; and the manifest, which is for people and
//!   tools and not loaded: [`SECTION_MANIFEST`].
//!
//! The VM shim finds the pieces through the [`Directory`], which the builder writes at the physical address
//! [`DIRECTORY_PHYSICAL`].

/// Section that holds the kernel's ELF file.
pub const SECTION_KERNEL: &str = ".kiln.kernel";
/// Section that holds the manifest as JSON.
pub const SECTION_MANIFEST: &str = ".kiln.manifest";
/// Section that holds what the kernel needs of the manifest ([`crate::manifest::Program`]).
pub const SECTION_PROGRAM: &str = ".kiln.program";
/// Section that holds the root file system as EROFS.
pub const SECTION_ROOT: &str = ".kiln.root";
/// Section that holds the VM shim.
pub const SECTION_SHIM: &str = ".kiln.shim";
/// Section that holds the [`Directory`].
pub const SECTION_DIRECTORY: &str = ".kiln.directory";

/// Where the directory lies in a VM's physical memory: the first page above 1 MiB.
pub const DIRECTORY_PHYSICAL: u64 = 0x10_0000;
/// Where the VM shim is linked and loaded in physical memory.
pub const SHIM_PHYSICAL: u64 = 0x10_1000;

/// [`Directory::magic`]: [`DIRECTORY_NAME`] and the number of the layout.
pub const DIRECTORY_MAGIC: u64 = u64::from_le_bytes(*b"KilnImg2");
/// How the magic number begins in every layout.
pub const DIRECTORY_NAME: &[u8] = b"KilnImg";

/// One piece of an image in physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Piece {
    /// Physical address, page-aligned.
    pub physical: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Where the pieces of an image lie in a VM's memory. Little endian, as the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Directory {
    /// [`DIRECTORY_MAGIC`].
    pub magic: u64,
    /// The kernel's ELF file.
    pub kernel: Piece,
    /// What the manifest says to the kernel.
    pub program: Piece,
    /// The root file system.
    pub root: Piece,
}

impl Directory {
    /// Length of the encoding in bytes.
    pub const SIZE: usize = 56;

    /// The bytes as they lie in the image.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let words = [
            self.magic,
            self.kernel.physical,
            self.kernel.length,
            self.program.physical,
            self.program.length,
            self.root.physical,
            self.root.length,
        ];
        let mut bytes = [0; Self::SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
