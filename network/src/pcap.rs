//! Writes frames to a file in the pcap format, for Wireshark and tcpdump.
//!
//! Source: the classic libpcap format, draft-ietf-opsawg-pcap; times in nanoseconds.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Marks a file with times in nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// Ethernet.
const LINK_TYPE: u32 = 1;
/// Longer than any frame.
const SNAPSHOT: u32 = 1 << 18;

/// A capture file.
pub(crate) struct Capture {
    file: BufWriter<File>,
}

impl Capture {
    pub(crate) fn create(path: &Path) -> io::Result<Capture> {
        let mut file = BufWriter::with_capacity(1 << 18, File::create(path)?);
        file.write_all(&header())?;
        file.flush()?;
        Ok(Capture { file })
    }

    /// Adds a frame. Errors (a full disk) end the capture, not the network: the caller drops it then.
    pub(crate) fn add(&mut self, frame: &[u8]) -> io::Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(SNAPSHOT);
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        for word in [seconds, now.subsec_nanos(), length, length] {
            self.file.write_all(&word.to_le_bytes())?;
        }
        self.file.write_all(frame)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn header() -> Vec<u8> {
    let mut bytes = MAGIC.to_le_bytes().to_vec();
    // Version 2.4, then two words that are always zero.
    bytes.extend_from_slice(&[2, 0, 4, 0]);
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&SNAPSHOT.to_le_bytes());
    bytes.extend_from_slice(&LINK_TYPE.to_le_bytes());
    bytes
}
