//! Character devices without hardware: `null`, `zero`, `full`, `random`.

use alloc::{string::String, sync::Arc};
use core::any::Any;

use super::{File, OpenFlags, Readiness, Sink, Source, WatchList, anonymous_metadata};
use crate::{
    Errno, Result,
    fs::{Inode, Kind, Metadata},
    host::Host,
    task::Thread,
};

/// Swallows what is written; is at its end at once (`/dev/null`).
pub struct Null;
/// Endless zeros (`/dev/zero`); `full`: writing finds no space (`/dev/full`).
pub struct Zero {
    /// Whether writes fail with `ENOSPC`.
    pub full: bool,
}
/// Endless random bytes (`/dev/random`, `/dev/urandom`).
pub struct Random {
    /// Where they come from.
    pub host: Host,
}

fn swallow(source: &mut Source<'_>) -> usize {
    let count = source.remaining();
    source.advance(count);
    count
}

impl File for Null {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, _: u64, _: &mut Sink<'_>) -> Result<usize> {
        Ok(0)
    }

    fn write_at(&self, _: u64, source: &mut Source<'_>) -> Result<usize> {
        Ok(swallow(source))
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::CharacterDevice, 0o666, 4))
    }

    fn describe(&self) -> String {
        String::from("/dev/null")
    }
}

impl File for Zero {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, _: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let count = sink.remaining();
        sink.put_zeros(count)
    }

    fn write_at(&self, _: u64, source: &mut Source<'_>) -> Result<usize> {
        if self.full {
            Err(Errno::ENOSPC)
        } else {
            Ok(swallow(source))
        }
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::CharacterDevice, 0o666, 5))
    }

    fn describe(&self) -> String {
        String::from(if self.full { "/dev/full" } else { "/dev/zero" })
    }
}

impl File for Random {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, _: u64, sink: &mut Sink<'_>) -> Result<usize> {
        let mut done = 0;
        let mut chunk = [0; 256];
        while sink.remaining() > 0 {
            let length = sink.remaining().min(chunk.len());
            let part = &mut chunk[..length];
            self.host.entropy(part)?;
            match sink.put(part) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write_at(&self, _: u64, source: &mut Source<'_>) -> Result<usize> {
        Ok(swallow(source))
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(anonymous_metadata(Kind::CharacterDevice, 0o666, 6))
    }

    fn describe(&self) -> String {
        String::from("/dev/urandom")
    }
}

/// A device that was opened by path: behaves as the device, has the attributes of its node.
pub struct DeviceNode {
    inode: Arc<dyn Inode>,
    file: Arc<dyn File>,
}

impl DeviceNode {
    /// Joins a device and the node it was opened by.
    #[must_use]
    pub fn wrap(inode: Arc<dyn Inode>, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(DeviceNode { inode, file })
    }
}

impl File for DeviceNode {
    fn as_any(&self) -> &dyn Any {
        self.file.as_any()
    }

    fn is_seekable(&self) -> bool {
        self.file.is_seekable()
    }

    fn read(&self, sink: &mut Sink<'_>, flags: OpenFlags) -> Result<usize> {
        self.file.read(sink, flags)
    }

    fn write(&self, source: &mut Source<'_>, flags: OpenFlags) -> Result<usize> {
        self.file.write(source, flags)
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        self.file.read_at(position, sink)
    }

    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        self.file.write_at(position, source)
    }

    fn readiness(&self) -> Readiness {
        self.file.readiness()
    }

    fn watch_list(&self) -> Option<&WatchList> {
        self.file.watch_list()
    }

    fn metadata(&self) -> Result<Metadata> {
        self.inode.metadata()
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        Some(&self.inode)
    }

    fn ioctl(&self, thread: &Thread, request: u32, argument: u64) -> Result<usize> {
        self.file.ioctl(thread, request, argument)
    }

    fn synchronize(&self, data_only: bool) -> Result<()> {
        self.file.synchronize(data_only)
    }

    fn describe(&self) -> String {
        self.file.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_do_what_their_names_say() {
        let mut bytes = [7; 600];
        assert_eq!(Null.read_at(0, &mut Sink::kernel(&mut bytes)), Ok(0));
        assert_eq!(Null.write_at(0, &mut Source::kernel(&bytes)), Ok(600));
        let zero = Zero { full: false };
        assert_eq!(zero.read_at(0, &mut Sink::kernel(&mut bytes)), Ok(600));
        assert_eq!(bytes, [0; 600]);
        let full = Zero { full: true };
        assert_eq!(
            full.write_at(0, &mut Source::kernel(&bytes)),
            Err(Errno::ENOSPC)
        );
    }
}
