//! The file tree of an instance: what is mounted where, and what the kernel puts into it at boot.
//!
//! * `/`: a tmpfs over the image's EROFS
//! * `/proc`, `/sys`, `/dev`: as programs expect them
//! * `/dev/shm`: a tmpfs
//! * volumes of the run, each at its path
//!
//! All of it but the root and the volumes is made when somebody first looks for it. So are `/etc/hostname`, `/etc/hosts` and
//! `/etc/resolv.conf`; [`FileTree::write_file`] is for those who learn more later (a name server from DHCP).

use alloc::{boxed::Box, format, string::String, sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering};

use kiln_abi::{
    configuration::{Network, RunConfiguration, Volume},
    link::FIRST_VOLUME,
};

use spin::Once;

use super::{
    Clock, Inode, Kind, device_number,
    erofs::Erofs,
    fuse::{Fuse, FuseNode, Transport},
    pool::Pool,
    proc, sys,
    tmpfs::{Devices, Tmpfs, TmpfsParts},
    vfs::{Location, Mount, MountSource, Resolve, View},
};
use crate::{
    Errno, Kernel, Result,
    file::{
        File, OpenFile, OpenFlags, Source,
        console::{Console, ConsoleInput},
        device::{Null, Random, Zero},
        locks::LockTable,
    },
    host::Host,
    link::Link,
    task::Process,
    trace,
};

/// Host name when nobody says one.
pub const DEFAULT_HOSTNAME: &str = "kiln";

/// What belongs to a file tree beside its root.
pub struct FileTree {
    /// Its root.
    pub root: Location,
    /// What the tmpfs over the image is made of.
    parts: TmpfsParts,
    /// Locks on files.
    pub locks: Arc<LockTable>,
    /// Root of the file system that memory files belong to, once there is one.
    memory_files: Once<Arc<dyn Inode>>,
    /// What standard input reads.
    pub input: Arc<ConsoleInput>,
    next_mount: AtomicU64,
}

struct DeviceTable {
    host: Host,
    input: Arc<ConsoleInput>,
}

/// Name, major and minor number, and permissions of the devices in `/dev`.
const DEVICES: &[(&str, u32, u32, u32)] = &[
    ("null", 1, 3, 0o666),
    ("zero", 1, 5, 0o666),
    ("full", 1, 7, 0o666),
    ("random", 1, 8, 0o666),
    ("urandom", 1, 9, 0o666),
    ("tty", 5, 0, 0o666),
    ("console", 5, 1, 0o600),
];

/// Links in `/dev`.
const DEVICE_LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

impl Devices for DeviceTable {
    fn open(&self, kind: Kind, device: u64, _: OpenFlags) -> Result<Arc<dyn File>> {
        if kind != Kind::CharacterDevice {
            return Err(Errno::ENXIO);
        }
        Ok(match super::device_parts(device) {
            (1, 3) => Arc::new(Null),
            (1, 5) => Arc::new(Zero { full: false }),
            (1, 7) => Arc::new(Zero { full: true }),
            (1, 8 | 9) => Arc::new(Random { host: self.host }),
            (5, 1) => Console::new(self.host, Arc::clone(&self.input)),
            // No process here has a controlling terminal, which /dev/tty would be.
            _ => return Err(Errno::ENXIO),
        })
    }
}

/// Carries the requests of one volume over the link.
struct VolumeTransport {
    link: Arc<Link>,
    channel: u32,
}

impl Transport for VolumeTransport {
    fn call(&self, request: &[&[u8]]) -> Result<Vec<u8>> {
        self.link.call(self.channel, request)
    }

    fn post(&self, request: &[&[u8]]) -> Result<()> {
        self.link.post(self.channel, request)
    }
}

/// The clock of files: the wall clock as the program sees it.
struct FileClock(Arc<Kernel>);

impl Clock for FileClock {
    fn now(&self) -> super::Timestamp {
        super::Timestamp::from(self.0.clock.realtime())
    }
}

