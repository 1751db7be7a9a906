//! An instance's console: what its program writes, kept in a log of bounded size, and shown in the foreground.
//!
//! The log holds the output's bytes unchanged, and Kiln's own remarks as lines of their own. It lies in two files: when
//! `console.log` is full it becomes `console.log.1`, replacing the one before. So the last [`HALF`] bytes at least are there.
//!
//! Not here: where the bytes come from (the monitor's event loop).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;

/// Bytes in each of the log's two files.
pub const HALF: u64 = 8 << 20;

/// Largest write to a pipe or terminal that cannot block once it is ready (`PIPE_BUF`).
const ATOMIC: usize = 4096;

/// Writes a console log.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
    /// The last byte ended a line.
    fresh_line: bool,
    /// Bytes that could not be kept since the last that could, and why.
    lost: Option<(u64, String)>,
}

impl Log {
    /// Begins a log.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, HALF)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
            length: 0,
            limit,
            fresh_line: true,
            lost: None,
        })
    }

    /// Adds output. What cannot be kept, because the disk is full above all, is left out, and a line says so as soon as there is room
    /// again: a program does not end because nobody can keep what it says.
    pub fn write(&mut self, bytes: &[u8]) {
        if let Some((count, reason)) = &self.lost {
            let begin = if self.fresh_line { "" } else { "\n" };
            let line = format!("{begin}kiln: {count} bytes of output are missing here: {reason}\n");
            // Half a line would be worse than none.
            let length = Some(self.length).filter(|length| *length < self.limit);
            let length = length.unwrap_or(0);
            if self.append(line.as_bytes()).is_err() {
                let _ = self.file.set_len(length);
                let _ = self.file.seek(SeekFrom::Start(length));
                self.length = length;
                return self.lose(bytes.len(), None);
            }
            self.lost = None;
        }
        if let Err((left, error)) = self.append(bytes) {
            self.lose(left, Some(&error));
        }
    }

    /// Counts bytes that are lost.
    fn lose(&mut self, bytes: usize, error: Option<&io::Error>) {
        let (count, _) = self.lost.get_or_insert_with(|| {
            let reason = error.map_or_else(String::new, ToString::to_string);
            (0, reason)
        });
        *count = count.saturating_add(bytes as u64);
    }

    /// Writes bytes; otherwise says how many of them are left, and why.
    fn append(&mut self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        if self.length >= self.limit {
            let next = fs::rename(&self.path, older(&self.path)).and_then(|()| open(&self.path));
            self.file = next.map_err(|error| (bytes.len(), error))?;
            self.length = 0;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = match self.file.write(rest) {
                Ok(0) => return Err((rest.len(), io::ErrorKind::WriteZero.into())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err((rest.len(), error)),
            };
            let (done, left) = rest.split_at(count);
            self.length = self.length.saturating_add(count as u64);
            if let Some(last) = done.last() {
                self.fresh_line = *last == b'\n';
            }
            rest = left;
        }
        Ok(())
    }

    /// Adds a remark of Kiln's own as a line.
    pub fn remark(&mut self, text: &str) {
        let begin = if self.fresh_line { "" } else { "\n" };
        self.write(format!("{begin}kiln: {}\n", text.trim_end()).as_bytes());
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Name of the older half.
fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// Standard output of a foreground run: bytes that it takes now, without ever blocking the monitor.
#[derive(Debug, Default)]
pub struct Terminal {
    waiting: Vec<u8>,
    sent: usize,
}

/// What became of a write to standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// All is out.
    All,
    /// The reader is slow: call [`Terminal::flush`] when it is ready.
    Waiting,
    /// Nobody reads any more.
    Closed,
    /// It was a terminal, and that has gone, which SIGHUP tells as well.
    HungUp,
}

impl Terminal {
    /// Shows bytes.
    ///
    /// # Errors
    /// Those of `write(2)`, but for a closed reader.
    pub fn show(&mut self, bytes: &[u8]) -> io::Result<Shown> {
        self.waiting.extend_from_slice(bytes);
        self.flush()
    }

    /// Shows what waits.
    ///
    /// # Errors
    /// As for [`Terminal::show`].
    pub fn flush(&mut self) -> io::Result<Shown> {
        let output = io::stdout();
        let mut output = output.lock();
        while let Some(rest) = self
            .waiting
            .get(self.sent..)
            .filter(|rest| !rest.is_empty())
        {
            let mut ready = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::OUT)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            if rustix::event::poll(&mut ready, Some(&now))? == 0 {
                return Ok(Shown::Waiting);
            }
            let piece = rest.get(..ATOMIC).unwrap_or(rest);
            match rustix::io::write(output.as_fd(), piece) {
                Ok(written) => self.sent += written,
                Err(rustix::io::Errno::AGAIN) => return Ok(Shown::Waiting),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE) => {
                    self.waiting.clear();
                    self.sent = 0;
                    return Ok(Shown::Closed);
                }
                Err(rustix::io::Errno::IO) if is_device(output.as_fd()) => {
                    self.waiting.clear();
                    self.sent = 0;
                    return Ok(Shown::HungUp);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.waiting.clear();
        self.sent = 0;
        output.flush()?;
        Ok(Shown::All)
    }
}

/// Whether a descriptor is that of a character device; of a terminal that has gone, nothing more can be said.
fn is_device(descriptor: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(descriptor).is_ok_and(|found| {
        rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::CharacterDevice
    })
}

/// Where to begin reading a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At its first byte.
    Start,
    /// At the last so many lines.
    LastLines(usize),
}

/// Reads a console log, also while it is being written.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    /// Output before the current file: what is left of the older half.
    before: Vec<u8>,
    file: Option<File>,
}

