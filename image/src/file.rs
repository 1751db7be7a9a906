//! The image file: writing, opening, checking.
//!
//! The layout is that of [`kiln_abi::image`]. In the file, the pieces follow each other at page-aligned offsets:
//! ELF header and program headers, directory, VM shim, kernel, program (what the kernel needs of the manifest), manifest,
//! root, section headers.
//!
//! [`Image::open`] believes nothing: it checks that every piece lies in the file, that none overlaps another, and
//! that ELF headers and directory agree. It reads some pages only, however large the image is.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use kiln_abi::{
    host::PAGE_SIZE,
    image::{
        DIRECTORY_MAGIC, DIRECTORY_NAME, DIRECTORY_PHYSICAL, Directory, Piece, SECTION_DIRECTORY,
        SECTION_KERNEL, SECTION_MANIFEST, SECTION_PROGRAM, SECTION_ROOT, SECTION_SHIM,
        SHIM_PHYSICAL,
    },
    manifest::{FORMAT, Manifest, Program},
};
use object::{
    LittleEndian,
    elf::{self, FileHeader64},
    read::elf::{FileHeader, ProgramHeader},
};
use sha2::{Digest, Sha256};

use crate::{Error, Result, erofs};

const PAGE: u64 = PAGE_SIZE as u64;
/// Largest manifest in bytes.
const MAX_MANIFEST: u64 = 1 << 20;
/// Largest kernel or shim in bytes.
const MAX_GUEST: u64 = 64 << 20;
/// Most program or section headers that are looked at.
const MAX_HEADERS: u64 = 64;
/// End of the physical addresses for an image: QEMU's microvm machine has memory in one piece up to here.
const PHYSICAL_END: u64 = 0xc000_0000;
/// Largest root file system in bytes.
pub const MAX_ROOT: u64 = PHYSICAL_END - 0x1000_0000;

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;
const SECTION_HEADER_SIZE: u64 = 64;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen's `elfnote.h`).
const PVH_NOTE_TYPE: u32 = 18;

/// The freestanding programs that go into an image.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The kernel's ELF file.
    pub kernel: &'a [u8],
    /// The VM shim's ELF file.
    pub vm_shim: &'a [u8],
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Extent {
    /// First byte. A multiple of the page size.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Extent {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Where the VM shim wants to be.
struct Shim {
    /// (file offset in the shim, physical address, bytes in the file, bytes in memory, flags)
    segments: Vec<(u64, u64, u64, u64, u32)>,
    entry: u64,
    end: u64,
}

impl Shim {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let wrong = |error: object::Error| format!("is no usable ELF file: {error}");
        let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(wrong)?;
        let endian = header.endian().map_err(wrong)?;
        let mut shim = Self {
            segments: Vec::new(),
            entry: header.e_entry(endian),
            end: SHIM_PHYSICAL,
        };
        for segment in header.program_headers(endian, bytes).map_err(wrong)? {
            if let Some(mut notes) = segment.notes(endian, bytes).map_err(wrong)? {
                while let Some(note) = notes.next().map_err(wrong)? {
                    if note.name() == b"Xen" && note.n_type(endian).0 == PVH_NOTE_TYPE {
                        shim.entry = match *note.desc() {
                            [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => {
                                u32::from_le_bytes([a, b, c, d]).into()
                            }
                            _ => return Err("has a PVH note of a wrong length".into()),
                        };
                    }
                }
            }
            if segment.p_type(endian) != elf::PT_LOAD || segment.p_memsz(endian) == 0 {
                continue;
            }
            let (offset, length) = segment.file_range(endian);
            let physical = segment.p_paddr(endian);
            let memory = segment.p_memsz(endian);
            let end = physical
                .checked_add(memory)
                .ok_or("has a segment beyond all addresses")?;
            let fits = offset
                .checked_add(length)
                .is_some_and(|end| end <= bytes.len() as u64);
            if !fits || length > memory {
                return Err("has a segment outside its file".into());
            }
            if physical < shim.end {
                return Err(format!(
                    "has a segment at {physical:#x}: segments must be in order, not overlap, and not lie below {SHIM_PHYSICAL:#x}"
                ));
            }
            shim.end = end;
            shim.segments
                .push((offset, physical, length, memory, segment.p_flags(endian).0));
        }
        if shim.segments.is_empty() || shim.segments.len() > 16 {
            return Err(format!("has {} segments to load", shim.segments.len()));
        }
        if !(SHIM_PHYSICAL..shim.end.min(1 << 32)).contains(&shim.entry) {
            return Err(format!(
                "has its entry at {:#x}, outside its segments",
                shim.entry
            ));
        }
        Ok(shim)
    }
}

fn align(value: u64) -> u64 {
    value.next_multiple_of(PAGE)
}

fn word16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}
fn word32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}
fn word64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn program_header(
    out: &mut Vec<u8>,
    kind: u32,
    flags: u32,
    offset: u64,
    physical: u64,
    file: u64,
    memory: u64,
) {
    word32(out, kind);
    word32(out, flags);
    for value in [offset, physical, physical, file, memory] {
        word64(out, value);
    }
    word64(out, if kind == elf::PT_NOTE.0 { 4 } else { PAGE });
}