/// Makes the file tree of an instance; returns its root. What the kernel puts into it is made when somebody looks for it: a
/// program looks at little, and each start counts.
///
/// # Errors
/// `EINVAL` when the image's root is no EROFS file system that can be read, `EIO` when it is damaged; what volumes say.
pub fn start(kernel: &Arc<Kernel>) -> Result<Location> {
    let input = Arc::new(ConsoleInput::new(kernel.configuration.input));
    let parts = TmpfsParts {
        pool: Pool::new(kernel.host, kernel.memory_limit),
        clock: Arc::new(FileClock(Arc::clone(kernel))),
        devices: Some(Arc::new(DeviceTable {
            host: kernel.host,
            input: Arc::clone(&input),
        })),
        device: device_number(0, 21),
    };
    let image = Erofs::mount(kernel.root_image.bytes)?;
    let root = Mount::root(MountSource {
        kind: "overlay",
        source: "kiln",
        read_only: false,
        root: Tmpfs::over(parts.clone(), &image.root()?)?,
    });
    let tree = kernel.files.call_once(|| FileTree {
        root: root.clone(),
        parts,
        locks: Arc::new(LockTable::default()),
        memory_files: Once::new(),
        input,
        next_mount: AtomicU64::new(2),
    });
    for (names, make) in LATER {
        let kernel = Arc::clone(kernel);
        root.mount().put_off(names, move || {
            if let Some(tree) = kernel.files.get()
                && let Err(error) = make(tree, &kernel)
            {
                trace::error!(
                    "the kernel's files in /{} cannot be made: {error}",
                    names.join(", /")
                );
            }
        });
    }
    for (index, volume) in kernel.configuration.volumes.iter().enumerate() {
        mount_volume(kernel, tree, index, volume).inspect_err(|error| {
            trace::error!("the volume at {} cannot be mounted: {error}", volume.path);
        })?;
    }
    Ok(root)
}

/// Makes files of the kernel's.
type Make = fn(&FileTree, &Arc<Kernel>) -> Result<()>;

/// The names in the root directory that the kernel makes, or makes files below, and how.
const LATER: [(&[&str], Make); 2] = [
    (&["proc"], FileTree::mount_proc),
    (&["dev", "etc", "run", "sys", "tmp"], FileTree::furnish),
];

/// The program has ended: gives volumes what it changed in shared mappings.
pub fn finish(kernel: &Kernel) {
    let Some(root) = kernel.root.get() else {
        return;
    };
    for mount in root.mount().all() {
        if let Some(volume) = mount.root_inode().as_any().downcast_ref::<FuseNode>()
            && let Err(error) = volume.write_back_all()
        {
            trace::error!("changes in {} are lost: {error}", mount.path);
        }
    }
}

fn mount_volume(kernel: &Kernel, tree: &FileTree, index: usize, volume: &Volume) -> Result<()> {
    let link = Arc::clone(kernel.link.get().ok_or(Errno::ENODEV)?);
    let index = u32::try_from(index).map_err(|_| Errno::EINVAL)?;
    let transport = VolumeTransport {
        link,
        channel: FIRST_VOLUME + index,
    };
    let device = device_number(0, 40 + index);
    let root = Fuse::mount(
        Box::new(transport),
        Arc::clone(&tree.parts.clock),
        Arc::clone(&tree.parts.pool),
        device,
        volume.read_only,
    )?;
    tree.mount(&volume.path, "fuse", "volume", volume.read_only, root)
        .map(drop)
}

/// Hands over input from the monitor; empty is the end.
pub fn console_input(kernel: &Kernel, bytes: &[u8]) {
    if let Some(files) = kernel.files.get() {
        files.input.push(bytes);
    }
}

/// Opens standard input, output and error.
///
/// # Errors
/// As [`Process::add_file`].
pub fn open_standard_streams(process: &Process) -> Result<()> {
    let kernel = &process.kernel;
    let files = kernel.files.get().ok_or(Errno::ENODEV)?;
    let console: Arc<dyn File> = Console::new(kernel.host, Arc::clone(&files.input));
    for flags in [
        OpenFlags::empty(),
        OpenFlags::WRITE_ONLY,
        OpenFlags::WRITE_ONLY,
    ] {
        let path = Some(String::from("/dev/console"));
        let file = OpenFile::with_path(Arc::clone(&console), flags, path);
        process.add_file(file, false)?;
    }
    Ok(())
}

impl FileTree {
    /// What a tmpfs of this tree is made of.
    fn parts(&self, minor: u32) -> TmpfsParts {
        TmpfsParts {
            device: device_number(0, minor),
            ..self.parts.clone()
        }
    }

