//! What an image says about itself, for `kiln inspect`.

use kiln_abi::manifest::Manifest;
use serde::Serialize;

use crate::{Image, Result, file::Extent};

/// Facts about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// SHA-256 of the image file in lower-case hexadecimal.
    pub digest: String,
    /// Length of the image file in bytes.
    pub length: u64,
    /// Where its pieces lie.
    pub pieces: Pieces,
    /// Its manifest.
    pub manifest: Manifest,
}

/// Where the pieces of an image lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pieces {
    /// The VM shim's ELF file.
    pub vm_shim: Extent,
    /// The kernel's ELF file.
    pub kernel: Extent,
    /// What the kernel reads of the manifest.
    pub program: Extent,
    /// The manifest (JSON).
    pub manifest: Extent,
    /// The root file system (EROFS): mount it with `mount -o loop,offset=OFFSET,sizelimit=LENGTH`.
    pub root: Extent,
}

/// Collects the facts. Reads the whole file for the digest.
///
/// # Errors
///
/// Reading fails.
pub fn inspect(image: &Image) -> Result<Inspection> {
    Ok(Inspection {
        digest: image.digest()?,
        length: image.length(),
        pieces: Pieces {
            vm_shim: image.shim(),
            kernel: image.kernel(),
            program: image.program_extent(),
            manifest: image.manifest_extent(),
            root: image.root(),
        },
        manifest: image.manifest().clone(),
    })
}
