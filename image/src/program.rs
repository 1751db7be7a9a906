//! What a program needs beside itself, and the packing of sources into a tree.
//!
//! A dynamic program brings its loader, its libraries (found as ld.so(8) finds them: `RPATH`, `LD_LIBRARY_PATH`,
//! `RUNPATH`, the host's cache, the default directories), and data that libraries open by fixed names. Some well-known
//! programs bring their configuration ([`RECIPES`]). Whatever a program opens beyond that is the business of
//! `include`.
//!
//! Account and name service files are made here, the same on every machine; nothing of the host's users gets
//! into an image. Files that depend on the run (`/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname`) are the
//! kernel's.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use kiln_abi::manifest::{FORMAT, Manifest, Port, Protocol, Provenance, User};
use sha2::{Digest, Sha256};

use crate::{
    BuildOptions, Error, Result, Source,
    elf::{self, Elf},
    file::hexadecimal,
    project::{Include, Project, UserName},
    tree::{self, Content, Hidden, Metadata, Node, Packer, Tree},
};

/// Where a site lies in the image.
pub const SITE_DIRECTORY: &str = "/site";
/// Where the site server lies in the image.
pub const SITE_SERVER: &str = "/usr/bin/kiln-site-server";
/// Memory of a program, in bytes, when nothing is said.
pub const DEFAULT_MEMORY: u64 = 256 << 20;
/// Memory of a site, in bytes, when nothing is said.
pub const DEFAULT_SITE_MEMORY: u64 = 64 << 20;
/// Port of a site.
pub const SITE_PORT: u16 = 80;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Programs and files below these keep their paths; others go to `/app`.
const KEPT: [&str; 8] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/srv", "/etc",
];
/// Where loaders look when nothing else says where. Fedora's, Debian's and everybody's.
const LIBRARY_DIRECTORIES: [&str; 8] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib/x86_64-linux-gnu",
    "/usr/local/lib",
];
/// The loader's cache.
const LOADER_CACHE: &str = "/etc/ld.so.cache";
/// Largest loader cache that is read, in bytes.
const MAX_CACHE: u64 = 16 << 20;

/// What well-known programs open beside their libraries.
pub struct Recipe {
    /// File name of the program. A `*` at the end stands for any version.
    pub program: &'static str,
    /// Files and directories taken along with their contents, if they are there. A `*` at the end stands for anything.
    pub contents: &'static [&'static str],
    /// Directories that are made, empty.
    pub empty: &'static [&'static str],
}

/// The table of recipes.
pub const RECIPES: &[Recipe] = &[
    Recipe {
        program: "nginx",
        contents: &[
            "/etc/nginx",
            "/usr/share/nginx",
            "/usr/lib/nginx/modules",
            "/usr/lib64/nginx/modules",
            "/var/www",
        ],
        empty: &[
            "/var/log/nginx",
            "/var/lib/nginx/body",
            "/var/lib/nginx/fastcgi",
            "/var/lib/nginx/proxy",
            "/var/lib/nginx/scgi",
            "/var/lib/nginx/uwsgi",
            "/var/cache/nginx",
        ],
    },
    Recipe {
        program: "redis-server",
        contents: &[],
        empty: &["/var/lib/redis", "/var/log/redis", "/run/redis"],
    },
    Recipe {
        program: "python3*",
        contents: &["/etc/python3*", "/usr/lib/python3*"],
        empty: &[],
    },
    Recipe {
        program: "perl*",
        contents: &[
            "/etc/perl",
            "/usr/lib/x86_64-linux-gnu/perl*",
            "/usr/share/perl*",
        ],
        empty: &[],
    },
    Recipe {
        program: "ruby*",
        contents: &[
            "/usr/lib/ruby",
            "/usr/lib/x86_64-linux-gnu/ruby",
            "/usr/share/rubygems-integration",
            "/var/lib/gems",
        ],
        empty: &[],
    },
    Recipe {
        program: "php*",
        contents: &[
            "/etc/php",
            "/usr/lib/php",
            "/usr/share/php",
            "/usr/share/zoneinfo",
        ],
        empty: &[],
    },
];

impl Recipe {
    /// Whether it is for a program of this file name.
    fn is_for(&self, file_name: &[u8]) -> bool {
        fits(self.program, file_name)
    }
}

/// Whether a name is what a recipe names.
fn fits(pattern: &str, name: &[u8]) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning.as_bytes()),
        None => name == pattern.as_bytes(),
    }
}

/// The paths in an image that an entry of [`Recipe::contents`] stands for, by what is below `on_host`, in order.
fn recipe_paths(contents: &str, on_host: impl Fn(&[u8]) -> PathBuf) -> Vec<Vec<u8>> {
    let Some((folder, last)) = contents
        .rsplit_once('/')
        .filter(|_| contents.ends_with('*'))
    else {
        return vec![contents.into()];
    };
    let mut paths: Vec<Vec<u8>> = fs::read_dir(on_host(folder.as_bytes()))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().into_encoded_bytes())
        .filter(|name| fits(last, name))
        .map(|name| [folder.as_bytes(), b"/", &name].concat())
        .collect();
    paths.sort();
    paths
}

/// Empty directories that programs expect, with their permission bits.
const DIRECTORIES: [(&str, u16); 12] = [
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/proc", 0o555),
    ("/sys", 0o555),
    ("/run", 0o755),
    ("/root", 0o700),
    ("/tmp", 0o1777),
    ("/var/cache", 0o755),
    ("/var/lib", 0o755),
    ("/var/log", 0o755),
    ("/var/tmp", 0o1777),
    ("/usr/bin", 0o755),
];

/// Accounts in every image: those with the same numbers on every Debian.
const ACCOUNTS: &[(&str, u32, u32, &str)] = &[
    ("root", 0, 0, "/root"),
    ("daemon", 1, 1, "/usr/sbin"),
    ("bin", 2, 2, "/bin"),
    ("sys", 3, 3, "/dev"),
    ("mail", 8, 8, "/var/mail"),
    ("proxy", 13, 13, "/bin"),
    ("www-data", 33, 33, "/var/www"),
    ("backup", 34, 34, "/var/backups"),
    ("nobody", 65534, 65534, "/nonexistent"),
];
/// Groups in every image beyond those of the accounts.
const GROUPS: &[(&str, u32)] = &[
    ("adm", 4),
    ("tty", 5),
    ("disk", 6),
    ("users", 100),
    ("nogroup", 65534),
];

