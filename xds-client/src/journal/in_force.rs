//! Which resources of a batch were put in force, found by what is told of those that were not.

use std::collections::HashMap;

use super::KeepError;
use crate::{Batch, Rejected};

/// Tells of each resource, by its position, whether it was put in force. One that cannot be read was not; several of one name are told
/// apart by that alone.
///
/// # Errors
/// [`KeepError::Ambiguous`] if some of several readable resources of one name were refused.
pub(super) fn in_force(batch: &Batch, refused: &[Rejected]) -> Result<Vec<bool>, KeepError> {
    if refused.is_empty() {
        return Ok(vec![true; batch.len()]); // nearly always
    }
    let mut tallies: HashMap<&str, Tally> = HashMap::new();
    for one in refused {
        tallies.entry(&one.name).or_default().refused += 1;
    }
    let read = batch.resources().map(|one| one.ok().map(|one| one.name));
    let read: Vec<Option<String>> = read.collect();
    for (position, name) in read.iter().enumerate() {
        if let Some(name) = name {
            if let Some(tally) = tallies.get_mut(&**name) {
                tally.readable += 1;
            }
        } else if let Some(name) = batch.name_at(position)
            && let Some(tally) = tallies.get_mut(&*name)
        {
            tally.unreadable += 1;
        }
    }
    let is_in_force = |name: Option<String>| match name {
        None => Ok(false),
        Some(name) => {
            let tally = tallies.get(&*name).copied().unwrap_or_default();
            tally.is_in_force().ok_or(KeepError::Ambiguous { name })
        }
    };
    read.into_iter().map(is_in_force).collect()
}

/// What a batch has under a name.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    readable: usize,
    unreadable: usize,
    /// How often the name was refused.
    refused: usize,
}

impl Tally {
    /// Whether the readable ones are in force, unless only some of them are.
    fn is_in_force(self) -> Option<bool> {
        match self.refused.saturating_sub(self.unreadable) {
            0 => Some(true),
            refused if refused >= self.readable => Some(false),
            _ => None,
        }
    }
}