/// Writes an image to an empty file. `write_root` writes the root file system piece by piece.
///
/// # Errors
///
/// Writing fails, `write_root` fails, the root is too large for a VM, or the guest programs are unusable.
pub fn write(
    file: File,
    path: &Path,
    guest: &Guest<'_>,
    manifest: &Manifest,
    write_root: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let shim = Shim::parse(guest.vm_shim).map_err(|reason| Error::Guest {
        what: "VM shim",
        reason,
    })?;
    if !guest.kernel.starts_with(b"\x7fELF") || guest.kernel.len() as u64 > MAX_GUEST {
        return Err(Error::Guest {
            what: "kernel",
            reason: "is no ELF file".into(),
        });
    }
    let unusable = |reason: String| Error::BadImage {
        path: path.into(),
        reason,
    };
    let program = manifest.program().to_bytes();
    let manifest =
        serde_json::to_vec_pretty(manifest).map_err(|error| unusable(error.to_string()))?;
    if manifest.len() as u64 > MAX_MANIFEST {
        return Err(unusable("the manifest would be larger than 1 MiB".into()));
    }

    let directory = Extent {
        offset: PAGE,
        length: Directory::SIZE as u64,
    };
    let shim_extent = Extent {
        offset: 2 * PAGE,
        length: guest.vm_shim.len() as u64,
    };
    let kernel = Extent {
        offset: align(shim_extent.end()),
        length: guest.kernel.len() as u64,
    };
    let program_extent = Extent {
        offset: align(kernel.end()),
        length: program.len() as u64,
    };
    let manifest_extent = Extent {
        offset: align(program_extent.end()),
        length: manifest.len() as u64,
    };
    let root_offset = align(manifest_extent.end());

    let failed = || Error::io("write", path);
    let mut output = BufWriter::with_capacity(1 << 18, file);
    for (extent, bytes) in [
        (shim_extent, guest.vm_shim),
        (kernel, guest.kernel),
        (program_extent, program.as_slice()),
        (manifest_extent, manifest.as_slice()),
    ] {
        output
            .seek(SeekFrom::Start(extent.offset))
            .map_err(failed())?;
        output.write_all(bytes).map_err(failed())?;
    }
    output
        .seek(SeekFrom::Start(root_offset))
        .map_err(failed())?;
    write_root(&mut output)?;
    let end = output.stream_position().map_err(failed())?;
    let root = Extent {
        offset: root_offset,
        length: end - root_offset,
    };
    if root.length > MAX_ROOT {
        return Err(Error::BadImage {
            path: path.into(),
            reason: format!(
                "the files are {} MiB, and an image holds {} MiB at most; leave files out, or give them as a volume",
                root.length >> 20,
                MAX_ROOT >> 20
            ),
        });
    }

    let kernel_physical = align(shim.end);
    let program_physical = align(kernel_physical + kernel.length);
    let root_physical = align(program_physical + program_extent.length);
    let piece = |physical, extent: Extent| Piece {
        physical,
        length: extent.length,
    };
    let directory_bytes = Directory {
        magic: DIRECTORY_MAGIC,
        kernel: piece(kernel_physical, kernel),
        program: piece(program_physical, program_extent),
        root: piece(root_physical, root),
    }
    .to_bytes();

    // Section headers, at the end.
    let sections = [
        (SECTION_DIRECTORY, directory),
        (SECTION_SHIM, shim_extent),
        (SECTION_KERNEL, kernel),
        (SECTION_PROGRAM, program_extent),
        (SECTION_MANIFEST, manifest_extent),
        (SECTION_ROOT, root),
    ];
    let mut names = vec![0];
    let mut headers = vec![0; SECTION_HEADER_SIZE as usize];
    for (name, extent) in sections {
        word32(&mut headers, names.len() as u32);
        names.extend_from_slice(name.as_bytes());
        names.push(0);
        word32(&mut headers, elf::SHT_PROGBITS.0);
        // No address: QEMU and gdb take segments, and the shim's section is its whole file.
        for value in [0, 0, extent.offset, extent.length] {
            word64(&mut headers, value);
        }
        word64(&mut headers, 0);
        word64(&mut headers, PAGE);
        word64(&mut headers, 0);
    }
    word32(&mut headers, names.len() as u32);
    names.extend_from_slice(b".shstrtab\0");
    word32(&mut headers, elf::SHT_STRTAB.0);
    let names_offset = align(root.end());
    for value in [0, 0, names_offset, names.len() as u64, 0, 1, 0] {
        word64(&mut headers, value);
    }
    let headers_offset = names_offset + (names.len() as u64).next_multiple_of(8);
    names.resize((headers_offset - names_offset) as usize, 0);
    output
        .seek(SeekFrom::Start(names_offset))
        .map_err(failed())?;
    output.write_all(&names).map_err(failed())?;
    output.write_all(&headers).map_err(failed())?;

    // ELF header, program headers, PVH note, at the start.
    let program_headers = 5 + shim.segments.len() as u64;
    let note_offset = HEADER_SIZE + program_headers * PROGRAM_HEADER_SIZE;
    let mut note = Vec::new();
    for value in [4, 8, PVH_NOTE_TYPE] {
        word32(&mut note, value);
    }
    note.extend_from_slice(b"Xen\0");
    word64(&mut note, shim.entry);

    let mut start = Vec::new();
    start.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    word16(&mut start, elf::ET_EXEC.0);
    word16(&mut start, elf::EM_X86_64.0);
    word32(&mut start, 1);
    for value in [shim.entry, HEADER_SIZE, headers_offset] {
        word64(&mut start, value);
    }
    word32(&mut start, 0);
    for value in [
        HEADER_SIZE,
        PROGRAM_HEADER_SIZE,
        program_headers,
        SECTION_HEADER_SIZE,
        sections.len() as u64 + 2,
        sections.len() as u64 + 1,
    ] {
        word16(&mut start, value as u16);
    }
    let (read, load) = (elf::PF_R.0, elf::PT_LOAD.0);
    let note_length = note.len() as u64;
    program_header(
        &mut start,
        elf::PT_NOTE.0,
        read,
        note_offset,
        0,
        note_length,
        note_length,
    );
    program_header(
        &mut start,
        load,
        read,
        directory.offset,
        DIRECTORY_PHYSICAL,
        directory.length,
        PAGE,
    );
    for (offset, physical, length, memory, flags) in &shim.segments {
        let offset = shim_extent.offset + offset;
        program_header(
            &mut start, load, *flags, offset, *physical, *length, *memory,
        );
    }
    for (extent, physical) in [
        (kernel, kernel_physical),
        (program_extent, program_physical),
        (root, root_physical),
    ] {
        program_header(
            &mut start,
            load,
            read,
            extent.offset,
            physical,
            extent.length,
            align(extent.length),
        );
    }
    start.extend_from_slice(&note);
    if start.len() as u64 > PAGE {
        return Err(Error::Guest {
            what: "VM shim",
            reason: "has too many segments".into(),
        });
    }
    output.seek(SeekFrom::Start(0)).map_err(failed())?;
    output.write_all(&start).map_err(failed())?;
    output
        .seek(SeekFrom::Start(directory.offset))
        .map_err(failed())?;
    output.write_all(&directory_bytes).map_err(failed())?;
    output.flush().map_err(failed())
}