/// All addresses of a name in `/etc/hosts`, as on Debian: `localhost` has two.
const HOST_LOOKUP: &str = "multi on\n";
const NAME_SERVICES: &str = "\
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
";

/// Everything that goes into an image but the guest programs.
#[derive(Debug)]
pub struct Packed {
    /// The root.
    pub tree: Tree,
    /// The manifest.
    pub manifest: Manifest,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Libraries that are nowhere: without them the program will not start.
    pub missing: Vec<Missing>,
}

/// A library that is nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub library: String,
    /// Who needs it: a file of the host, or a path in the image.
    pub needed_by: PathBuf,
    /// Directories looked into.
    pub searched: Vec<String>,
}

/// Puts together what a source needs. Missing libraries do not fail here, see [`Packed::missing`].
///
/// # Errors
///
/// The source or a file it names cannot be used.
pub fn pack(source: &Source, options: &BuildOptions<'_>, name: String) -> Result<Packed> {
    let mut tree = Tree::new();
    for (path, mode) in DIRECTORIES {
        tree.directory(path.as_bytes())?.metadata.mode = mode;
    }
    let mut packing = Packing {
        packer: Packer {
            tree: &mut tree,
            system_root: &options.system_root,
            notes: Vec::new(),
        },
        options,
        provenance: Vec::new(),
        environment: BTreeMap::new(),
    };
    let mut manifest = packing.source(source)?;
    for include in &options.include {
        packing.include(include, Path::new(""))?;
    }
    let (missing, facts) = packing.libraries(&manifest.program)?;
    packing.data(&facts)?;
    packing.system_files(&facts)?;
    let Packing {
        packer, provenance, ..
    } = packing;
    let notes = packer.notes;
    manifest.format = FORMAT;
    manifest.name = name;
    manifest.provenance = provenance;
    if manifest.user != User::default() {
        manifest
            .environment
            .entry("HOME".into())
            .or_insert_with(|| "/".into());
    }
    manifest
        .environment
        .entry("HOME".into())
        .or_insert_with(|| "/root".into());
    manifest
        .environment
        .entry("PATH".into())
        .or_insert_with(|| DEFAULT_PATH.into());
    Ok(Packed {
        tree,
        manifest,
        notes,
        missing,
    })
}

/// What was learned while following the libraries.
#[derive(Debug, Default)]
struct Facts {
    /// All names imported by any file reachable from the program.
    imports: BTreeSet<String>,
    /// Names imported by the program itself.
    own_imports: BTreeSet<String>,
    /// Names of libraries, and where they lie in the image.
    libraries: BTreeMap<String, Vec<u8>>,
    /// The loader is glibc's.
    glibc: bool,
    /// libc.so.6 has the name services built in (2.34 and later).
    builtin_name_services: bool,
}

/// A file whose libraries are to be found.
struct Object {
    /// Its path in the image, without links.
    path: Vec<u8>,
    /// Its path on the host, without links.
    host: Option<PathBuf>,
    elf: Elf,
    /// `RPATH`s of those who loaded it, nearest first: (path list, origin in the image, origin on the host).
    inherited: Vec<(String, Vec<u8>, Option<PathBuf>)>,
}

struct Packing<'a> {
    packer: Packer<'a>,
    options: &'a BuildOptions<'a>,
    provenance: Vec<Provenance>,
    environment: BTreeMap<String, String>,
}