    /// Where tmpfs keeps data.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.parts.pool
    }

    /// Root of the file system that memory files belong to.
    pub fn memory_files(&self) -> &Arc<dyn Inode> {
        self.memory_files
            .call_once(|| Tmpfs::empty(self.parts(1), 0o1777))
    }

    /// The tree as the superuser sees it.
    fn view(&self) -> View {
        View::superuser(&self.root)
    }

    fn make(
        &self,
        path: &str,
        kind: Kind,
        permissions: u32,
        target: &str,
        device: u64,
    ) -> Result<()> {
        self.view()
            .create(&self.root, path, kind, permissions, target, device)
            .map(drop)
    }

    /// The directory at a path; made, with those above it, if it is missing.
    ///
    /// # Errors
    /// As `mkdir(2)`. That nothing else is there is not checked.
    pub fn make_directory(&self, path: &str, permissions: u32) -> Result<Location> {
        let view = self.view();
        let found = match view.find(&self.root, path, Resolve::FOLLOW) {
            Err(Errno::ENOENT) => {
                self.make_missing(path, permissions)?;
                view.find(&self.root, path, Resolve::FOLLOW)
            }
            found => found,
        };
        Ok(found?.location())
    }

    fn make_missing(&self, path: &str, permissions: u32) -> Result<()> {
        let ends = path.match_indices('/').map(|(end, _)| end);
        for end in ends.skip(1).chain([path.len()]) {
            let permissions = if end == path.len() {
                permissions
            } else {
                0o755
            };
            match self.make(&path[..end], Kind::Directory, permissions, "", 0) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Mounts a file system on a directory, which is made if it is missing.
    ///
    /// # Errors
    /// `ENOTDIR` if something else is there; as [`FileTree::make_directory`].
    pub fn mount(
        &self,
        path: &str,
        kind: &'static str,
        source: &'static str,
        read_only: bool,
        root: Arc<dyn Inode>,
    ) -> Result<Location> {
        let place = self.make_directory(path, 0o755)?;
        let identifier = self.next_mount.fetch_add(1, Ordering::Relaxed);
        place.mount_here(
            MountSource {
                kind,
                source,
                read_only,
                root,
            },
            identifier,
        )
    }

    /// Writes a file as the superuser, in place of what is there.
    ///
    /// # Errors
    /// As `open(2)` and `write(2)`.
    pub fn write_file(&self, path: &str, contents: &[u8], permissions: u32) -> Result<()> {
        let view = self.view();
        if let Some((directory, _)) = path.rsplit_once('/')
            && !directory.is_empty()
        {
            self.make_directory(directory, 0o755)?;
        }
        // A symbolic link (such as Debian's to systemd's resolv.conf) may lead nowhere: it is replaced.
        if let Ok(walk) = view.find(&self.root, path, Resolve::empty())
            && walk.metadata()?.kind == Kind::SymbolicLink
        {
            view.remove(&self.root, path, false)?;
        }
        let flags = OpenFlags::WRITE_ONLY | OpenFlags::CREATE | OpenFlags::TRUNCATE;
        let file = view.open(&self.root, path, flags, permissions, Resolve::empty())?;
        let count = file.write(&mut Source::kernel(contents))?;
        if count == contents.len() {
            Ok(())
        } else {
            Err(Errno::ENOSPC)
        }
    }

    fn mount_proc(&self, kernel: &Arc<Kernel>) -> Result<()> {
        self.mount("/proc", "proc", "proc", false, proc::root(kernel))
            .map(drop)
    }

    /// Makes everything but `/proc`.
    fn furnish(&self, kernel: &Arc<Kernel>) -> Result<()> {
        self.mount("/sys", "sysfs", "sysfs", true, sys::root(kernel))?;
        let devices = Tmpfs::empty(self.parts(6), 0o755);
        self.mount("/dev", "devtmpfs", "devtmpfs", false, devices)?;
        for &(name, major, minor, permissions) in DEVICES {
            let (path, device) = (format!("/dev/{name}"), device_number(major, minor));
            self.make(&path, Kind::CharacterDevice, permissions, "", device)?;
        }
        for &(name, target) in DEVICE_LINKS {
            let path = format!("/dev/{name}");
            self.make(&path, Kind::SymbolicLink, 0o777, target, 0)?;
        }
        let shared = Tmpfs::empty(self.parts(22), 0o1777);
        self.mount("/dev/shm", "tmpfs", "tmpfs", false, shared)?;
        self.make_directory("/run", 0o755)?;
        self.make_directory("/tmp", 0o1777)?;
        self.write_network_files(&kernel.configuration)
    }

    fn write_network_files(&self, run: &RunConfiguration) -> Result<()> {
        let hostname = run.hostname.as_deref().unwrap_or(DEFAULT_HOSTNAME);
        self.write_file("/etc/hostname", format!("{hostname}\n").as_bytes(), 0o644)?;
        let hosts =
            format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        self.write_file("/etc/hosts", hosts.as_bytes(), 0o644)?;
        let servers = match &run.network {
            Network::Socket { name_servers } => name_servers.as_slice(),
            Network::Static(network) => network.name_servers.as_slice(),
            Network::None | Network::Dhcp => &[],
        };
        self.set_name_servers(servers)
    }

    /// Writes `/etc/resolv.conf`.
    ///
    /// # Errors
    /// As [`FileTree::write_file`].
    pub fn set_name_servers(&self, servers: &[core::net::IpAddr]) -> Result<()> {
        let text: String = servers
            .iter()
            .map(|server| format!("nameserver {server}\n"))
            .collect();
        self.write_file("/etc/resolv.conf", text.as_bytes(), 0o644)
    }
}
