//! What is wrong with a configuration, in words that say how to put it right.

use std::fmt;

/// One setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The variable, or source and key of a document.
    pub key: String,
    /// What was given.
    pub given: Given,
    /// Why that is not usable.
    pub reason: String,
    /// What would be.
    pub accepted: String,
}

/// The value in a [`Fault`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Given {
    /// May be shown.
    Value(String),
    /// A secret, or what may contain one.
    Secret,
    /// The fault is not about one value.
    Nothing,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        match &self.given {
            Given::Value(value) => write!(f, "=\"{}\"", Abridged(value))?,
            Given::Secret => f.write_str("=<redacted>")?,
            Given::Nothing => {}
        }
        write!(f, ": {}; accepted: {}", self.reason, self.accepted)
    }
}

/// All faults of one configuration; at least one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// `faults`, unless there are none.
    #[must_use]
    pub(super) fn of(faults: Vec<Fault>) -> Option<Self> {
        (!faults.is_empty()).then_some(Self(faults))
    }

    /// Each fault.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => f.write_str("the configuration has one fault:")?,
            n => write!(f, "the configuration has {n} faults:")?,
        }
        for fault in &self.0 {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

/// A value on one line and not longer than a line.
struct Abridged<'a>(&'a str);

impl fmt::Display for Abridged<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = self.0.char_indices().nth(MAX_SHOWN_CHARS);
        let shown = cut.and_then(|(end, _)| self.0.get(..end));
        match shown {
            Some(start) => write!(f, "{}...", start.escape_debug()),
            None => write!(f, "{}", self.0.escape_debug()),
        }
    }
}

/// Enough to recognise a value.
const MAX_SHOWN_CHARS: usize = 80;