impl Packing<'_> {
    fn source(&mut self, source: &Source) -> Result<Manifest> {
        let mut manifest = Manifest {
            working_directory: "/".into(),
            memory: DEFAULT_MEMORY,
            ..Manifest::default()
        };
        match source {
            Source::Program { path } => manifest.program = self.program(path)?,
            Source::Site { directory } => self.site(directory, &mut manifest)?,
            Source::Project { directory, project } => {
                self.project(directory, project, &mut manifest)?;
            }
        }
        Ok(manifest)
    }

    fn project(
        &mut self,
        directory: &Path,
        project: &Project,
        manifest: &mut Manifest,
    ) -> Result<()> {
        if let Some(site) = &project.site {
            let site = directory.join(site);
            if !site.join("index.html").is_file() {
                let reason = if site.is_dir() {
                    "has no index.html"
                } else {
                    "is not there"
                };
                return Err(Error::BadSource {
                    path: site,
                    reason: reason.into(),
                    remedy: format!(
                        "generate the site first, or change `site` in {}",
                        directory.join(crate::project::FILE_NAME).display()
                    ),
                });
            }
            self.site(&site, manifest)?;
        }
        if let Some(program) = &project.program {
            manifest.program = self.program(&directory.join(program))?;
        }
        self.environment.clone_from(&project.environment);
        for include in &project.include {
            self.include(include, directory)?;
        }
        manifest.arguments.extend(project.arguments.iter().cloned());
        manifest.environment.clone_from(&project.environment);
        if let Some(directory) = &project.working_directory {
            manifest.working_directory.clone_from(directory);
            self.packer.tree.provide_directory(directory, 0o755)?;
        }
        if let Some(memory) = project.memory {
            manifest.memory = memory;
        }
        for port in &project.ports {
            if !manifest.ports.contains(port) {
                manifest.ports.push(*port);
            }
        }
        for volume in &project.volumes {
            self.packer.tree.provide_directory(volume, 0o755)?;
            manifest.volumes.push(volume.clone());
        }
        if let Some(user) = &project.user {
            manifest.user = self.user(user)?;
        }
        if let Some(zone) = project
            .environment
            .get("TZ")
            .map(|zone| zone.trim_start_matches(':'))
            && !zone.is_empty()
            && !zone.contains("..")
        {
            let path = format!("/usr/share/zoneinfo/{zone}");
            self.packer.system_file(path.as_bytes())?;
        }
        Ok(())
    }

    /// Packs the program and says where it lies.
    fn program(&mut self, path: &Path) -> Result<String> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoSource { path: path.into() });
            }
            Err(error) => return Err(Error::io("look at", path)(error)),
        };
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let unusable = |reason: String| Error::Program {
            path: path.into(),
            remedy: if reason.contains("cut off") || reason.contains("damaged") {
                "copy, download or build it again".into()
            } else {
                "give a program built for x86-64 Linux".into()
            },
            reason,
        };
        let elf = elf::parse(&bytes).map_err(unusable)?;
        if !elf.is_program() {
            return Err(unusable("is a library, not a program".into()));
        }
        let absolute = tree::absolute(path)?;
        let in_image = image_path(&absolute)?;
        if self.packer.on_host(in_image.as_bytes()) == absolute {
            self.packer.system_file(in_image.as_bytes())?;
        } else {
            let mut node = tree::host_node(path, &metadata)
                .ok_or_else(|| unusable("is not a regular file".into()))?;
            if let Node::File { metadata, .. } = &mut node {
                metadata.mode |= 0o555;
            }
            self.packer.tree.insert(in_image.as_bytes(), node)?;
        }
        let file_name = absolute.file_name().unwrap_or_default();
        let file_name = file_name.as_encoded_bytes();
        for recipe in RECIPES.iter().filter(|recipe| recipe.is_for(file_name)) {
            let paths = recipe
                .contents
                .iter()
                .flat_map(|contents| recipe_paths(contents, |path| self.packer.on_host(path)));
            for path in paths.collect::<Vec<_>>() {
                let host = self.packer.on_host(&path);
                if host.exists() {
                    self.packer.everything(&host, &path, Hidden::Keep)?;
                }
            }
            for directory in recipe.empty {
                self.packer.tree.provide_directory(directory, 0o755)?;
            }
        }
        Ok(in_image)
    }

    fn site(&mut self, directory: &Path, manifest: &mut Manifest) -> Result<()> {
        let Some(server) = self.options.site_server else {
            return Err(Error::BadSource {
                path: directory.into(),
                reason: "is a site, and the site server is not there".into(),
                remedy: "use a kiln that was built with it".into(),
            });
        };
        let content = Content::Bytes(server.into());
        let server = Node::File {
            content,
            metadata: Metadata {
                time: None,
                ..Metadata::with_mode(0o755)
            },
        };
        self.packer.tree.insert(SITE_SERVER.as_bytes(), server)?;
        self.packer
            .everything(directory, SITE_DIRECTORY.as_bytes(), Hidden::LeaveOut)?;
        self.record_directory(SITE_DIRECTORY)?;
        manifest.program = SITE_SERVER.into();
        manifest.memory = DEFAULT_SITE_MEMORY;
        manifest.ports.push(Port {
            number: SITE_PORT,
            protocol: Protocol::Tcp,
        });
        Ok(())
    }

    fn include(&mut self, include: &Include, base: &Path) -> Result<()> {
        let from = if include.from.is_absolute() {
            self.packer.on_host(include.from.as_os_str().as_bytes())
        } else {
            tree::absolute(&base.join(&include.from))?
        };
        let to = match &include.to {
            Some(to) => to.clone(),
            None if include.from.is_absolute() => utf8(&include.from)?,
            None => format!("/app/{}", utf8(&include.from)?),
        };
        let to = tree::joined(&tree::parts(to.as_bytes()));
        self.packer.everything(&from, &to, Hidden::Keep)?;
        self.record_directory(&String::from_utf8_lossy(&to))
    }

    /// Notes the digest of a directory that was packed: over path, type, mode and bytes of all that is in it.
    fn record_directory(&mut self, path: &str) -> Result<()> {
        let mut hash = Sha256::new();
        let mut add = |path: &[u8], node: &Node| {
            let (kind, length, mode) = match node {
                Node::Directory(directory) => (b'd', 0, directory.metadata.mode),
                Node::File { content, metadata } => (b'f', content.length(), metadata.mode),
                Node::Link { target } => (b'l', target.len() as u64, 0o777),
            };
            hash.update([kind]);
            hash.update(mode.to_le_bytes());
            hash.update((path.len() as u64).to_le_bytes());
            hash.update(path);
            hash.update(length.to_le_bytes());
            match node {
                Node::Directory(_) => {}
                Node::File { content, .. } => content.stream(&mut |bytes| {
                    hash.update(bytes);
                    Ok(())
                })?,
                Node::Link { target } => hash.update(target),
            }
            Ok(())
        };
        match self.packer.tree.get_following(path) {
            Some(Node::Directory(directory)) => {
                Tree {
                    root: directory.clone(),
                }
                .walk(&mut add)?;
            }
            Some(node) => add(b"", node)?,
            None => {}
        }
        self.provenance.push(Provenance {
            source: path.into(),
            sha256: hexadecimal(&hash.finalize()),
        });
        Ok(())
    }

    fn user(&mut self, user: &UserName) -> Result<User> {
        let name = match user {
            UserName::Numbers(uid, gid) => {
                return Ok(User {
                    uid: *uid,
                    gid: *gid,
                });
            }
            UserName::Name(name) => name,
        };
        let of_tree = match self.packer.tree.get_following("/etc/passwd") {
            Some(Node::File { content, .. }) => {
                String::from_utf8_lossy(&content.read()?).into_owned()
            }
            _ => accounts(&[]),
        };
        let on_host = self.packer.on_host(b"/etc/passwd");
        let of_host = fs::read_to_string(on_host).unwrap_or_default();
        for text in [&of_tree, &of_host] {
            for line in text.lines() {
                let fields: Vec<&str> = line.split(':').collect();
                let [account, _, uid, gid, _, home, ..] = fields.as_slice() else {
                    continue;
                };
                let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) else {
                    continue;
                };
                if account != name {
                    continue;
                }
                if std::ptr::eq(text, &of_host) && self.packer.tree.get("/etc/passwd").is_none() {
                    let more = [(name.as_str(), uid, gid, *home)];
                    self.packer.tree.provide("/etc/passwd", &accounts(&more))?;
                    self.packer.tree.provide("/etc/group", &groups(&more))?;
                }
                return Ok(User { uid, gid });
            }
        }
        Err(Error::Value {
            what: "user",
            value: name.clone(),
            reason: "is not known; give numbers (UID:GID), or include an /etc/passwd that has it"
                .into(),
        })
    }

    /// Packs loader and libraries of every ELF file in the tree.
    fn libraries(&mut self, program: &str) -> Result<(Vec<Missing>, Facts)> {
        let mut facts = Facts::default();
        let mut missing = Vec::new();
        let cache = read_cache(&self.packer.on_host(LOADER_CACHE.as_bytes()));
        let program = self
            .packer
            .tree
            .real_path(program.as_bytes())
            .unwrap_or_else(|| program.into());
        let mut seen = BTreeSet::from([program.clone()]);
        let mut queue = VecDeque::new();
        let mut first = self.object(&program, Vec::new())?;
        if let Some(object) = &mut first {
            facts.own_imports = object.elf.imports.iter().cloned().collect();
            if let Some(interpreter) = object.elf.interpreter.clone() {
                self.interpreter(&interpreter, &program, &mut facts, &mut seen)?;
            }
        }
        queue.extend(first);
        self.follow(&mut queue, &mut seen, &cache, &mut facts, &mut missing)?;

        // Opened by glibc itself when it needs to unwind.
        let unwinds = ["pthread_cancel", "pthread_exit", "backtrace"];
        if facts.glibc && unwinds.iter().any(|name| facts.imports.contains(*name)) {
            self.by_name("libgcc_s.so.1", &mut queue, &mut seen, &cache, &mut facts)?;
        }
        if facts.glibc && !facts.builtin_name_services {
            for name in ["libnss_files.so.2", "libnss_dns.so.2"] {
                self.by_name(name, &mut queue, &mut seen, &cache, &mut facts)?;
            }
        }
        self.follow(&mut queue, &mut seen, &cache, &mut facts, &mut missing)?;

        // Whatever else is in the tree: plug-ins and helpers. Some may be there without their libraries.
        let mut others = Vec::new();
        self.packer.tree.walk(&mut |path, node| {
            if let Node::File { content, .. } = node
                && content.length() > 64
                && !seen.contains(path)
                && content.start()?.starts_with(b"\x7fELF")
            {
                others.push(path.to_vec());
            }
            Ok(())
        })?;
        let mut optional = Vec::new();
        for path in others {
            if seen.insert(path.clone()) {
                queue.extend(self.object(&path, Vec::new())?);
                self.follow(&mut queue, &mut seen, &cache, &mut facts, &mut optional)?;
            }
        }
        for gone in optional {
            self.packer.notes.push(format!(
                "{} needs {}, which was not found; it will not load",
                gone.needed_by.display(),
                gone.library
            ));
        }
        if facts.glibc {
            let cache = make_cache(&facts.libraries);
            let node = Node::File {
                content: Content::Bytes(cache.into()),
                metadata: Metadata::with_mode(0o644),
            };
            self.packer.tree.insert(LOADER_CACHE.as_bytes(), node)?;
        }
        Ok((missing, facts))
    }

    fn interpreter(
        &mut self,
        interpreter: &str,
        program: &[u8],
        facts: &mut Facts,
        seen: &mut BTreeSet<Vec<u8>>,
    ) -> Result<()> {
        let name = interpreter
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_string();
        let real = match self.packer.tree.real_path(interpreter.as_bytes()) {
            Some(real) => real,
            None => self
                .packer
                .system_file(interpreter.as_bytes())?
                .ok_or_else(|| Error::Program {
                    path: String::from_utf8_lossy(program).into_owned().into(),
                    reason: format!(
                        "asks for the loader {interpreter}, which is not on this machine"
                    ),
                    remedy: if name.starts_with("ld-musl") {
                        "install musl, or link the program statically".into()
                    } else {
                        "install the C library it was built for, or link it statically".to_string()
                    },
                })?,
        };
        facts.glibc = name.starts_with("ld-linux");
        if !facts.glibc {
            // musl's loader is its C library.
            for alias in ["libc.so", "libc.musl-x86_64.so.1"] {
                facts.libraries.insert(alias.into(), real.clone());
            }
        }
        facts
            .libraries
            .insert(name, interpreter.as_bytes().to_vec());
        self.object(&real, Vec::new())?;
        seen.insert(real);
        Ok(())
    }

    /// Reads an ELF file of the tree and notes its digest; `None` if it is none that Kiln runs.
    fn object(
        &mut self,
        path: &[u8],
        inherited: Vec<(String, Vec<u8>, Option<PathBuf>)>,
    ) -> Result<Option<Object>> {
        let shown = String::from_utf8_lossy(path).into_owned();
        let Some(Node::File { content, .. }) = self.packer.tree.get(&shown) else {
            return Ok(None);
        };
        let host = match content {
            Content::Host { path, .. } => fs::canonicalize(path).ok(),
            Content::Bytes(_) => None,
        };
        let bytes = content.read()?;
        let Ok(elf) = elf::parse(&bytes) else {
            return Ok(None);
        };
        self.provenance.push(Provenance {
            source: shown,
            sha256: hexadecimal(&Sha256::digest(&bytes)),
        });
        Ok(Some(Object {
            path: path.to_vec(),
            host,
            elf,
            inherited,
        }))
    }

    fn follow(
        &mut self,
        queue: &mut VecDeque<Object>,
        seen: &mut BTreeSet<Vec<u8>>,
        cache: &BTreeMap<String, String>,
        facts: &mut Facts,
        missing: &mut Vec<Missing>,
    ) -> Result<()> {
        while let Some(object) = queue.pop_front() {
            let is_libc = object.elf.soname.as_deref() == Some("libc.so.6");
            if is_libc {
                facts.builtin_name_services = object
                    .elf
                    .functions
                    .iter()
                    .any(|function| function.name == "pthread_create");
            } else {
                facts.imports.extend(object.elf.imports.iter().cloned());
            }
            let mut inherited = object.inherited.clone();
            if let Some(rpath) = &object.elf.rpath {
                let origin = (rpath.clone(), parent(&object.path), object.host.clone());
                inherited.insert(0, origin);
            }
            for library in &object.elf.needed {
                if facts.libraries.contains_key(library) {
                    continue;
                }
                let mut searched = Vec::new();
                match self.find(library, &object, &inherited, cache, &mut searched)? {
                    Some(path) => {
                        facts.libraries.insert(library.clone(), path.clone());
                        let real = self.packer.tree.real_path(&path).unwrap_or(path);
                        if seen.insert(real.clone()) {
                            queue.extend(self.object(&real, inherited.clone())?);
                        }
                    }
                    None => missing.push(Missing {
                        library: library.clone(),
                        needed_by: object.host.clone().unwrap_or_else(|| {
                            String::from_utf8_lossy(&object.path).into_owned().into()
                        }),
                        searched,
                    }),
                }
            }
        }
        Ok(())
    }

    /// Packs a library that is opened at run time, if it is there.
    fn by_name(
        &mut self,
        library: &str,
        queue: &mut VecDeque<Object>,
        seen: &mut BTreeSet<Vec<u8>>,
        cache: &BTreeMap<String, String>,
        facts: &mut Facts,
    ) -> Result<()> {
        if facts.libraries.contains_key(library) {
            return Ok(());
        }
        let directories = LIBRARY_DIRECTORIES
            .iter()
            .map(|directory| format!("{directory}/{library}"));
        for candidate in cache.get(library).cloned().into_iter().chain(directories) {
            if let Some(real) = self.packer.system_file(candidate.as_bytes())? {
                facts
                    .libraries
                    .insert(library.into(), candidate.into_bytes());
                if seen.insert(real.clone()) {
                    queue.extend(self.object(&real, Vec::new())?);
                }
                break;
            }
        }
        Ok(())
    }

    /// Finds a library as the loader would, packs it, and says under which path the loader will find it.
    fn find(
        &mut self,
        library: &str,
        object: &Object,
        inherited: &[(String, Vec<u8>, Option<PathBuf>)],
        cache: &BTreeMap<String, String>,
        searched: &mut Vec<String>,
    ) -> Result<Option<Vec<u8>>> {
        if library.starts_with('/') {
            searched.push(parent_text(library));
            return self.take(library.as_bytes(), &self.packer.on_host(library.as_bytes()));
        }
        let mut lists: Vec<(&str, Vec<u8>, Option<PathBuf>)> = Vec::new();
        if object.elf.runpath.is_none() {
            for (list, origin, host) in inherited {
                lists.push((list, origin.clone(), host.clone()));
            }
        }
        let environment = self
            .environment
            .get("LD_LIBRARY_PATH")
            .cloned()
            .unwrap_or_default();
        lists.push((&environment, Vec::new(), None));
        if let Some(runpath) = &object.elf.runpath {
            lists.push((runpath, parent(&object.path), object.host.clone()));
        }
        for (list, origin, host_file) in lists {
            for entry in list.split(':').filter(|entry| !entry.is_empty()) {
                let expand = |origin: &[u8]| {
                    let origin = String::from_utf8_lossy(origin);
                    entry
                        .replace("${ORIGIN}", &origin)
                        .replace("$ORIGIN", &origin)
                        .replace("$LIB", "lib/x86_64-linux-gnu")
                };
                let directory = tree::joined(&tree::parts(expand(&origin).as_bytes()));
                searched.push(String::from_utf8_lossy(&directory).into_owned());
                let mut path = directory;
                path.push(b'/');
                path.extend_from_slice(library.as_bytes());
                let host = match host_file.as_deref().and_then(Path::parent) {
                    Some(origin) if entry.contains("ORIGIN") => {
                        Path::new(&expand(origin.as_os_str().as_bytes())).join(library)
                    }
                    _ => self.packer.on_host(&path),
                };
                if let Some(found) = self.take(&path, &host)? {
                    return Ok(Some(found));
                }
            }
        }
        // What `include` put into a default directory comes before what the host has.
        for directory in LIBRARY_DIRECTORIES {
            let path = format!("{directory}/{library}");
            if self.packer.tree.real_path(path.as_bytes()).is_some() {
                return Ok(Some(path.into_bytes()));
            }
        }
        if let Some(path) = cache.get(library)
            && let Some(found) =
                self.take(path.as_bytes(), &self.packer.on_host(path.as_bytes()))?
        {
            return Ok(Some(found));
        }
        for directory in LIBRARY_DIRECTORIES {
            searched.push(directory.into());
            let path = format!("{directory}/{library}");
            if let Some(found) =
                self.take(path.as_bytes(), &self.packer.on_host(path.as_bytes()))?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Packs a library if it is a usable file. The loader passes over files of other machines, and so do we.
    fn take(&mut self, path: &[u8], host: &Path) -> Result<Option<Vec<u8>>> {
        if self.packer.tree.real_path(path).is_some() {
            return Ok(Some(path.to_vec()));
        }
        let Ok(metadata) = fs::metadata(host) else {
            return Ok(None);
        };
        if !metadata.is_file() {
            return Ok(None);
        }
        let bytes = fs::read(host).map_err(Error::io("read", host))?;
        if elf::parse(&bytes).is_err() {
            return Ok(None);
        }
        if self.packer.on_host(path) == host {
            self.packer.system_file(path)?;
        } else if let Some(node) = tree::host_node(host, &metadata) {
            self.packer.tree.insert(path, node)?;
        }
        Ok(Some(path.to_vec()))
    }

    /// Data files that libraries open by fixed names.
    fn data(&mut self, facts: &Facts) -> Result<()> {
        let has = |name: &str| facts.imports.contains(name);
        let mut wanted: Vec<&str> = Vec::new();
        let openssl = facts
            .libraries
            .keys()
            .any(|name| name.starts_with("libssl.so"));
        if openssl {
            wanted.extend([
                "/usr/lib/ssl/openssl.cnf",
                "/usr/lib/ssl/cert.pem",
                "/etc/pki/tls/openssl.cnf",
                "/etc/pki/tls/cert.pem",
            ]);
        }
        let tls = ["libgnutls.so", "libmbedtls.so", "libcurl"];
        if openssl
            || facts
                .libraries
                .keys()
                .any(|name| tls.iter().any(|tls| name.starts_with(tls)))
        {
            wanted.push("/etc/ssl/certs/ca-certificates.crt");
        }
        if ["getservbyname", "getservbyname_r", "getaddrinfo"]
            .iter()
            .any(|name| has(name))
        {
            wanted.push("/etc/services");
        }
        if ["getprotobyname", "getprotobyname_r"]
            .iter()
            .any(|name| has(name))
        {
            wanted.push("/etc/protocols");
        }
        for path in wanted {
            self.packer.system_file(path.as_bytes())?;
        }
        if facts.glibc && facts.own_imports.contains("setlocale") {
            for path in ["/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8"] {
                let host = self.packer.on_host(path.as_bytes());
                if host.is_dir() {
                    self.packer
                        .everything(&host, path.as_bytes(), Hidden::Keep)?;
                }
            }
        }
        Ok(())
    }

    /// Account and name service files, unless the source brought its own.
    fn system_files(&mut self, facts: &Facts) -> Result<()> {
        let tree = &mut *self.packer.tree;
        tree.provide("/etc/passwd", &accounts(&[]))?;
        tree.provide("/etc/group", &groups(&[]))?;
        if facts.glibc {
            tree.provide("/etc/nsswitch.conf", NAME_SERVICES)?;
            tree.provide("/etc/host.conf", HOST_LOOKUP)?;
        }
        Ok(())
    }
}

fn accounts(more: &[(&str, u32, u32, &str)]) -> String {
    let line = |(name, uid, gid, home): &(&str, u32, u32, &str)| {
        format!("{name}:x:{uid}:{gid}:{name}:{home}:/usr/sbin/nologin\n")
    };
    ACCOUNTS.iter().chain(more).map(line).collect()
}

fn groups(more: &[(&str, u32, u32, &str)]) -> String {
    let own = ACCOUNTS
        .iter()
        .chain(more)
        .map(|(name, _, gid, _)| (*name, *gid));
    own.chain(GROUPS.iter().copied())
        .filter(|(name, gid)| *gid != 65534 || *name == "nogroup")
        .map(|(name, gid)| format!("{name}:x:{gid}:\n"))
        .collect()
}

fn utf8(path: &Path) -> Result<String> {
    path.to_str()
        .map(Into::into)
        .ok_or_else(|| Error::BadSource {
            path: path.into(),
            reason: "has a name that is not UTF-8".into(),
            remedy: "rename it".into(),
        })
}

/// Where a file of the host goes.
fn image_path(absolute: &Path) -> Result<String> {
    if KEPT.iter().any(|prefix| absolute.starts_with(prefix)) {
        return utf8(absolute);
    }
    let name = absolute
        .file_name()
        .map(Path::new)
        .unwrap_or(Path::new("program"));
    Ok(format!("/app/{}", utf8(name)?))
}

fn parent(path: &[u8]) -> Vec<u8> {
    let mut parts = tree::parts(path);
    parts.pop();
    tree::joined(&parts)
}

fn parent_text(path: &str) -> String {
    String::from_utf8_lossy(&parent(path.as_bytes())).into_owned()
}

/// Magic and version of glibc's cache (`sysdeps/generic/dl-cache.h`), and the flags of an x86-64 library
/// (`FLAG_X8664_LIB64 | FLAG_ELF_LIBC6`).
const CACHE_MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const CACHE_FLAGS: u32 = 0x0303;
const CACHE_HEADER: usize = 48;
const CACHE_ENTRY: usize = 24;

/// Reads the loader's cache: library name to path. Anything wrong with it counts as an empty one, as for the loader.
fn read_cache(path: &Path) -> BTreeMap<String, String> {
    let readable = fs::metadata(path).is_ok_and(|metadata| metadata.len() <= MAX_CACHE);
    let bytes = if readable {
        fs::read(path).unwrap_or_default()
    } else {
        Vec::new()
    };
    parse_cache(&bytes)
}

/// As the loader reads it. Entries for special processors are passed over: an image runs on any.
#[must_use]
pub fn parse_cache(bytes: &[u8]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    // An older cache may come first.
    let Some(start) = bytes
        .windows(CACHE_MAGIC.len())
        .position(|window| window == CACHE_MAGIC)
    else {
        return found;
    };
    let bytes = bytes.get(start..).unwrap_or_default();
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
    };
    let text = |at: u32| -> Option<String> {
        let text = bytes.get(at as usize..)?.split(|byte| *byte == 0).next()?;
        String::from_utf8(text.to_vec()).ok()
    };
    for index in 0..word(20).unwrap_or(0) as usize {
        let at = CACHE_HEADER + index * CACHE_ENTRY;
        let (Some(flags), Some(key), Some(value)) = (word(at), word(at + 4), word(at + 8)) else {
            break;
        };
        let special = word(at + 16) != Some(0) || word(at + 20) != Some(0);
        if flags == CACHE_FLAGS
            && !special
            && let (Some(key), Some(value)) = (text(key), text(value))
        {
            found.entry(key).or_insert(value);
        }
    }
    found
}