/// An open image, checked.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    length: u64,
    shim: Extent,
    kernel: Extent,
    program: Extent,
    manifest_extent: Extent,
    root: Extent,
    manifest: Manifest,
}

/// For a directory, a pipe or a device where an image should be.
fn not_a_file(path: &Path) -> Error {
    Error::BadSource {
        path: path.into(),
        reason: "is not a file".into(),
        remedy: "give an image file".into(),
    }
}

/// Opens a regular file. It is looked at before: to open a pipe would wait for somebody who writes.
fn open_file(path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        return Err(not_a_file(path));
    }
    File::open(path).map_err(Error::io("open", path))
}

impl Image {
    /// Opens an image file and checks its structure (not the contents of the root).
    ///
    /// # Errors
    ///
    /// The file cannot be read, is not an image, is cut off, or its parts contradict each other.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_file(open_file(path)?, path)
    }

    /// Checks an open file as [`Image::open`] does; `path` is for messages.
    ///
    /// # Errors
    ///
    /// As [`Image::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().map_err(Error::io("open", path))?;
        if !metadata.is_file() {
            return Err(not_a_file(path));
        }
        let length = metadata.len();
        let reader = Reader {
            file: &file,
            length,
        };
        let pieces = reader.check().map_err(|reason| Error::BadImage {
            path: path.into(),
            reason,
        })?;
        Ok(Self {
            path: path.into(),
            length,
            shim: pieces.shim,
            kernel: pieces.kernel,
            program: pieces.program,
            manifest_extent: pieces.manifest_extent,
            root: pieces.root,
            manifest: pieces.manifest,
            file,
        })
    }

    /// Whether a file begins like an image: an ELF executable whose first page has a PVH note of ours. Cheap, and no
    /// promise that [`Image::open`] succeeds.
    #[must_use]
    pub fn is_image(path: &Path) -> bool {
        let mut start = [0; PAGE_SIZE + 8];
        let Ok(file) = open_file(path) else {
            return false;
        };
        file.read_exact_at(&mut start, 0).is_ok()
            && start.starts_with(b"\x7fELF")
            && start
                .get(PAGE_SIZE..)
                .is_some_and(|magic| magic.starts_with(DIRECTORY_NAME))
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, read-only.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The VM shim's ELF file.
    #[must_use]
    pub fn shim(&self) -> Extent {
        self.shim
    }

    /// The kernel's ELF file.
    #[must_use]
    pub fn kernel(&self) -> Extent {
        self.kernel
    }

    /// What the kernel reads of the manifest.
    #[must_use]
    pub fn program_extent(&self) -> Extent {
        self.program
    }

    /// The manifest as JSON.
    #[must_use]
    pub fn manifest_extent(&self) -> Extent {
        self.manifest_extent
    }

    /// The root file system (EROFS).
    #[must_use]
    pub fn root(&self) -> Extent {
        self.root
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the whole file in lower-case hexadecimal: the image's identity. Reads the whole file.
    ///
    /// # Errors
    ///
    /// Reading fails.
    pub fn digest(&self) -> Result<String> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))
            .map_err(Error::io("read", &self.path))?;
        digest_of(&mut file).map_err(Error::io("read", &self.path))
    }
}

