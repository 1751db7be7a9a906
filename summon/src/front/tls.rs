//! The ClientHello that begins a TLS connection (RFC 8446, section 4.1.2): for whom it is. Parsed with rustls, which puts it
//! together where it comes in several records.
//!
//! What always holds: any bytes have an outcome, and more bytes behind a complete ClientHello do not change it.

use rustls::server::Acceptor;

use super::HEAD_BYTES;

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// Not all of it is there yet.
    Incomplete,
    /// It asks for this server name (RFC 6066, section 3), in lower case.
    Name(String),
    /// It names no server.
    Nameless,
    /// No ClientHello that can be served; with the alert to answer, if there is one.
    Refused(Vec<u8>),
}

/// Reads a ClientHello as it comes.
#[derive(Default)]
pub struct Reader {
    acceptor: Acceptor,
    read: usize,
}

impl Reader {
    /// What has come: all bytes from the beginning of the connection. Those of an earlier call are not read again. Once the
    /// outcome is another than [`Hello::Incomplete`], the reader has done its work.
    pub fn read(&mut self, bytes: &[u8]) -> Hello {
        let mut new = bytes.get(self.read..).unwrap_or_default();
        while !new.is_empty() {
            match self.acceptor.read_tls(&mut new) {
                Ok(0) | Err(_) => return Hello::Refused(Vec::new()),
                Ok(_) => {}
            }
            self.read = bytes.len() - new.len();
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    return match accepted.client_hello().server_name() {
                        Some(name) => Hello::Name(name.to_ascii_lowercase()),
                        None => Hello::Nameless,
                    };
                }
                Ok(None) => {}
                Err((_, mut alert)) => {
                    let mut answer = Vec::new();
                    // Writing to memory does not fail.
                    let _ = alert.write_all(&mut answer);
                    return Hello::Refused(answer);
                }
            }
        }
        if self.read >= HEAD_BYTES {
            return Hello::Refused(alert(50));
        }
        Hello::Incomplete
    }
}

/// The alert for a name that nobody has: unrecognized_name (RFC 6066, section 3).
#[must_use]
pub fn unrecognized_name() -> Vec<u8> {
    alert(112)
}

/// A fatal alert (RFC 8446, section 6) before any key is agreed on.
fn alert(description: u8) -> Vec<u8> {
    vec![21, 3, 3, 0, 2, 2, description]
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    /// A ClientHello of rustls, in one record.
    pub fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// The same in records of at most so many bytes.
    pub fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
        let mut all = Vec::new();
        for part in hello[5..].chunks(size) {
            all.extend_from_slice(&hello[..3]);
            all.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
            all.extend_from_slice(part);
        }
        all
    }

    #[test]
    fn the_name_is_found() {
        let name = Hello::Name("www.example.org".to_owned());
        let bytes = hello("WWW.example.org");
        assert_eq!(Reader::default().read(&bytes), name);
        assert_eq!(Reader::default().read(&in_records(&bytes, 7)), name);
        assert_eq!(Reader::default().read(&hello("127.0.0.1")), Hello::Nameless);
    }

    #[test]
    fn what_is_no_hello_is_refused() {
        for bytes in [
            &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
            &[22, 3, 1, 0, 4, 2, 0, 0, 0],
            &[23, 3, 3, 0, 1, 0],
            &[0x16, 3, 1, 0xff, 0xff, 1, 0, 0, 0],
        ] {
            let outcome = Reader::default().read(bytes);
            assert!(
                matches!(outcome, Hello::Refused(_)),
                "{bytes:?} {outcome:?}"
            );
        }
        // A hello without end.
        let mut endless = Vec::new();
        let mut first = vec![1, 0, 0xff, 0xf0];
        while endless.len() < HEAD_BYTES + 100 {
            first.resize(100, 0);
            endless.extend([22, 3, 1, 0, 100]);
            endless.extend(&first);
            first.clear();
        }
        assert!(matches!(
            Reader::default().read(&endless),
            Hello::Refused(_)
        ));
        assert_eq!(Reader::default().read(&endless[..1000]), Hello::Incomplete);
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_outcome(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            start in any::<bool>(),
        ) {
            let mut all = if start { vec![22, 3, 1, 1, 0, 1, 0] } else { Vec::new() };
            all.extend(bytes);
            let _ = Reader::default().read(&all);
        }

        #[test]
        fn cuts_do_not_matter(
            size in 1usize..600,
            rest in proptest::collection::vec(any::<u8>(), 0..40),
            cuts in proptest::collection::vec(0usize..5000, 0..20),
        ) {
            let mut bytes = in_records(&hello("a.example.org"), size);
            let end = bytes.len();
            bytes.extend(rest);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % bytes.len()).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let mut reader = Reader::default();
            for cut in cuts {
                let now = reader.read(&bytes[..cut]);
                if cut < end {
                    prop_assert_eq!(now, Hello::Incomplete);
                } else {
                    prop_assert_eq!(now, Hello::Name("a.example.org".to_owned()));
                    break;
                }
            }
        }
    }
}