impl Reader {
    /// Opens a log. One that does not exist yet is empty.
    ///
    /// # Errors
    /// Those of reading files.
    pub fn open(path: &Path, begin: Begin) -> io::Result<Self> {
        let mut reader = Self {
            path: path.to_owned(),
            before: Vec::new(),
            file: None,
        };
        // Opened before the older half is read: a rotation between the two repeats nothing and loses nothing.
        reader.file = open_existing(path)?;
        let current = match &reader.file {
            Some(file) => file.metadata().ok().map(|metadata| metadata.ino()),
            None => None,
        };
        if let Some(mut file) = open_existing(&older(path))?
            && file.metadata().ok().map(|metadata| metadata.ino()) != current
        {
            file.read_to_end(&mut reader.before)?;
        }
        if let Begin::LastLines(count) = begin {
            let mut text = std::mem::take(&mut reader.before);
            if let Some(file) = &mut reader.file {
                file.read_to_end(&mut text)?;
            }
            let start = last_lines(&text, count);
            reader.before = text.split_off(start);
        }
        Ok(reader)
    }

    /// Copies what there is now to `output`. Returns the number of bytes.
    ///
    /// # Errors
    /// Those of reading and writing.
    pub fn copy(&mut self, output: &mut impl Write) -> io::Result<u64> {
        let before = std::mem::take(&mut self.before);
        output.write_all(&before)?;
        let mut copied = u64::try_from(before.len()).unwrap_or(u64::MAX);
        loop {
            if let Some(file) = &mut self.file {
                copied += io::copy(file, output)?;
            }
            // A new file under the name means that ours is full and read to its end.
            let here = self
                .file
                .as_ref()
                .and_then(|file| file.metadata().ok())
                .map(|data| data.ino());
            match open_existing(&self.path)? {
                Some(newer) if newer.metadata().ok().map(|data| data.ino()) != here => {
                    self.file = Some(newer)
                }
                _ => break,
            }
        }
        output.flush()?;
        Ok(copied)
    }
}

fn open_existing(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Offset of the last `count` lines.
fn last_lines(text: &[u8], count: usize) -> usize {
    if count == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    body.iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(count - 1)
        .map_or(0, |(position, _)| position + 1)
}

/// The last lines of a log, for error messages.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    const MOST: u64 = 64 << 10;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut text = Vec::new();
        file.take(MOST).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    String::from_utf8_lossy(text.get(last_lines(&text, lines)..).unwrap_or_default()).into_owned()
}

