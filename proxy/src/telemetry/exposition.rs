//! Everything that is exported, as text.

use std::fmt;

use prometheus_client::{encoding::text::encode, registry::Registry};

use super::Traffic;

/// What a scrape shows: the registered families, and those of traffic.
#[derive(Debug)]
pub struct Exposition {
    registry: Registry,
    traffic: Traffic,
}

impl Exposition {
    /// Of these.
    pub fn new(registry: Registry, traffic: Traffic) -> Self {
        Self { registry, traffic }
    }

    /// Writes it all in `OpenMetrics` text.
    ///
    /// Registered families are written under locks that their users share, so their text, which is small, is made before
    /// `out` gets any of it. The text of traffic may be large; it goes to `out` piece by piece, with no lock held.
    ///
    /// # Errors
    /// Those of `out`, or of a family that cannot be read; before anything was written then.
    pub fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let mut registered = String::new();
        encode(&mut registered, &self.registry)?;
        self.traffic.write(out)?;
        out.write_str(&registered)
    }
}