/// SHA-256 of all that can be read, in lower-case hexadecimal.
pub(crate) fn digest_of(input: &mut dyn Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            count => hash.update(buffer.get(..count).unwrap_or(&buffer)),
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Pieces {
    shim: Extent,
    kernel: Extent,
    program: Extent,
    manifest_extent: Extent,
    root: Extent,
    manifest: Manifest,
}

/// Checked reading of a file that may be anything.
struct Reader<'a> {
    file: &'a File,
    length: u64,
}

fn get16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
fn get32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
fn get64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

impl Reader<'_> {
    fn read(&self, extent: Extent, what: &str) -> Result<Vec<u8>, String> {
        if extent
            .offset
            .checked_add(extent.length)
            .is_none_or(|end| end > self.length)
        {
            return Err(format!(
                "is cut off: {what} should end at byte {}, but the file has {}",
                extent.end(),
                self.length
            ));
        }
        let mut bytes = vec![0; extent.length as usize];
        self.file
            .read_exact_at(&mut bytes, extent.offset)
            .map_err(|error| format!("cannot read {what}: {error}"))?;
        Ok(bytes)
    }

    /// Section headers as (name, extent).
    fn sections(&self, header: &[u8]) -> Result<Vec<(String, Extent)>, String> {
        let damaged = || "has a damaged ELF header".to_string();
        let offset = get64(header, 40).ok_or_else(damaged)?;
        let size = u64::from(get16(header, 58).ok_or_else(damaged)?);
        let count = u64::from(get16(header, 60).ok_or_else(damaged)?);
        let names = usize::from(get16(header, 62).ok_or_else(damaged)?);
        if size != SECTION_HEADER_SIZE || count == 0 || count > MAX_HEADERS {
            return Err("is an ELF file, but not an image (no sections of one)".into());
        }
        let table = self.read(
            Extent {
                offset,
                length: size * count,
            },
            "the section table",
        )?;
        let section = |index: usize| -> Option<(u32, Extent)> {
            let at = index.checked_mul(size as usize)?;
            let extent = Extent {
                offset: get64(&table, at + 24)?,
                length: get64(&table, at + 32)?,
            };
            Some((get32(&table, at)?, extent))
        };
        let (_, names) = section(names).ok_or_else(damaged)?;
        if names.length > PAGE {
            return Err(damaged());
        }
        let names = self.read(names, "the section names")?;
        (1..count as usize)
            .map(|index| {
                let (name, extent) = section(index).ok_or_else(damaged)?;
                let name = names.get(name as usize..).ok_or_else(damaged)?;
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                Ok((String::from_utf8_lossy(name).into_owned(), extent))
            })
            .collect()
    }

    fn check(&self) -> Result<Pieces, String> {
        if self.length < HEADER_SIZE {
            return Err("is not an image (too short)".into());
        }
        let header = self.read(
            Extent {
                offset: 0,
                length: HEADER_SIZE,
            },
            "the ELF header",
        )?;
        if !header.starts_with(b"\x7fELF") {
            return Err("is not an image (no ELF file)".into());
        }
        if !header.starts_with(b"\x7fELF\x02\x01\x01")
            || get16(&header, 16) != Some(elf::ET_EXEC.0)
            || get16(&header, 18) != Some(elf::EM_X86_64.0)
        {
            return Err("is not an image (another kind of ELF file)".into());
        }
        let sections = self.sections(&header)?;
        let find = |name: &str, limit: u64| -> Result<Extent, String> {
            let mut found = sections.iter().filter(|(n, _)| n == name);
            let Some((_, extent)) = found.next() else {
                return Err(format!(
                    "is an ELF file, but not an image (no section {name})"
                ));
            };
            if found.next().is_some() {
                return Err(format!("has two sections {name}"));
            }
            if extent
                .offset
                .checked_add(extent.length)
                .is_none_or(|end| end > self.length)
            {
                return Err(format!("is cut off: section {name} ends beyond the file"));
            }
            if extent.offset % PAGE != 0 || extent.length == 0 || extent.length > limit {
                return Err(format!("has a section {name} of a wrong size or alignment"));
            }
            Ok(*extent)
        };
        let directory_extent = find(SECTION_DIRECTORY, Directory::SIZE as u64)?;
        self.check_version(directory_extent)?;
        let shim = find(SECTION_SHIM, MAX_GUEST)?;
        let kernel = find(SECTION_KERNEL, MAX_GUEST)?;
        let program = find(SECTION_PROGRAM, MAX_MANIFEST)?;
        let manifest_extent = find(SECTION_MANIFEST, MAX_MANIFEST)?;
        let root = find(SECTION_ROOT, MAX_ROOT)?;
        let headers = Extent {
            offset: 0,
            length: HEADER_SIZE,
        };
        let mut order = [
            headers,
            directory_extent,
            shim,
            kernel,
            program,
            manifest_extent,
            root,
        ];
        order.sort_by_key(|extent| extent.offset);
        for pair in order.windows(2) {
            if let [first, second] = pair
                && first.end() > second.offset
            {
                return Err("has overlapping pieces".into());
            }
        }
        self.check_directory(&header, directory_extent, [kernel, program, root])?;
        for (extent, what) in [(kernel, "kernel"), (shim, "VM shim")] {
            let start = self.read(
                Extent {
                    length: extent.length.min(4),
                    ..extent
                },
                what,
            )?;
            if start != b"\x7fELF" {
                return Err(format!("has a damaged {what}"));
            }
        }
        let first_block = Extent {
            length: PAGE,
            ..root
        };
        if root.length < PAGE || !erofs::is_intact(&self.read(first_block, "the root")?) {
            return Err("has a damaged root file system".into());
        }
        let manifest = self.read(manifest_extent, "the manifest")?;
        let manifest = parse_manifest(&manifest)?;
        // People see the one, the kernel the other.
        if Program::from_bytes(&self.read(program, "the program")?) != Ok(manifest.program()) {
            return Err("has a program that is not the manifest's".into());
        }
        Ok(Pieces {
            shim,
            kernel,
            program,
            manifest_extent,
            root,
            manifest,
        })
    }

    /// The layout must be the one that this code knows.
    fn check_version(&self, directory: Extent) -> Result<(), String> {
        let bytes = self.read(directory, "the directory")?;
        match bytes.first_chunk() {
            Some(magic) if *magic == DIRECTORY_MAGIC.to_le_bytes() => Ok(()),
            Some(magic) if magic.starts_with(DIRECTORY_NAME) => {
                Err("was built by another version of Kiln, with another layout".into())
            }
            _ => Err("has a damaged directory".into()),
        }
    }

    /// Directory, program headers and sections must tell the same story, or engines would see different images.
    fn check_directory(
        &self,
        header: &[u8],
        extent: Extent,
        pieces: [Extent; 3],
    ) -> Result<(), String> {
        let damaged = || "has a damaged directory".to_string();
        let bytes = self.read(extent, "the directory")?;
        let offset = get64(header, 32).ok_or_else(damaged)?;
        let count = u64::from(get16(header, 56).ok_or_else(damaged)?);
        if get16(header, 54) != Some(PROGRAM_HEADER_SIZE as u16) || count > MAX_HEADERS {
            return Err("has damaged program headers".into());
        }
        let table = Extent {
            offset,
            length: count * PROGRAM_HEADER_SIZE,
        };
        let table = self.read(table, "the program headers")?;
        let mut end = 0;
        for piece in 0..3 {
            let physical = get64(&bytes, 8 + piece * 16).ok_or_else(damaged)?;
            let length = get64(&bytes, 16 + piece * 16).ok_or_else(damaged)?;
            let section = pieces.get(piece).ok_or_else(damaged)?;
            let loaded = table
                .chunks_exact(PROGRAM_HEADER_SIZE as usize)
                .any(|header| {
                    get32(header, 0) == Some(elf::PT_LOAD.0)
                        && get64(header, 8) == Some(section.offset)
                        && get64(header, 24) == Some(physical)
                        && get64(header, 32) == Some(length)
                });
            let after = physical.checked_add(length).ok_or_else(damaged)?;
            if length != section.length
                || !loaded
                || physical < end.max(SHIM_PHYSICAL)
                || after > PHYSICAL_END
            {
                return Err(damaged());
            }
            end = after;
        }
        Ok(())
    }
}

