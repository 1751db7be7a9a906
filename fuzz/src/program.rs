//! Programs, images, and the texts that describe them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use kiln_abi::{
    configuration::RunConfiguration,
    image::SHIM_PHYSICAL,
    manifest::{FORMAT, Manifest, Port, Program, Protocol},
};
use kiln_image::{
    Guest, Image,
    code::Code,
    elf, file, program, project,
    rewrite::rewrite,
    tree::{Content, Metadata, Node, Tree},
};
use kiln_kernel::{
    file::Sink,
    fs::{Inode, Kind, erofs::Erofs},
};
use rustix::fs::{MemfdFlags, memfd_create};

/// Memory for damaged roots, in bytes.
pub const MOST_LEAKED: usize = 1 << 30;

/// An ELF file of a program or library: its facts, its instructions, its rewriting.
pub fn elf(bytes: &[u8]) {
    let Ok(parsed) = elf::parse(bytes) else {
        return;
    };
    let code = Code::new(bytes, &parsed);
    for site in code.sites() {
        assert!(site.address >= site.function.start && site.address + 2 <= site.function.end);
    }
    if let Some((rewritten, report)) = rewrite(bytes) {
        let again = elf::parse(&rewritten).expect("a rewritten file is a good one");
        assert_eq!(again.segments.len(), parsed.segments.len() + 1);
        for site in report.rewritten {
            let offset = parsed.offset_of(site).expect("a site lies in the file") as usize;
            assert_eq!(
                rewritten.get(offset..offset + 2),
                bytes.get(offset..offset + 2)
            );
        }
    }
}

/// The smallest program with a system call: `mov eax, 39; syscall; ret`, with symbols left out.
fn small_elf(address: u64) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    let mut put = |value: u64, width: usize| bytes.extend_from_slice(&value.to_le_bytes()[..width]);
    for (value, width) in [
        (address + 0x100, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (2, 2),
        (64, 2),
        (0, 2),
        (0, 2),
    ] {
        put(value, width);
    }
    for (kind, flags, length, align) in [(4, 4, 0, 4), (1, 5, 0x140, 4096)] {
        for (value, width) in [
            (kind, 4),
            (flags, 4),
            (0, 8),
            (address, 8),
            (address, 8),
            (length, 8),
            (length, 8),
            (align, 8),
        ] {
            put(value, width);
        }
    }
    bytes.resize(0x100, 0);
    bytes.extend_from_slice(b"\xb8\x27\0\0\0\x0f\x05\xc3");
    bytes.resize(0x140, 0x90);
    bytes
}

/// A made one and, where there is one, the system's `true`.
pub fn elf_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![small_elf(0x40_0000)];
    seeds.extend(std::fs::read("/bin/true"));
    seeds
}

/// An image file.
pub fn image(bytes: &[u8]) {
    let Ok(descriptor) = memfd_create("image", MemfdFlags::CLOEXEC) else {
        return;
    };
    let mut file = File::from(descriptor);
    if file.write_all(bytes).is_err() {
        return;
    }
    let length = bytes.len() as u64;
    if let Ok(image) = Image::from_file(file, Path::new("image")) {
        for extent in [
            image.shim(),
            image.kernel(),
            image.manifest_extent(),
            image.root(),
        ] {
            assert!(extent.length > 0 && extent.offset + extent.length <= length);
        }
        assert_eq!(image.manifest().format, FORMAT);
    }
}

/// A small image.
pub fn image_seeds() -> Vec<Vec<u8>> {
    let Ok(descriptor) = memfd_create("image", MemfdFlags::CLOEXEC) else {
        return Vec::new();
    };
    let file = File::from(descriptor);
    let shim = small_elf(SHIM_PHYSICAL);
    let guest = Guest {
        kernel: b"\x7fELF kernel",
        vm_shim: &shim,
    };
    let path = Path::new("image");
    let copy = file.try_clone().expect("descriptors are left");
    let root = &mut |output: &mut dyn Write| {
        kiln_image::erofs::write(&Tree::new(), None, output).map(|_| ())
    };
    file::write(copy, path, &guest, &sample_manifest(), root).expect("a seed can be made");
    let image = Image::from_file(file, path).expect("the seed is good");
    let mut bytes = vec![0; image.length() as usize];
    std::os::unix::fs::FileExt::read_exact_at(image.file(), &mut bytes, 0)
        .expect("the seed is there");
    vec![bytes]
}

/// A tree with files on both sides of every border, a directory of several blocks, and links.
fn sample_tree() -> Tree {
    let mut tree = Tree::new();
    let file = |length: usize| Node::File {
        content: Content::Bytes(
            (0..length)
                .map(|index| (index * 31 + length) as u8)
                .collect(),
        ),
        metadata: Metadata {
            mode: 0o640,
            uid: 33,
            gid: 70_000,
            time: Some((length as i64, 7)),
        },
    };
    let mut put = |path: String, node| {
        tree.insert(path.as_bytes(), node)
            .expect("a seed can be made");
    };
    for length in [0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 9000] {
        put(format!("/sizes/{length}"), file(length));
    }
    for index in 0..200 {
        put(
            format!("/many/{index:0width$}", width = 3 + index % 50),
            file(3),
        );
    }
    put(
        "/link".into(),
        Node::Link {
            target: b"sizes/4096".to_vec(),
        },
    );
    tree
}

fn written(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    kiln_image::erofs::write(tree, None, &mut bytes).expect("a seed can be made");
    bytes
}

