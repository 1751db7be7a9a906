//! From a name to the unit that is behind it.

use std::collections::HashMap;
use std::sync::Arc;

use rustls::ServerConfig;

use crate::unit::Handle;

/// Where connections for a name go.
#[derive(Clone)]
pub struct Target<U = Handle> {
    /// The unit.
    pub unit: U,
    /// The program's port.
    pub guest: u16,
    /// How TLS is ended, with the unit's certificate. None: it is not.
    pub tls: Option<Arc<ServerConfig>>,
}

/// Names of one front. As in the name server, `*.example.org` stands for all names below that no unit has.
pub struct Routes<U = Handle> {
    names: HashMap<String, Target<U>>,
    /// By what stands behind `*.`.
    below: HashMap<String, Target<U>>,
}

impl<U> Default for Routes<U> {
    fn default() -> Self {
        Self {
            names: HashMap::new(),
            below: HashMap::new(),
        }
    }
}

impl<U> Routes<U> {
    /// Adds a name, or a name with a star.
    pub fn insert(&mut self, pattern: &str, target: Target<U>) {
        match pattern.strip_prefix("*.") {
            Some(parent) => self.below.insert(parent.to_ascii_lowercase(), target),
            None => self.names.insert(pattern.to_ascii_lowercase(), target),
        };
    }

    /// Who is behind a name: the whole name, or else the nearest star above it. Case and a final dot do not matter.
    pub fn find(&self, name: &str) -> Option<&Target<U>> {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if let Some(target) = self.names.get(&name) {
            return Some(target);
        }
        let mut rest = name.as_str();
        while let Some((label, parent)) = rest.split_once('.') {
            if label.is_empty() {
                return None;
            }
            if let Some(target) = self.below.get(parent) {
                return Some(target);
            }
            rest = parent;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_found() {
        let mut routes = Routes::default();
        for (pattern, unit) in [
            ("www.example.org", 1),
            ("*.example.org", 2),
            ("*.deep.example.org", 3),
            ("b", 4),
        ] {
            let target = Target {
                unit,
                guest: 80,
                tls: None,
            };
            routes.insert(pattern, target);
        }
        let find = |name: &str| routes.find(name).map(|target| target.unit);
        assert_eq!(find("www.example.org"), Some(1));
        assert_eq!(find("WWW.Example.ORG."), Some(1));
        assert_eq!(find("x.example.org"), Some(2));
        assert_eq!(find("x.y.example.org"), Some(2));
        assert_eq!(find("x.deep.example.org"), Some(3));
        assert_eq!(find("b"), Some(4));
        for unknown in [
            "",
            ".",
            "..",
            "example.org",
            ".example.org",
            "org",
            "x.b",
            "*",
            "127.0.0.1",
            "[::1]",
        ] {
            assert_eq!(find(unknown), None, "{unknown}");
        }
    }
}