/// Reads a manifest and checks what the type does not say.
fn parse_manifest(bytes: &[u8]) -> Result<Manifest, String> {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    let format: Format = serde_json::from_slice(bytes)
        .map_err(|error| format!("has a damaged manifest: {error}"))?;
    if format.format != FORMAT {
        return Err(format!(
            "has a manifest of format {}, and this kiln reads format {FORMAT}",
            format.format
        ));
    }
    let manifest: Manifest = serde_json::from_slice(bytes)
        .map_err(|error| format!("has a damaged manifest: {error}"))?;
    let paths = [&manifest.program, &manifest.working_directory];
    if paths
        .into_iter()
        .chain(&manifest.volumes)
        .any(|path| !path.starts_with('/'))
    {
        return Err("has a manifest with a path that is not absolute".into());
    }
    Ok(manifest)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tree::Tree;

    /// A small ELF file with one segment at the shim's address.
    pub(crate) fn shim(address: u64, note: Option<u64>) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        word16(&mut bytes, elf::ET_EXEC.0);
        word16(&mut bytes, elf::EM_X86_64.0);
        word32(&mut bytes, 1);
        for value in [address + 0x10, 64, 0] {
            word64(&mut bytes, value);
        }
        word32(&mut bytes, 0);
        for value in [64, 56, 1 + u16::from(note.is_some()), 64, 0, 0] {
            word16(&mut bytes, value);
        }
        program_header(&mut bytes, elf::PT_LOAD.0, 7, 0x1000, address, 0x20, 0x3000);
        if let Some(entry) = note {
            program_header(&mut bytes, elf::PT_NOTE.0, 4, 64 + 112, 0, 24, 24);
            for value in [4, 8, PVH_NOTE_TYPE] {
                word32(&mut bytes, value);
            }
            bytes.extend_from_slice(b"Xen\0");
            word64(&mut bytes, entry);
        }
        bytes.resize(0x1020, 0x90);
        bytes
    }

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("kiln-file-{name}-{}", std::process::id()))
    }

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            name: "test".into(),
            program: "/bin/x".into(),
            working_directory: "/".into(),
            memory: 1 << 20,
            ..Manifest::default()
        }
    }

    fn write_image(path: &Path, shim: &[u8]) -> Result<()> {
        let guest = Guest {
            kernel: b"\x7fELF the kernel",
            vm_shim: shim,
        };
        let file = File::create(path).unwrap();
        write(file, path, &guest, &manifest(), &mut |output| {
            crate::erofs::write(&Tree::new(), None, output).map(|_| ())
        })
    }

    fn sample(name: &str) -> Vec<u8> {
        let path = temporary(name);
        write_image(&path, &shim(SHIM_PHYSICAL, None)).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        bytes
    }

    fn opened(name: &str, bytes: &[u8]) -> Result<Image> {
        let path = temporary(name);
        std::fs::write(&path, bytes).unwrap();
        let image = Image::open(&path);
        std::fs::remove_file(&path).unwrap();
        image
    }

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = sample("back");
        let image = opened("back", &bytes).unwrap();
        assert_eq!(image.manifest(), &manifest());
        let at = image.kernel().offset as usize;
        assert_eq!(&bytes[at..at + 15], b"\x7fELF the kernel");
        assert_eq!(image.root().length, 4096);
        assert_eq!(image.shim().length, 0x1020);
        assert_eq!(image.length(), bytes.len() as u64);
        assert_eq!(
            image.digest().unwrap(),
            digest_of(&mut bytes.as_slice()).unwrap()
        );
    }

    #[test]
    fn other_readers_see_the_same_layout() {
        let bytes = sample("layout");
        let header = FileHeader64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
        let endian = LittleEndian;
        let segments = header.program_headers(endian, bytes.as_slice()).unwrap();
        let mut end = 0;
        for segment in segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD) {
            assert!(segment.p_paddr(endian) >= end, "in order and apart");
            assert_eq!(segment.p_paddr(endian) % PAGE, 0);
            assert_eq!(segment.p_offset(endian) % PAGE, 0);
            end = segment.p_paddr(endian) + segment.p_memsz(endian);
        }
        let mut notes = segments[0]
            .notes(endian, bytes.as_slice())
            .unwrap()
            .unwrap();
        let note = notes.next().unwrap().unwrap();
        assert_eq!(
            (note.name(), note.n_type(endian).0),
            (&b"Xen"[..], PVH_NOTE_TYPE)
        );
        assert_eq!(note.desc(), (SHIM_PHYSICAL + 0x10).to_le_bytes());
        let sections = header.sections(endian, bytes.as_slice()).unwrap();
        assert!(
            sections
                .section_by_name(endian, SECTION_ROOT.as_bytes())
                .is_some()
        );
    }

    #[test]
    fn the_entry_comes_from_the_note_if_the_shim_has_one() {
        let with_note = Shim::parse(&shim(SHIM_PHYSICAL, Some(SHIM_PHYSICAL + 0x18))).unwrap();
        assert_eq!(with_note.entry, SHIM_PHYSICAL + 0x18);
        assert_eq!(
            Shim::parse(&shim(SHIM_PHYSICAL, None)).unwrap().entry,
            SHIM_PHYSICAL + 0x10
        );
        assert!(Shim::parse(&shim(0x1000, None)).is_err());
        assert!(Shim::parse(&shim(SHIM_PHYSICAL, Some(4))).is_err());
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = sample("cut");
        for length in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
            let error = opened("cut", &bytes[..length]).expect_err("cut off");
            let text = error.to_string();
            assert!(
                text.contains("cut off") || text.contains("too short"),
                "{length}: {text}"
            );
        }
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        assert!(
            opened("text", &[b'x'; 9000])
                .unwrap_err()
                .to_string()
                .contains("no ELF file")
        );
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let error = opened("own", &own).unwrap_err().to_string();
        assert!(error.contains("not an image"), "{error}");
        assert!(!Image::is_image(&std::env::current_exe().unwrap()));
        let error = Image::open("/nonexistent/image").unwrap_err();
        assert_eq!(error.kind(), crate::Kind::Input);
    }

    #[test]
    fn headers_that_contradict_each_other_are_refused() {
        let good = sample("contradict");
        // The kernel's length in the directory; its physical address; the root's magic; the shim's.
        let root = good.len().next_multiple_of(4096) - 2 * 4096;
        for at in [
            4096 + 16,
            4096 + 8,
            4096,
            2 * 4096,
            root + 1024,
            root + 1100,
        ] {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(opened("contradict", &bytes).is_err(), "{at}");
        }
    }

    #[test]
    fn another_layout_is_named_and_the_manifest_is_the_kernels() {
        let good = sample("versions");
        let mut other = good.clone();
        other[4096 + 7] = b'1';
        let error = opened("versions", &other).unwrap_err().to_string();
        assert!(error.contains("another version of Kiln"), "{error}");
        let image = opened("versions", &good).unwrap();
        let mut other = good.clone();
        // A letter of the program's path, as the kernel reads it.
        other[image.program_extent().offset as usize + 2] ^= 1;
        let error = opened("versions", &other).unwrap_err().to_string();
        assert!(error.contains("not the manifest's"), "{error}");
    }

    #[test]
    fn damaged_images_never_panic() {
        let good = sample("fuzz");
        let mut state = 3u64;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        let interesting: Vec<usize> = (0..600)
            .chain(4096..4096 + 56)
            .chain(good.len() - 7 * 64..good.len())
            .collect();
        for _ in 0..3000 {
            let mut bytes = good.clone();
            for _ in 0..3 {
                bytes[interesting[next() % interesting.len()]] = next() as u8;
            }
            let _ = opened("fuzz", &bytes);
        }
    }
}