/// A cache for the loader with just these libraries: it finds each with one look instead of trying directories.
fn make_cache(libraries: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut entries: Vec<(&str, &[u8])> = libraries
        .iter()
        .map(|(name, path)| (name.as_str(), path.as_slice()))
        .collect();
    entries.sort_by(|a, b| compare_names(b.0.as_bytes(), a.0.as_bytes()));
    let mut strings = Vec::new();
    let base = CACHE_HEADER + entries.len() * CACHE_ENTRY;
    let mut table = Vec::new();
    for (name, path) in &entries {
        let key = base + strings.len();
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
        let value = base + strings.len();
        strings.extend_from_slice(path);
        strings.push(0);
        for word in [CACHE_FLAGS, key as u32, value as u32, 0, 0, 0] {
            table.extend_from_slice(&word.to_le_bytes());
        }
    }
    let mut bytes = CACHE_MAGIC.to_vec();
    for word in [entries.len() as u32, strings.len() as u32, 2, 0, 0, 0, 0] {
        // 2: little endian.
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend(table);
    bytes.extend(strings);
    bytes
}

/// The order of the cache (`_dl_cache_libcmp`): numbers in names compare as numbers.
fn compare_names(mut a: &[u8], mut b: &[u8]) -> std::cmp::Ordering {
    let number = |text: &[u8]| {
        let digits = text.iter().take_while(|c| c.is_ascii_digit()).count();
        let value = text.iter().take(digits).fold(0i32, |value, digit| {
            value.wrapping_mul(10).wrapping_add(i32::from(digit - b'0'))
        });
        (value, digits)
    };
    loop {
        match (a, b) {
            ([], []) => return std::cmp::Ordering::Equal,
            ([], _) => return std::cmp::Ordering::Less,
            (_, []) => return std::cmp::Ordering::Greater,
            ([x, ..], [y, ..]) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let ((left, skip_a), (right, skip_b)) = (number(a), number(b));
                if left != right {
                    return left.cmp(&right);
                }
                a = a.get(skip_a..).unwrap_or_default();
                b = b.get(skip_b..).unwrap_or_default();
            }
            ([x, ..], [_, ..]) if x.is_ascii_digit() => return std::cmp::Ordering::Greater,
            ([_, ..], [y, ..]) if y.is_ascii_digit() => return std::cmp::Ordering::Less,
            ([x, rest_a @ ..], [y, rest_b @ ..]) => {
                if x != y {
                    return (*x as i8).cmp(&(*y as i8));
                }
                (a, b) = (rest_a, rest_b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::Guest;

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("kiln-program-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, path: &str, text: &str) -> PathBuf {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        }

        /// Compiles C; `None` without a compiler.
        fn compile(&self, output: &str, text: &str, arguments: &[&str]) -> Option<PathBuf> {
            let source = self.write(&format!("{output}.c"), text);
            let target = self.0.join(output);
            let done = Command::new("cc")
                .arg("-o")
                .args([&target, &source])
                .args(arguments)
                .current_dir(&self.0)
                .output()
                .ok()?;
            assert!(
                done.status.success(),
                "{}",
                String::from_utf8_lossy(&done.stderr)
            );
            Some(target)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn options() -> BuildOptions<'static> {
        BuildOptions::new(Guest {
            kernel: b"",
            vm_shim: b"",
        })
    }

    fn packed(path: &Path) -> Packed {
        pack(&Source::detect(path).unwrap(), &options(), "test".into()).unwrap()
    }

    /// Runs a program in the packed tree, with nothing else around it. `None`: not allowed here.
    fn run(
        temporary: &Temporary,
        packed: &Packed,
        program: &str,
        arguments: &[&str],
    ) -> Option<String> {
        let root = temporary.0.join("root");
        unpack(&packed.tree, &root);
        let output = Command::new("chroot")
            .arg(&root)
            .arg(program)
            .args(arguments)
            .env_clear()
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        if said.contains("cannot change root directory") {
            return None;
        }
        assert!(output.status.success(), "{program}: {said}");
        Some(said)
    }

    fn unpack(tree: &Tree, root: &Path) {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let at =
            |path: &[u8]| root.join(std::str::from_utf8(path).unwrap().trim_start_matches('/'));
        fs::create_dir_all(root).unwrap();
        tree.walk(&mut |path, node| {
            match node {
                Node::Directory(_) => fs::create_dir_all(at(path)).unwrap(),
                Node::Link { target } => {
                    symlink(std::str::from_utf8(target).unwrap(), at(path)).unwrap()
                }
                Node::File { content, metadata } => {
                    fs::write(at(path), content.read()?).unwrap();
                    let mode = fs::Permissions::from_mode(metadata.mode.into());
                    fs::set_permissions(at(path), mode).unwrap();
                }
            }
            Ok(())
        })
        .unwrap();
    }

    /// A program of Debian's, which has to be there.
    fn installed(path: &str) -> &Path {
        let path = Path::new(path);
        assert!(
            path.exists(),
            "{} is needed: tests/tools/install",
            path.display()
        );
        path
    }

    #[test]
    fn redis_has_all_it_needs() {
        let path = installed("/usr/bin/redis-server");
        let temporary = Temporary::new("redis");
        let packed = packed(path);
        assert_eq!(packed.missing, []);
        assert_eq!(packed.manifest.program, "/usr/bin/redis-server");
        assert!(
            packed
                .tree
                .get_following("/lib64/ld-linux-x86-64.so.2")
                .is_some()
        );
        if let Some(said) = run(&temporary, &packed, "/usr/bin/redis-server", &["--version"]) {
            assert!(said.contains("Redis server"), "{said}");
        }
    }

    #[test]
    fn nginx_has_its_configuration() {
        let path = installed("/usr/sbin/nginx");
        let temporary = Temporary::new("nginx");
        let packed = packed(path);
        assert_eq!(packed.missing, []);
        unpack(&packed.tree, &temporary.0.join("root"));
        let _ = fs::create_dir(temporary.0.join("root/dev"));
        fs::write(temporary.0.join("root/dev/null"), "").unwrap();
        let Some(said) = run_existing(&temporary, "/usr/sbin/nginx", &["-t"]) else {
            return;
        };
        assert!(said.contains("test is successful"), "{said}");
    }

    #[test]
    fn python_has_its_library() {
        let path = installed("/usr/bin/python3");
        let temporary = Temporary::new("python");
        let packed = packed(path);
        let line = "import json, encodings.idna; print(json.dumps('it runs'))";
        if let Some(said) = run(&temporary, &packed, "/usr/bin/python3", &["-c", line]) {
            assert!(said.contains("it runs"), "{said}");
        }
    }

    #[test]
    fn recipes_stand_for_versions() {
        assert!(fits("python3*", b"python3.11") && fits("python3*", b"python3"));
        assert!(!fits("python3*", b"python") && !fits("nginx", b"nginx-debug"));
        let temporary = Temporary::new("recipes");
        for name in ["perl5", "perl", "ruby"] {
            fs::create_dir_all(temporary.0.join("usr/share").join(name)).unwrap();
        }
        let on_host = |path: &[u8]| {
            let path = str::from_utf8(path).unwrap();
            temporary.0.join(path.trim_start_matches('/'))
        };
        assert_eq!(
            recipe_paths("/usr/share/perl*", on_host),
            [b"/usr/share/perl".to_vec(), b"/usr/share/perl5".to_vec()]
        );
        assert!(recipe_paths("/none/perl*", on_host).is_empty());
        assert_eq!(recipe_paths("/usr/x", on_host), [b"/usr/x".to_vec()]);
    }

    fn run_existing(temporary: &Temporary, program: &str, arguments: &[&str]) -> Option<String> {
        let root = temporary.0.join("root");
        let output = Command::new("chroot")
            .arg(&root)
            .arg(program)
            .args(arguments)
            .env_clear()
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        (!said.contains("cannot change root directory")).then_some(said)
    }

    #[test]
    fn libraries_are_found_by_origin_and_run_path() {
        let temporary = Temporary::new("origin");
        let library = "int answer(void) { return 42; }";
        fs::create_dir_all(temporary.0.join("sub/lib")).unwrap();
        fs::create_dir_all(temporary.0.join("sub/bin")).unwrap();
        if temporary
            .compile(
                "sub/lib/libanswer.so",
                library,
                &["-shared", "-fPIC", "-Wl,-soname,libanswer.so"],
            )
            .is_none()
        {
            return;
        }
        let main = "#include <stdio.h>\nint answer(void);\nint main(void) { printf(\"%d\\n\", answer()); return 0; }";
        let program = temporary
            .compile(
                "sub/bin/main",
                main,
                &["-Lsub/lib", "-lanswer", "-Wl,-rpath,$ORIGIN/../lib"],
            )
            .unwrap();
        let packed = packed(&program);
        assert_eq!(packed.missing, []);
        assert_eq!(packed.manifest.program, "/app/main");
        assert!(packed.tree.get_following("/lib/libanswer.so").is_some());
        if let Some(said) = run(&temporary, &packed, "/app/main", &[]) {
            assert_eq!(said, "42\n");
        }

        fs::remove_file(temporary.0.join("sub/lib/libanswer.so")).unwrap();
        let again = super::tests::packed(&program);
        let missing = again.missing.first().unwrap();
        assert_eq!(missing.library, "libanswer.so");
        assert!(missing.searched.iter().any(|directory| directory == "/lib"));
    }

    #[test]
    fn a_static_program_comes_alone() {
        let temporary = Temporary::new("static");
        let main = "int main(void) { return 0; }";
        let Some(program) = temporary.compile("alone", main, &["-static"]) else {
            return;
        };
        let packed = packed(&program);
        assert!(
            packed.tree.get("/lib64").is_none() && packed.tree.get("/etc/ld.so.cache").is_none()
        );
        assert_eq!(packed.manifest.provenance.len(), 1);
        run(&temporary, &packed, "/app/alone", &[]);
    }

    #[test]
    fn a_project_says_it_all() {
        let temporary = Temporary::new("project");
        if temporary
            .compile("server", "int main(void) { return 0; }", &[])
            .is_none()
        {
            return;
        }
        temporary.write("conf/a.conf", "a");
        temporary.write(
            "kiln.toml",
            "name = 'x'\nprogram = 'server'\nuser = 'www-data'\nworking-directory = '/work'\nvolumes = ['/data']\nports = [80]\ninclude = ['conf:/etc/app', 'conf']\n",
        );
        let packed = packed(&temporary.0);
        assert_eq!(packed.manifest.user, User { uid: 33, gid: 33 });
        assert_eq!(
            packed.manifest.environment.get("PATH").unwrap(),
            DEFAULT_PATH
        );
        for path in [
            "/etc/app/a.conf",
            "/app/conf/a.conf",
            "/work",
            "/data",
            "/etc/passwd",
        ] {
            assert!(packed.tree.get(path).is_some(), "{path}");
        }
    }

    #[test]
    fn a_site_leaves_out_what_is_not_of_it() {
        let temporary = Temporary::new("site");
        for path in [
            "index.html",
            ".git/config",
            ".well-known/x",
            "posts/a.html",
            "kiln.toml",
        ] {
            temporary.write(
                path,
                if path == "kiln.toml" {
                    "site = '.'"
                } else {
                    "x"
                },
            );
        }
        std::os::unix::fs::symlink("posts/a.html", temporary.0.join("inside")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", temporary.0.join("outside")).unwrap();
        let mut options = options();
        let server = fs::read("/bin/true").unwrap();
        options.site_server = Some(&server);
        let source = Source::detect(&temporary.0).unwrap();
        let packed = pack(&source, &options, "x".into()).unwrap();
        assert_eq!(packed.manifest.program, SITE_SERVER);
        for path in [
            "/site/index.html",
            "/site/.well-known/x",
            "/site/posts/a.html",
        ] {
            assert!(
                matches!(packed.tree.get(path), Some(Node::File { .. })),
                "{path}"
            );
        }
        assert!(matches!(
            packed.tree.get("/site/inside"),
            Some(Node::Link { .. })
        ));
        if Path::new("/etc/hostname").exists() {
            assert!(matches!(
                packed.tree.get("/site/outside"),
                Some(Node::File { .. })
            ));
        }
        for path in ["/site/.git", "/site/kiln.toml"] {
            assert!(packed.tree.get(path).is_none(), "{path}");
        }
    }

    #[test]
    fn a_directory_with_neither_says_what_was_looked_for() {
        let temporary = Temporary::new("neither");
        let said = |path: &Path| {
            let error = Source::detect(path).unwrap_err();
            format!("{error} | {}", error.remedy().unwrap_or_default())
        };
        assert!(said(&temporary.0).contains("neither a kiln.toml nor an index.html"));
        temporary.write("_config.yml", "");
        temporary.write("index.html", "---\ntitle: x\n---\n");
        assert!(said(&temporary.0).contains("sources of a site"));
        temporary.write("_site/index.html", "<html>");
        assert!(said(&temporary.0).contains("_site: give that"));
        let script = temporary.write("script", "#!/bin/sh\n");
        assert!(said(&script).contains("is a script"));
        assert!(said(&temporary.0.join("gone")).contains("does not exist"));
    }

    #[test]
    fn a_cache_is_read_as_it_was_written() {
        let libraries: BTreeMap<String, Vec<u8>> = [
            "libc.so.6",
            "libz.so.1",
            "libcrypto.so.3",
            "libpcre2-8.so.0",
            "libpcre2-16.so.0",
        ]
        .iter()
        .map(|name| (name.to_string(), format!("/usr/lib/{name}").into_bytes()))
        .collect();
        let bytes = make_cache(&libraries);
        let read = parse_cache(&bytes);
        assert_eq!(read.len(), 5);
        assert_eq!(read["libz.so.1"], "/usr/lib/libz.so.1");
        for cut in 0..bytes.len() {
            let _ = parse_cache(&bytes[..cut]);
        }
        assert!(compare_names(b"libx8.so", b"libx16.so").is_lt());
        assert!(compare_names(b"liba.so", b"lib1.so").is_lt());
        assert!(compare_names(b"lib.so.6", b"lib.so").is_gt());
    }
}
