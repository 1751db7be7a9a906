//! How values lie in memory for a kernel that boots: [`crate::manifest::Program`] and
//! [`crate::configuration::RunConfiguration`].
//!
//! A number takes eight bytes, little endian; truth is 1 or 0. A text is its length and its bytes, a list its length and its
//! items. What may be missing begins with whether it is there. Everything begins with [`FORMAT`] and ends with its last byte.
//!
//! A kernel that starts cold pays for each instruction once, so reading takes little code: one function for each of these
//! kinds. [`Reader`] remembers the first error and gives empty values from then on; [`Reader::finish`] says it.

use alloc::{string::String, vec::Vec};
use core::{fmt, net::IpAddr};

use crate::manifest::FORMAT;

/// Bytes of a number, and least bytes of anything in a list.
const NUMBER: usize = 8;

/// Why bytes cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// They are of another format.
    Format(u64),
    /// They end too early.
    Short,
    /// There are more of them than there should be.
    Long,
    /// A text is not UTF-8.
    Text,
    /// A number is none of those that are possible at its place.
    Number(u64),
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Format(format) => {
                write!(
                    formatter,
                    "it is of format {format}, not of format {FORMAT}"
                )
            }
            Error::Short => formatter.write_str("it ends too early"),
            Error::Long => formatter.write_str("something follows its end"),
            Error::Text => formatter.write_str("a text in it is not UTF-8"),
            Error::Number(number) => write!(formatter, "{number} makes no sense where it stands"),
        }
    }
}

impl core::error::Error for Error {}

/// Reads values one after the other.
pub struct Reader<'a> {
    rest: &'a [u8],
    error: Option<Error>,
}

impl<'a> Reader<'a> {
    /// Starts with `bytes`, which must begin with [`FORMAT`].
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        let mut reader = Reader {
            rest: bytes,
            error: None,
        };
        let format = reader.number();
        if format != u64::from(FORMAT) {
            reader.fail(Error::Format(format));
        }
        reader
    }

    /// The value read, if there was no error and nothing is left.
    ///
    /// # Errors
    /// The first one.
    pub fn finish<T>(mut self, value: T) -> Result<T, Error> {
        if !self.rest.is_empty() {
            self.fail(Error::Long);
        }
        match self.error {
            None => Ok(value),
            Some(error) => Err(error),
        }
    }

    /// Remembers an error, unless there was one, and reads nothing more.
    #[cold]
    pub fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
        self.rest = &[];
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        match self.rest.split_at_checked(length) {
            Some((taken, rest)) => {
                self.rest = rest;
                taken
            }
            None => {
                self.fail(Error::Short);
                &[]
            }
        }
    }

    /// Bytes of a known length.
    pub fn array<const LENGTH: usize>(&mut self) -> [u8; LENGTH] {
        self.take(LENGTH).try_into().unwrap_or([0; LENGTH])
    }

    /// A number.
    #[inline(never)]
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number up to `most`.
    #[inline(never)]
    pub fn number_up_to(&mut self, most: u64) -> u64 {
        let number = self.number();
        if number > most {
            self.fail(Error::Number(number));
            return 0;
        }
        number
    }

    /// A number of 32 bits.
    pub fn word(&mut self) -> u32 {
        self.number_up_to(u64::from(u32::MAX)) as u32
    }

    /// Whether something holds.
    pub fn flag(&mut self) -> bool {
        self.number_up_to(1) == 1
    }

    /// A text.
    #[inline(never)]
    pub fn text(&mut self) -> String {
        let length = usize::try_from(self.number()).unwrap_or(usize::MAX);
        match core::str::from_utf8(self.take(length)) {
            Ok(text) => String::from(text),
            Err(_) => {
                self.fail(Error::Text);
                String::new()
            }
        }
    }

    /// An address.
    #[inline(never)]
    pub fn address(&mut self) -> IpAddr {
        if self.number_up_to(1) == 0 {
            IpAddr::from(self.array::<4>())
        } else {
            IpAddr::from(self.array::<16>())
        }
    }

    /// A list of what `item` reads.
    pub fn list<T>(&mut self, mut item: impl FnMut(&mut Reader<'a>) -> T) -> Vec<T> {
        // So a wrong length neither asks for much memory nor for much time.
        let most = (self.rest.len() / NUMBER) as u64;
        let count = self.number_up_to(most) as usize;
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(item(self));
        }
        list
    }

    /// A list of texts.
    #[inline(never)]
    pub fn texts(&mut self) -> Vec<String> {
        self.list(Reader::text)
    }

    /// A list of addresses.
    #[inline(never)]
    pub fn addresses(&mut self) -> Vec<IpAddr> {
        self.list(Reader::address)
    }

    /// What `item` reads, if it is there.
    pub fn option<T>(&mut self, item: impl FnOnce(&mut Reader<'a>) -> T) -> Option<T> {
        if self.flag() { Some(item(self)) } else { None }
    }

    /// A text that may be missing.
    #[inline(never)]
    pub fn optional_text(&mut self) -> Option<String> {
        self.option(Reader::text)
    }
}

/// Writes what a [`Reader`] reads.
pub struct Writer(Vec<u8>);

impl Default for Writer {
    fn default() -> Writer {
        Writer::new()
    }
}

impl Writer {
    /// Begins with [`FORMAT`].
    #[must_use]
    pub fn new() -> Writer {
        let mut writer = Writer(Vec::new());
        writer.number(u64::from(FORMAT));
        writer
    }

    /// The bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Bytes of a length that the reader knows.
    pub fn array(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// A number, or whether something holds.
    pub fn number(&mut self, number: impl Into<u64>) {
        self.array(&number.into().to_le_bytes());
    }

    /// A text.
    pub fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.array(text.as_bytes());
    }

