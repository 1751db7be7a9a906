//! The console: standard output and error go to the host's console, standard input comes from the monitor.
//!
//! It is no terminal: `TCGETS` is `ENOTTY`, as when a program's output is redirected.

use alloc::{collections::VecDeque, string::String, sync::Arc};
use core::any::Any;

use linux_raw_sys::ioctl;

use super::{File, OpenFlags, Readiness, Sink, Source, WatchList, anonymous_metadata};
use crate::{
    Errno, Result,
    fs::{Kind, Metadata, device_number},
    host::Host,
    memory::user,
    sync::Mutex,
    task::Thread,
};

/// Bytes copied at once.
const CHUNK: usize = 4096;

struct Queue {
    bytes: VecDeque<u8>,
    ended: bool,
}

/// What was typed, or piped into `kiln run`.
pub struct ConsoleInput {
    queue: Mutex<Queue>,
    watchers: WatchList,
}

impl ConsoleInput {
    /// Input that waits for what the monitor sends; or, if nobody is going to send anything, that is at its end.
    #[must_use]
    pub fn new(comes: bool) -> ConsoleInput {
        ConsoleInput {
            queue: Mutex::new(Queue {
                bytes: VecDeque::new(),
                ended: !comes,
            }),
            watchers: WatchList::default(),
        }
    }

    /// Adds input from the monitor; an empty piece is the end.
    pub fn push(&self, bytes: &[u8]) {
        {
            let mut queue = self.queue.lock();
            if bytes.is_empty() {
                queue.ended = true;
            } else {
                queue.bytes.extend(bytes);
            }
        }
        self.watchers.notify(Readiness::READABLE);
    }
}

/// An open console.
pub struct Console {
    host: Host,
    input: Arc<ConsoleInput>,
}

impl Console {
    /// Opens the console.
    #[must_use]
    pub fn new(host: Host, input: Arc<ConsoleInput>) -> Arc<Console> {
        Arc::new(Console { host, input })
    }
}

impl File for Console {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn read(&self, sink: &mut Sink<'_>, _: OpenFlags) -> Result<usize> {
        let mut queue = self.input.queue.lock();
        if queue.bytes.is_empty() {
            return if queue.ended || sink.remaining() == 0 {
                Ok(0)
            } else {
                Err(Errno::EAGAIN)
            };
        }
        let (first, second) = queue.bytes.as_slices();
        let mut done = sink.put(first)?;
        if done == first.len() && !second.is_empty() {
            done += sink.put(second).unwrap_or(0);
        }
        queue.bytes.drain(..done);
        Ok(done)
    }

    fn write(&self, source: &mut Source<'_>, _: OpenFlags) -> Result<usize> {
        let mut done = 0;
        let mut chunk = [0; CHUNK];
        while source.remaining() > 0 {
            let count = match source.take(&mut chunk) {
                Ok(count) => count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            };
            let mut rest = &chunk[..count];
            while !rest.is_empty() {
                match self.host.console_write(rest) {
                    Ok(written) if written > 0 => {
                        rest = rest.get(written..).unwrap_or_default();
                        done += written;
                    }
                    Err(Errno::EINTR) => {}
                    Err(error) if done == 0 => return Err(error),
                    _ => return Ok(done),
                }
            }
        }
        Ok(done)
    }

    fn readiness(&self) -> Readiness {
        let queue = self.input.queue.lock();
        if queue.ended || !queue.bytes.is_empty() {
            Readiness::READABLE | Readiness::WRITABLE
        } else {
            Readiness::WRITABLE
        }
    }

    fn watch_list(&self) -> Option<&WatchList> {
        Some(&self.input.watchers)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(Metadata {
            special_device: device_number(5, 1),
            ..anonymous_metadata(Kind::CharacterDevice, 0o620, 3)
        })
    }

    fn ioctl(&self, _: &Thread, request: u32, argument: u64) -> Result<usize> {
        match request {
            ioctl::FIONREAD => {
                let length = self.input.queue.lock().bytes.len().min(i32::MAX as usize) as i32;
                user::write(argument, &length)?;
                Ok(0)
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn describe(&self) -> String {
        String::from("/dev/console")
    }
}
