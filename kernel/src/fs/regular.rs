//! Open regular files: a [`File`] whose contents are read and written through its inode.

use alloc::{string::String, sync::Arc};
use core::any::Any;

use linux_raw_sys::ioctl;

use super::{Inode, Metadata};
use crate::{
    Errno, Result,
    file::{File, Sink, Source},
    memory::user,
    task::Thread,
};

/// An open regular file.
pub struct RegularFile {
    inode: Arc<dyn Inode>,
}

impl RegularFile {
    /// Opens an inode.
    #[must_use]
    pub fn open(inode: Arc<dyn Inode>) -> Arc<dyn File> {
        Arc::new(RegularFile { inode })
    }
}

impl File for RegularFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_seekable(&self) -> bool {
        true
    }

    fn read_at(&self, position: u64, sink: &mut Sink<'_>) -> Result<usize> {
        self.inode.read_at(position, sink)
    }

    fn write_at(&self, position: u64, source: &mut Source<'_>) -> Result<usize> {
        self.inode.write_at(position, source)
    }

    fn metadata(&self) -> Result<Metadata> {
        self.inode.metadata()
    }

    fn inode(&self) -> Option<&Arc<dyn Inode>> {
        Some(&self.inode)
    }

    fn ioctl(&self, _: &Thread, request: u32, argument: u64) -> Result<usize> {
        match request {
            // Regular files can be read up to their end; the position is not known here, so all of it counts.
            ioctl::FIONREAD => {
                let size = self.inode.metadata()?.size.min(i32::MAX as u64) as i32;
                user::write(argument, &size)?;
                Ok(0)
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn synchronize(&self, data_only: bool) -> Result<()> {
        self.inode.synchronize(data_only)
    }

    fn describe(&self) -> String {
        String::from("file")
    }
}