    /// An address.
    pub fn address(&mut self, address: &IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.number(0u64);
                self.array(&address.octets());
            }
            IpAddr::V6(address) => {
                self.number(1u64);
                self.array(&address.octets());
            }
        }
    }

    /// A list of what `item` writes.
    pub fn list<T>(&mut self, list: &[T], mut item: impl FnMut(&mut Writer, &T)) {
        self.number(list.len() as u64);
        for value in list {
            item(self, value);
        }
    }

    /// A list of texts.
    pub fn texts(&mut self, texts: &[String]) {
        self.list(texts, |writer, text| writer.text(text));
    }

    /// A list of addresses.
    pub fn addresses(&mut self, addresses: &[IpAddr]) {
        self.list(addresses, Writer::address);
    }

    /// What `item` writes, if it is there.
    pub fn option<T>(&mut self, value: Option<T>, item: impl FnOnce(&mut Writer, T)) {
        self.number(value.is_some());
        if let Some(value) = value {
            item(self, value);
        }
    }

    /// A text that may be missing.
    pub fn optional_text(&mut self, text: Option<&str>) {
        self.option(text, Writer::text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        configuration::{Network, RunConfiguration, StaticNetwork, Volume},
        manifest::{Manifest, Program, User},
    };
    use alloc::vec;

    fn configurations() -> Vec<RunConfiguration> {
        let addresses = vec![
            IpAddr::from([192, 0, 2, 7]),
            IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
        ];
        let full = |network| RunConfiguration {
            arguments: Some(vec!["-v".into(), String::new()]),
            environment: [("A".into(), "ä=b".into()), ("B".into(), String::new())].into(),
            working_directory: Some("/srv".into()),
            user: Some(User {
                uid: 7,
                gid: u32::MAX,
            }),
            hostname: Some("host".into()),
            network,
            volumes: vec![
                Volume {
                    path: "/data".into(),
                    read_only: true,
                },
                Volume {
                    path: "/more".into(),
                    read_only: false,
                },
            ],
            link: true,
            input: true,
            realtime: Some(u64::MAX),
            log: Some("net=debug".into()),
        };
        vec![
            RunConfiguration::default(),
            full(Network::None),
            full(Network::Dhcp),
            full(Network::Socket {
                name_servers: addresses.clone(),
            }),
            full(Network::Static(StaticNetwork {
                addresses: addresses.iter().map(|&address| (address, 24)).collect(),
                gateways: addresses.clone(),
                name_servers: addresses,
                mac: Some([1, 2, 3, 4, 5, 6]),
                mtu: Some(u16::MAX),
                gateway_mac: Some([7, 8, 9, 10, 11, 12]),
            })),
            full(Network::Static(StaticNetwork::default())),
        ]
    }

    fn program() -> Program {
        Manifest {
            program: "/bin/server".into(),
            arguments: vec!["-p".into(), "80".into()],
            environment: [("PATH".into(), "/bin".into()), ("X".into(), String::new())].into(),
            working_directory: "/".into(),
            user: User { uid: 1, gid: 2 },
            ..Manifest::default()
        }
        .program()
    }

    #[test]
    fn what_was_written_is_read() {
        for configuration in configurations() {
            let bytes = configuration.to_bytes();
            assert_eq!(RunConfiguration::from_bytes(&bytes), Ok(configuration));
        }
        assert_eq!(Program::from_bytes(&program().to_bytes()), Ok(program()));
    }

    #[test]
    fn every_other_length_is_an_error() {
        for configuration in configurations() {
            let mut bytes = configuration.to_bytes();
            bytes.push(0);
            for length in (0..bytes.len() - 1).chain([bytes.len()]) {
                assert!(RunConfiguration::from_bytes(&bytes[..length]).is_err());
            }
        }
        let mut bytes = program().to_bytes();
        assert_eq!(
            Program::from_bytes(&bytes[..bytes.len() - 1]),
            Err(Error::Short)
        );
        bytes.push(0);
        assert_eq!(Program::from_bytes(&bytes), Err(Error::Long));
    }

    #[test]
    fn damage_is_an_error_or_another_value_and_never_a_panic() {
        for configuration in configurations() {
            let good = configuration.to_bytes();
            for at in 0..good.len() {
                for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
                    let mut bytes = good.clone();
                    bytes[at] = value;
                    if let Ok(read) = RunConfiguration::from_bytes(&bytes) {
                        assert_eq!(RunConfiguration::from_bytes(&read.to_bytes()), Ok(read));
                    }
                }
            }
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let good = program().to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Program::from_bytes(&bytes)
        };
        assert_eq!(with(0, 99), Err(Error::Format(99)));
        assert_eq!(with(16, 0xff), Err(Error::Text));
        assert_eq!(with(15, 1), Err(Error::Short));
        assert_eq!(with(good.len() - 4, 1), Err(Error::Number(2 + (1 << 32))));
        assert_eq!(Program::from_bytes(b""), Err(Error::Short));
    }

    #[test]
    fn what_the_run_says_replaces_what_the_image_says() {
        let mut untouched = program();
        RunConfiguration::default().apply(&mut untouched);
        assert_eq!(untouched, program());

        let mut changed = program();
        let mut run = configurations().swap_remove(1);
        run.environment = [("X".into(), "1".into()), ("Y".into(), "2=3".into())].into();
        run.apply(&mut changed);
        let expected = Program {
            path: "/bin/server".into(),
            arguments: vec!["/bin/server".into(), "-v".into(), String::new()],
            environment: vec!["PATH=/bin".into(), "X=1".into(), "Y=2=3".into()],
            working_directory: "/srv".into(),
            user: User {
                uid: 7,
                gid: u32::MAX,
            },
        };
        assert_eq!(changed, expected);
    }
}
