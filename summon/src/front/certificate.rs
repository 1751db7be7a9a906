//! Certificates and keys of `https` fronts, read and checked before anything is opened.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{InconsistentKeys, ServerConfig};

/// What is spoken inside TLS: what units get is HTTP/1.
const ALPN: &[u8] = b"http/1.1";

/// What was read so far: each pair of files is read once.
pub struct Certificates {
    provider: Arc<CryptoProvider>,
    configs: HashMap<(PathBuf, PathBuf), Arc<ServerConfig>>,
    leaves: HashMap<PathBuf, CertificateDer<'static>>,
}

impl Default for Certificates {
    fn default() -> Self {
        Self {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            configs: HashMap::new(),
            leaves: HashMap::new(),
        }
    }
}

impl Certificates {
    /// How TLS is ended with a certificate chain and its key (PEM).
    ///
    /// # Errors
    /// Names the file, what is wrong with it, and what to do.
    pub fn load(&mut self, certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
        let files = (certificate.to_owned(), key.to_owned());
        if let Some(config) = self.configs.get(&files) {
            return Ok(Arc::clone(config));
        }
        let chain = read_chain(certificate)?;
        let leaf = chain.first().cloned();
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| match error {
            pem::Error::NoItemsFound => format!(
                "there is no private key in {}: it must have one in PEM form, which begins with '-----BEGIN PRIVATE KEY-----' and has no password ('openssl pkey -in OLD -out NEW' takes it away)",
                key.display()
            ),
            error => unreadable(key, &error),
        })?;
        let certified =
            CertifiedKey::from_der(chain, private, &self.provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => format!(
                    "the key {} does not belong to the certificate {}: give the key that the certificate was made with, and let the file begin with the server's own certificate",
                    key.display(),
                    certificate.display()
                ),
                rustls::Error::InvalidCertificate(reason) => format!(
                    "the first certificate in {} cannot be used: {reason:?}",
                    certificate.display()
                ),
                error => format!(
                    "the key {} cannot be used: {error} (RSA of 2048 bits or more, ECDSA P-256 or P-384, or Ed25519 can)",
                    key.display()
                ),
            })?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.ticketer = rustls::crypto::ring::Ticketer::new()
            .map_err(|error| format!("no random numbers: {error}"))?;
        let config = Arc::new(config);
        self.configs.insert(files, Arc::clone(&config));
        if let Some(leaf) = leaf {
            self.leaves.insert(certificate.to_owned(), leaf);
        }
        Ok(config)
    }

    /// Says so if a certificate that was loaded is not for a name; browsers will refuse it, and that may be meant.
    pub fn warn_of_name(&self, certificate: &Path, name: &str) {
        if !self.is_for(certificate, name) {
            tracing::warn!(
                "the certificate {} is not for {name}: clients that check it will refuse it",
                certificate.display()
            );
        }
    }

    fn is_for(&self, certificate: &Path, name: &str) -> bool {
        let Some(leaf) = self.leaves.get(certificate) else {
            return true;
        };
        // Any name below a star will do.
        let example = match name.strip_prefix("*.") {
            Some(parent) => format!("any.{parent}"),
            None => name.to_owned(),
        };
        let (Ok(parsed), Ok(name)) = (
            ParsedCertificate::try_from(leaf),
            ServerName::try_from(example),
        ) else {
            return false;
        };
        verify_server_name(&parsed, &name).is_ok()
    }
}

fn unreadable(path: &Path, error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => format!("cannot read {}: {error}", path.display()),
        error => format!("{} is not a PEM file: {error:?}", path.display()),
    }
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(path, &error))?;
    if chain.is_empty() {
        return Err(format!(
            "there is no certificate in {}: it must have the server's own, and then those up to the root's, in PEM form, each of which begins with '-----BEGIN CERTIFICATE-----'",
            path.display()
        ));
    }
    Ok(chain)
}

#[cfg(test)]
pub(super) mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A certificate for these names, of openssl.
    pub fn make(folder: &Path, stem: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let (certificate, key) = (
            folder.join(format!("{stem}.pem")),
            folder.join(format!("{stem}.key")),
        );
        let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
        let status = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
            ])
            .args(["-nodes", "-days", "7", "-subj", "/CN=kiln"])
            .args(["-addext", &format!("subjectAltName={}", names.join(","))])
            .arg("-out")
            .arg(&certificate)
            .arg("-keyout")
            .arg(&key)
            .stderr(Stdio::null())
            .status()
            .expect("openssl is installed (tests/tools/install)");
        assert!(status.success());
        (certificate, key)
    }

    #[test]
    fn mistakes_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = make(folder.path(), "a", &["a.test", "*.b.test"]);
        let (_, other) = make(folder.path(), "other", &["a.test"]);
        let nonsense = folder.path().join("nonsense.pem");
        std::fs::write(&nonsense, "hello").unwrap();
        let missing = folder.path().join("missing.pem");
        let broken = folder.path().join("broken.pem");
        std::fs::write(
            &broken,
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        let mut certificates = Certificates::default();
        for (certificate, key, words) in [
            (&certificate, &other, ["other.key does not belong", "a.pem"]),
            (&nonsense, &key, ["no certificate in", "nonsense.pem"]),
            (
                &certificate,
                &nonsense,
                ["no private key in", "nonsense.pem"],
            ),
            (&certificate, &certificate, ["no private key in", "a.pem"]),
            (&missing, &key, ["cannot read", "missing.pem"]),
            (&certificate, &missing, ["cannot read", "missing.pem"]),
            (&broken, &key, ["broken.pem", "cannot be used"]),
        ] {
            let error = certificates.load(certificate, key).unwrap_err();
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
        let first = certificates.load(&certificate, &key).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &certificates.load(&certificate, &key).unwrap()
        ));
        for (name, fits) in [
            ("a.test", true),
            ("x.b.test", true),
            ("*.b.test", true),
            ("b.test", false),
            ("c.test", false),
        ] {
            assert_eq!(certificates.is_for(&certificate, name), fits, "{name}");
        }
    }
}