/// Waits for changes of the files in a directory.
#[derive(Debug)]
pub struct Watch {
    descriptor: rustix::fd::OwnedFd,
}

impl Watch {
    /// Watches a directory from now on.
    ///
    /// # Errors
    /// Those of `inotify_add_watch(2)`.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let descriptor = inotify::init(flags)?;
        let wanted = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVE_SELF
            | inotify::WatchFlags::DELETE_SELF;
        inotify::add_watch(&descriptor, directory, wanted)?;
        Ok(Self { descriptor })
    }

    /// Blocks until something has changed since the last call, or for about a second.
    ///
    /// # Errors
    /// Those of `poll(2)` and `read(2)`.
    pub fn wait(&self) -> io::Result<()> {
        let mut ready = [PollFd::new(&self.descriptor, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut ready, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(&self.descriptor, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::Scratch;

    fn scratch() -> (Scratch, PathBuf) {
        let scratch = Scratch::new();
        fs::create_dir_all(scratch.0.path()).unwrap();
        let path = scratch.0.path().join("console.log");
        (scratch, path)
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let (_scratch, path) = scratch();
        let mut log = Log::with_limit(&path, 1000).unwrap();
        for number in 0..500 {
            log.write(format!("line {number}\n").as_bytes());
        }
        let total = fs::metadata(&path).unwrap().len() + fs::metadata(older(&path)).unwrap().len();
        assert!(total < 2100, "{total}");
        let mut text = Vec::new();
        Reader::open(&path, Begin::Start)
            .unwrap()
            .copy(&mut text)
            .unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("line 498\nline 499\n"));
        assert!(text.len() >= 1000);
        let mut last = Vec::new();
        Reader::open(&path, Begin::LastLines(2))
            .unwrap()
            .copy(&mut last)
            .unwrap();
        assert_eq!(last, b"line 498\nline 499\n");
        assert_eq!(tail(&path, 1), "line 499\n");
    }

    #[test]
    fn a_follower_sees_every_byte_once_across_rotations() {
        let (_scratch, path) = scratch();
        let mut reader = Reader::open(&path, Begin::Start).unwrap();
        let mut log = Log::with_limit(&path, 100).unwrap();
        let (mut written, mut seen) = (Vec::new(), Vec::new());
        for number in 0..200 {
            let line = format!("{number}\n");
            log.write(line.as_bytes());
            written.extend(line.as_bytes());
            if number % 7 == 0 {
                reader.copy(&mut seen).unwrap();
            }
        }
        reader.copy(&mut seen).unwrap();
        assert_eq!(String::from_utf8(seen), String::from_utf8(written));
    }

    #[test]
    fn what_cannot_be_kept_is_counted_and_said_when_there_is_room_again() {
        let (_scratch, path) = scratch();
        let mut log = Log::create(&path).unwrap();
        log.write(b"kept\n");
        let good = std::mem::replace(&mut log.file, File::create("/dev/full").unwrap());
        log.write(b"lost\n");
        log.remark("also lost");
        log.file = good;
        log.write(b"kept again\n");
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("kept\nkiln: 21 bytes of output are missing here: No space left"),
            "{text}"
        );
        assert!(text.ends_with(")\nkept again\n"), "{text}");
    }

    #[test]
    fn remarks_are_lines_of_their_own() {
        let (_scratch, path) = scratch();
        let mut log = Log::create(&path).unwrap();
        log.write(b"no newline");
        log.remark("said\n");
        log.remark("again");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "no newline\nkiln: said\nkiln: again\n"
        );
    }

    #[test]
    fn last_lines_of_odd_texts() {
        assert_eq!(last_lines(b"", 3), 0);
        assert_eq!(last_lines(b"a\nb\nc", 1), 4);
        assert_eq!(last_lines(b"a\nb\nc\n", 2), 2);
        assert_eq!(last_lines(b"a\n", 0), 2);
    }
}
