//! What is known about the control plane besides what it tells.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use xds_client::{Kind, Metrics};

use crate::mesh::Rejection;

/// How the control plane is followed.
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "built by `node`")]
pub struct ControlPlane {
    /// Its address; `None` if there is none.
    pub address: Option<String>,
    /// What its client reports; `None` if there is none.
    pub client: Option<Metrics>,
    /// What it, or a local file, told in vain.
    pub rejections: Rejections,
}

impl ControlPlane {
    pub(super) fn is_connected(&self) -> bool {
        self.client.as_ref().is_some_and(Metrics::is_connected)
    }

    pub(super) fn last_response(&self) -> Option<SystemTime> {
        self.client.as_ref()?.last_response()
    }
}

/// Resources that are refused now: the latest of them, 100 at most. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Rejections(Arc<Mutex<HashMap<(&'static str, String), RejectedResource>>>);

/// A resource that could not be used. What was held under its name stays in force.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RejectedResource {
    /// When it was told.
    pub at: SystemTime,
    /// Its type: a type URL, or `file`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Why it cannot be used.
    pub reason: String,
}

impl Rejections {
    /// Forgets what is said about `named`, which was told anew, and notes what of it is refused.
    pub fn told<'a>(
        &self,
        kind: Kind,
        named: impl Iterator<Item = &'a str>,
        rejected: &[Rejection],
    ) {
        let mut all = self.0.lock();
        for name in named {
            all.remove(&(kind.type_url(), name.to_owned()));
        }
        let rejected = rejected.iter();
        note(
            &mut all,
            kind.type_url(),
            rejected.map(|one| (one.name.clone(), one.reason.to_string())),
        );
    }

    /// Notes what of the local file is refused, in place of what was.
    pub fn file(&self, rejected: impl Iterator<Item = (String, String)>) {
        let mut all = self.0.lock();
        all.retain(|(kind, _), _| *kind != FILE);
        note(&mut all, FILE, rejected);
    }

    /// Whether nothing is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// All, latest first.
    #[must_use]
    pub fn all(&self) -> Vec<RejectedResource> {
        let mut all: Vec<_> = self.0.lock().values().cloned().collect();
        all.sort_by(|one, other| {
            other
                .at
                .cmp(&one.at)
                .then_with(|| one.name.cmp(&other.name))
        });
        all
    }
}

fn note(
    all: &mut HashMap<(&'static str, String), RejectedResource>,
    kind: &'static str,
    rejected: impl Iterator<Item = (String, String)>,
) {
    for (name, reason) in rejected {
        if all.len() >= MAX_REJECTIONS {
            let oldest = all
                .iter()
                .min_by_key(|(_, one)| one.at)
                .map(|(key, _)| key.clone());
            oldest.and_then(|key| all.remove(&key));
        }
        let at = SystemTime::now();
        let resource = RejectedResource {
            at,
            kind,
            name: name.clone(),
            reason,
        };
        all.insert((kind, name), resource);
    }
}

const FILE: &str = "file";
/// Refused resources that are kept. More say nothing new: something is wrong with all of them.
const MAX_REJECTIONS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(range: std::ops::Range<usize>) -> impl Iterator<Item = (String, String)> {
        range.map(|number| (format!("policy-{number}"), "bad".to_owned()))
    }

    #[test]
    fn the_latest_are_kept_and_a_new_file_replaces_what_the_old_one_had() {
        let rejections = Rejections::default();
        rejections.file(file(0..1000));
        assert_eq!(rejections.all().len(), MAX_REJECTIONS);
        rejections.file(file(3..4));
        let all = rejections.all();
        assert_eq!((all.len(), all[0].name.as_str()), (1, "policy-3"));
    }

    #[test]
    fn what_is_told_anew_is_no_longer_refused() {
        let rejections = Rejections::default();
        rejections.file(file(0..1));
        rejections.told(Kind::Address, ["policy-0"].into_iter(), &[]);
        assert_eq!(rejections.all().len(), 1, "another source");
        rejections.file(file(0..0));
        assert!(rejections.all().is_empty());
    }
}
