//! The file tree of an instance: what is mounted where, and what the kernel puts into it at boot.
//!
//! * `/`: a tmpfs over the image's EROFS
//! * `/proc`, `/sys`, `/dev`: as programs expect them
//! * `/dev/shm`: a tmpfs
//! * volumes of the run, each at its path
//!
//! `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` are written at boot; [`FileTree::write_file`] is for those who
//! learn more later (a name server from DHCP).

use alloc::{
    boxed::Box,
    format,
    string::{String, ToString},
    sync::Arc,
    vec::Vec,
};
use core::sync::atomic::{AtomicU64, Ordering};

use kiln_abi::{
    configuration::{Network, RunConfiguration, Volume},
    link::FIRST_VOLUME,
};

use super::{
    Clock, Inode, Kind, device_number,
    erofs::Erofs,
    fuse::{Fuse, FuseNode, Transport},
    pool::Pool,
    proc, sys,
    tmpfs::{Devices, Tmpfs, TmpfsParts},
    vfs::{Identity, Location, Mount, MountSource, Resolve, View},
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
    trace,
};

/// Host name when nobody says one.
pub const DEFAULT_HOSTNAME: &str = "kiln";

/// What belongs to a file tree beside its root.
pub struct FileTree {
    /// Its root.
    pub root: Location,
    /// Where tmpfs keeps data.
    pub pool: Arc<Pool>,
    /// Locks on files.
    pub locks: Arc<LockTable>,
    /// Root of the file system that memory files belong to.
    pub memory_files: Arc<dyn Inode>,
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

/// Directories whose files the kernel makes when somebody looks for them.
const LATER: &[&str] = &["dev", "etc"];

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

/// Makes the file tree of an instance; returns its root.
///
/// # Errors
/// `EINVAL` when the image's root is no EROFS file system that can be read, `EIO` when it is damaged; what volumes say.
pub fn start(kernel: &Arc<Kernel>) -> Result<Location> {
    let pool = Pool::new(kernel.host, kernel.memory_limit);
    let clock: Arc<dyn Clock> = Arc::new(FileClock(Arc::clone(kernel)));
    let input = Arc::new(ConsoleInput::default());
    let devices: Arc<dyn Devices> = Arc::new(DeviceTable {
        host: kernel.host,
        input: Arc::clone(&input),
    });
    let parts = |minor: u32| TmpfsParts {
        pool: Arc::clone(&pool),
        clock: Arc::clone(&clock),
        devices: Some(Arc::clone(&devices)),
        device: device_number(0, minor),
    };
    let image = Erofs::mount(kernel.root_image.bytes)?;
    let root = Tmpfs::over(parts(21), &image.root()?)?;
    let root = Mount::root(MountSource {
        kind: "overlay",
        source: String::from("kiln"),
        read_only: false,
        root,
    });
    let tree = FileTree {
        root: root.clone(),
        memory_files: Tmpfs::empty(parts(1), 0o1777),
        pool: Arc::clone(&pool),
        locks: Arc::new(LockTable::default()),
        input,
        next_mount: AtomicU64::new(2),
    };
    for (path, permissions) in [
        ("/proc", 0o555),
        ("/sys", 0o555),
        ("/dev", 0o755),
        ("/etc", 0o755),
        ("/run", 0o755),
        ("/tmp", 0o1777),
    ] {
        tree.make_directory(path, permissions)?;
    }
    tree.mount("/proc", "proc", "proc", false, proc::root(kernel))?;
    tree.mount("/sys", "sysfs", "sysfs", true, sys::root(kernel))?;
    let (devices, shared) = (
        Tmpfs::empty(parts(6), 0o755),
        Tmpfs::empty(parts(22), 0o1777),
    );
    let later = Arc::clone(kernel);
    root.mount().put_off(LATER, move || {
        let Some(tree) = later.files.get() else {
            return;
        };
        if let Err(error) = tree.furnish(devices, shared, &later.configuration) {
            trace::error!("the kernel's files in /dev and /etc cannot be made: {error}");
        }
    });
    let tree = kernel.files.call_once(|| tree);
    for (index, volume) in kernel.configuration.volumes.iter().enumerate() {
        mount_volume(kernel, tree, &clock, index, volume).inspect_err(|error| {
            trace::error!("the volume at {} cannot be mounted: {error}", volume.path);
        })?;
    }
    Ok(root)
}

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

fn mount_volume(
    kernel: &Kernel,
    tree: &FileTree,
    clock: &Arc<dyn Clock>,
    index: usize,
    volume: &Volume,
) -> Result<()> {
    let link = Arc::clone(kernel.link.get().ok_or(Errno::ENODEV)?);
    let index = u32::try_from(index).map_err(|_| Errno::EINVAL)?;
    let transport = VolumeTransport {
        link,
        channel: FIRST_VOLUME + index,
    };
    let device = device_number(0, 40 + index);
    let root = Fuse::mount(
        Box::new(transport),
        Arc::clone(clock),
        Arc::clone(&tree.pool),
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

/// Standard input, output and error.
#[must_use]
pub fn standard_streams(kernel: &Kernel) -> Vec<Arc<OpenFile>> {
    let Some(files) = kernel.files.get() else {
        return Vec::new();
    };
    let console: Arc<dyn File> = Console::new(kernel.host, Arc::clone(&files.input));
    let path = || Some(String::from("/dev/console"));
    [
        OpenFlags::empty(),
        OpenFlags::WRITE_ONLY,
        OpenFlags::WRITE_ONLY,
    ]
    .into_iter()
    .map(|flags| OpenFile::with_path(Arc::clone(&console), flags, path()))
    .collect()
}

impl FileTree {
    /// The tree as the superuser sees it.
    fn view(&self) -> View {
        View {
            root: self.root.clone(),
            working_directory: self.root.clone(),
            identity: Identity::default(),
            umask: 0,
        }
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

    /// Makes a directory and those above it, unless they are there.
    ///
    /// # Errors
    /// `ENOTDIR` when something else is there.
    pub fn make_directory(&self, path: &str, permissions: u32) -> Result<()> {
        let mut end = 0;
        while end < path.len() {
            end = path[end + 1..]
                .find('/')
                .map_or(path.len(), |next| end + 1 + next);
            let part = &path[..end];
            let permissions = if end == path.len() {
                permissions
            } else {
                0o755
            };
            match self.make(part, Kind::Directory, permissions, "", 0) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error),
            }
        }
        let view = self.view();
        let walk = view.find(&self.root, path, Resolve::FOLLOW)?;
        if walk.metadata()?.kind == Kind::Directory {
            Ok(())
        } else {
            Err(Errno::ENOTDIR)
        }
    }

    /// Mounts a file system on a directory, which is made if it is missing.
    ///
    /// # Errors
    /// As [`FileTree::make_directory`].
    pub fn mount(
        &self,
        path: &str,
        kind: &'static str,
        source: &str,
        read_only: bool,
        root: Arc<dyn Inode>,
    ) -> Result<Location> {
        self.make_directory(path, 0o755)?;
        let place = self
            .view()
            .find(&self.root, path, Resolve::FOLLOW)?
            .location();
        let identifier = self.next_mount.fetch_add(1, Ordering::Relaxed);
        place.mount_here(
            MountSource {
                kind,
                source: source.to_string(),
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

    /// Makes the files in [`LATER`].
    fn furnish(
        &self,
        devices: Arc<dyn Inode>,
        shared: Arc<dyn Inode>,
        run: &RunConfiguration,
    ) -> Result<()> {
        self.mount("/dev", "devtmpfs", "devtmpfs", false, devices)?;
        for &(name, major, minor, permissions) in DEVICES {
            let (path, device) = (format!("/dev/{name}"), device_number(major, minor));
            self.make(&path, Kind::CharacterDevice, permissions, "", device)?;
        }
        for &(name, target) in DEVICE_LINKS {
            let path = format!("/dev/{name}");
            self.make(&path, Kind::SymbolicLink, 0o777, target, 0)?;
        }
        self.make_directory("/dev/shm", 0o1777)?;
        self.mount("/dev/shm", "tmpfs", "tmpfs", false, shared)?;
        self.write_network_files(run)
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
