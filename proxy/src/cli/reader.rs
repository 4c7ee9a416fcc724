//! Reads typed values from the surroundings and gathers every fault on the way.

use std::{
    fmt::Display, ops::RangeInclusive, path::PathBuf, str::FromStr, sync::Arc, time::Duration,
};

use super::{
    Environment, Fault, Faults,
    fault::Given,
    value::{self, Reject},
};

/// A pass over the surroundings. Where a value is at fault the fault is kept and the default
/// stands in, so that the pass reaches the end.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    environment: &'a Environment<'a>,
    faults: Vec<Fault>,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(environment: &'a Environment<'a>) -> Self {
        Self {
            environment,
            faults: Vec::new(),
        }
    }

    /// `config`, if nothing was at fault.
    pub(super) fn finish<T>(self, config: T) -> Result<T, Faults> {
        Faults::of(self.faults).map_or(Ok(config), Err)
    }

    /// Whether anything was at fault so far.
    pub(super) const fn is_at_fault(&self) -> bool {
        !self.faults.is_empty()
    }

    pub(super) const fn environment(&self) -> &'a Environment<'a> {
        self.environment
    }

    /// The value as it is, an empty one included.
    pub(super) fn raw(&self, key: &str) -> Option<&'a str> {
        self.environment.variable(key)
    }

    /// A name, path or address, for which an empty value says nothing: it counts as unset.
    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.raw(key).filter(|value| !value.is_empty())
    }

    /// A name that rooms share.
    pub(super) fn name(&self, key: &str) -> Option<Arc<str>> {
        self.text(key).map(Arc::from)
    }

    /// A path; one that is relative is left so.
    pub(super) fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// Whether a flag-like variable has its one literal. Any other value is ignored.
    pub(super) fn literal(&self, key: &str, literal: &str) -> bool {
        self.raw(key) == Some(literal)
    }

    pub(super) fn boolean(&mut self, key: &str, default: bool) -> bool {
        self.typed(key, value::boolean).unwrap_or(default)
    }

    pub(super) fn integer<T>(&mut self, key: &str, range: &RangeInclusive<T>, default: T) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        self.typed(key, |text| value::integer(text, range))
            .unwrap_or(default)
    }

    pub(super) fn duration(&mut self, key: &str) -> Option<Duration> {
        self.typed(key, value::duration)
    }

    /// A variable with a grammar. Present but empty is a value like any other, so mostly a fault.
    pub(super) fn typed<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, Reject>,
    ) -> Option<T> {
        let text = self.raw(key)?;
        self.keep(key, Given::Value(text.to_owned()), parse(text))
    }

    /// The value of `outcome`, or nothing and a fault more.
    pub(super) fn keep<T>(
        &mut self,
        key: &str,
        given: Given,
        outcome: Result<T, Reject>,
    ) -> Option<T> {
        outcome
            .map_err(|reject| self.fault(key, given, reject))
            .ok()
    }

    pub(super) fn fault(&mut self, key: &str, given: Given, reject: Reject) {
        self.faults.push(Fault {
            key: key.to_owned(),
            given,
            reason: reject.reason,
            accepted: reject.accepted,
        });
    }
}