/// All that the kernel can read in a directory: paths with bytes. Damage ends a branch, never the walk. `left` bounds
/// it, since damaged directories can contain themselves.
fn walk(
    directory: &Arc<dyn Inode>,
    path: &str,
    left: &mut usize,
    found: &mut BTreeMap<String, Vec<u8>>,
) {
    let Ok(entries) = directory.entries(0, 10_000) else {
        return;
    };
    for entry in entries {
        if *left == 0 {
            return;
        }
        *left -= 1;
        let path = format!("{path}/{}", entry.name);
        let Ok(inode) = directory.lookup(&entry.name) else {
            continue;
        };
        let Ok(metadata) = inode.metadata() else {
            continue;
        };
        match metadata.kind {
            Kind::Directory => walk(&inode, &path, left, found),
            Kind::SymbolicLink => {
                let target = inode.target().unwrap_or_default();
                found.insert(path, target.into_bytes());
            }
            _ => {
                let mut bytes = vec![0; metadata.size.min(1 << 16) as usize];
                let read = inode.read_at(0, &mut Sink::kernel(&mut bytes)).unwrap_or(0);
                bytes.truncate(read);
                let _ = inode.map_source(0);
                found.insert(path, bytes);
            }
        }
    }
}

fn mounted(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    // The kernel reads its root in place, as long as it lives.
    let bytes: &'static [u8] = bytes.to_vec().leak();
    if let Ok(root) = Erofs::mount(bytes).and_then(|system| system.root()) {
        walk(&root, "", &mut 2000, &mut found);
    }
    found
}

/// A root file system, as the kernel reads it. What the kernel reads in place is never given back, so after
/// [`MOST_LEAKED`] bytes this does nothing more.
pub fn root(bytes: &[u8]) {
    static LEAKED: AtomicUsize = AtomicUsize::new(0);
    if LEAKED.fetch_add(bytes.len(), Ordering::Relaxed) < MOST_LEAKED {
        let _ = mounted(bytes);
    }
}

/// One that `kiln build` would write.
pub fn root_seeds() -> Vec<Vec<u8>> {
    vec![written(&sample_tree())]
}

/// A `kiln.toml`.
pub fn project(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Err(error) = project::parse(text, Path::new("kiln.toml")) {
        assert!(error.to_string().starts_with("kiln.toml:"));
    }
}

/// One with all keys.
pub fn project_seeds() -> Vec<Vec<u8>> {
    let all = "name = 'x'\nprogram = \"a/b\"\narguments = ['-a', \"\\u00e9\"]\nenvironment = { A = 'b' }\nworking-directory = '/'\nuser = '1:2'\nmemory = '64M'\nports = [80, '53/udp']\nvolumes = ['/d']\ninclude = ['a:/b', { from = 'c', to = '/d' }]\n";
    vec![
        all.into(),
        b"site = '_site'\n[environment]\nTZ = 'UTC'\n".to_vec(),
    ]
}

/// The loader's cache.
pub fn loader_cache(bytes: &[u8]) {
    let _ = program::parse_cache(bytes);
}

/// One with two libraries.
pub fn loader_cache_seeds() -> Vec<Vec<u8>> {
    let mut bytes = b"glibc-ld.so.cache1.1".to_vec();
    for word in [
        2u32, 40, 2, 0, 0, 0, 0, 0x303, 96, 106, 0, 0, 0, 0x303, 96, 106, 0, 0, 0,
    ] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(b"libz.so.1\0/lib/libz.so.1\0");
    vec![bytes]
}

fn sample_manifest() -> Manifest {
    Manifest {
        format: FORMAT,
        name: "x".into(),
        program: "/bin/x".into(),
        arguments: vec!["-a".into()],
        environment: [("A".into(), "b".into())].into(),
        working_directory: "/".into(),
        memory: 1 << 26,
        ports: vec![Port {
            number: 80,
            protocol: Protocol::Tcp,
        }],
        ..Manifest::default()
    }
}

/// A manifest and a run configuration, as people and as the kernel read them.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let again = serde_json::to_vec(&manifest).expect("what was read can be written");
        assert_eq!(
            serde_json::from_slice::<Manifest>(&again).expect("and read"),
            manifest
        );
    }
    if let Ok(configuration) = serde_json::from_slice::<RunConfiguration>(bytes) {
        let again = serde_json::to_vec(&configuration).expect("what was read can be written");
        assert_eq!(
            serde_json::from_slice::<RunConfiguration>(&again).expect("and read"),
            configuration
        );
    }
    if let Ok(program) = Program::from_bytes(bytes) {
        assert_eq!(Program::from_bytes(&program.to_bytes()), Ok(program));
    }
    if let Ok(configuration) = RunConfiguration::from_bytes(bytes) {
        let again = configuration.to_bytes();
        assert_eq!(RunConfiguration::from_bytes(&again), Ok(configuration));
    }
}

/// One of each.
pub fn manifest_seeds() -> Vec<Vec<u8>> {
    let configuration = RunConfiguration {
        hostname: Some("h".into()),
        ..RunConfiguration::default()
    };
    let text = [
        serde_json::to_vec(&sample_manifest()),
        serde_json::to_vec(&configuration),
    ];
    let binary = [
        sample_manifest().program().to_bytes(),
        configuration.to_bytes(),
    ];
    text.into_iter().flatten().chain(binary).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_reads_every_byte_that_the_builder_writes() {
        let tree = sample_tree();
        let found = mounted(&written(&tree));
        let mut expected = BTreeMap::new();
        tree.walk(&mut |path, node| {
            let bytes = match node {
                Node::File { content, .. } => content.read()?.to_vec(),
                Node::Link { target } => target.clone(),
                Node::Directory(_) => return Ok(()),
            };
            expected.insert(String::from_utf8_lossy(path).into_owned(), bytes);
            Ok(())
        })
        .unwrap();
        assert_eq!(expected.len(), 210);
        assert_eq!(found, expected);
    }
}
