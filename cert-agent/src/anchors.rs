//! Trust anchors ready for verification, and how they age.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use rustls::{DistinguishedName, RootCertStore, pki_types::CertificateDer};
use tokio::time::Instant;

/// Certificates of trust anchors as their source gave them.
pub(crate) type Roots = Arc<[CertificateDer<'static>]>;

/// A set of trust anchors. Identities that trust the same roots share one.
#[derive(Debug)]
pub(crate) struct Anchors {
    /// Sorted, without duplicates.
    certificates: Vec<CertificateDer<'static>>,
    pub(crate) store: RootCertStore,
    /// Their names, which clients are told so that they can choose a certificate; none if they are many.
    pub(crate) hints: Vec<DistinguishedName>,
}

impl Anchors {
    fn new(certificates: Vec<CertificateDer<'static>>) -> Self {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(certificates.iter().cloned());
        let hints = store.subjects();
        let hint_bytes: usize = hints.iter().map(|name| name.as_ref().len()).sum();
        Self {
            hints: if hint_bytes <= MAX_HINT_BYTES {
                hints
            } else {
                Vec::new()
            },
            store,
            certificates,
        }
    }
}

/// Whether a certificate can serve as a trust anchor.
pub(crate) fn is_usable(certificate: &CertificateDer<'_>) -> bool {
    webpki::anchor_from_trusted_cert(certificate).is_ok()
}

/// What several identities hold alike, once each.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    lists: Mutex<Vec<Weak<[CertificateDer<'static>]>>>,
    anchors: Mutex<Vec<Weak<Anchors>>>,
}

impl Pool {
    pub(crate) fn list(&self, roots: &[CertificateDer<'static>]) -> Roots {
        shared(&self.lists, Arc::from(roots), |held, made| held == made)
    }

    pub(crate) fn anchors<'a>(
        &self,
        certificates: impl Iterator<Item = &'a CertificateDer<'static>>,
    ) -> Arc<Anchors> {
        let mut certificates: Vec<_> = certificates.cloned().collect();
        certificates.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
        certificates.dedup();
        let made = Arc::new(Anchors::new(certificates));
        shared(&self.anchors, made, |held, made| {
            held.certificates == made.certificates
        })
    }
}

/// The living item of `pool` that is like `made`, or else `made`.
fn shared<T: ?Sized>(
    pool: &Mutex<Vec<Weak<T>>>,
    made: Arc<T>,
    alike: impl Fn(&T, &T) -> bool,
) -> Arc<T> {
    let mut pool = pool.lock();
    pool.retain(|held| held.strong_count() > 0);
    let mut living = pool.iter().filter_map(Weak::upgrade);
    if let Some(found) = living.find(|held| alike(held, &made)) {
        return found;
    }
    drop(living);
    pool.push(Arc::downgrade(&made));
    made
}

/// The roots of one source: those that it names, and those that it named until a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Aging {
    current: Roots,
    leaving: Vec<(CertificateDer<'static>, Instant)>,
}

impl Aging {
    /// Takes over what the source names now. What it names no longer is trusted for `grace` more.
    /// Tells whether anything differs.
    pub(crate) fn replace(&mut self, roots: Roots, now: Instant, grace: Duration) -> bool {
        if roots == self.current {
            return false;
        }
        self.leaving
            .retain(|(root, until)| *until > now && !roots.contains(root));
        if !grace.is_zero() {
            let gone = self.current.iter().filter(|root| !roots.contains(root));
            self.leaving
                .extend(gone.map(|root| (root.clone(), now + grace)));
        }
        self.current = roots;
        true
    }

    pub(crate) fn trusted(&self, now: Instant) -> impl Iterator<Item = &CertificateDer<'static>> {
        let leaving = self.leaving.iter().filter(move |(_, until)| *until > now);
        self.current
            .iter()
            .chain(leaving.map(|(certificate, _)| certificate))
    }

    /// When the next root stops being trusted.
    pub(crate) fn next_end(&self, now: Instant) -> Option<Instant> {
        let ends = self.leaving.iter().map(|(_, until)| *until);
        ends.filter(|until| *until > now).min()
    }

    /// What the source names now.
    pub(crate) fn named(&self) -> Roots {
        Arc::clone(&self.current)
    }

    pub(crate) fn counts(&self, now: Instant) -> (usize, usize) {
        let current = self.current.len();
        (current, self.trusted(now).count() - current)
    }
}

/// TLS has room for 64 KiB, and our peers, who have one certificate, do without.
const MAX_HINT_BYTES: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;

    fn roots(bytes: &[u8]) -> Roots {
        bytes.iter().map(|byte| vec![*byte].into()).collect()
    }

    fn trusted(aging: &Aging, now: Instant) -> Vec<u8> {
        let mut bytes: Vec<_> = aging.trusted(now).map(|root| root[0]).collect();
        bytes.sort_unstable();
        bytes
    }

    #[test]
    fn a_root_that_is_named_no_longer_leaves_after_the_grace() {
        let (start, grace) = (Instant::now(), Duration::from_secs(10));
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut aging = Aging::default();
        assert!(aging.replace(roots(&[1]), start, grace));
        assert!(!aging.replace(roots(&[1]), start, grace), "nothing changed");
        assert!(aging.replace(roots(&[2]), later(1), grace));
        assert_eq!(trusted(&aging, later(10)), [1, 2]);
        assert_eq!(aging.next_end(later(10)), Some(later(11)));
        assert_eq!(trusted(&aging, later(11)), [2]);
        assert_eq!(aging.next_end(later(11)), None);
    }

    #[test]
    fn a_root_that_returns_does_not_leave() {
        let (start, grace) = (Instant::now(), Duration::from_secs(10));
        let mut aging = Aging::default();
        for named in [&[1][..], &[2], &[1, 2]] {
            aging.replace(roots(named), start, grace);
        }
        assert_eq!(trusted(&aging, start + grace * 2), [1, 2]);
        aging.replace(roots(&[2]), start, Duration::ZERO);
        assert_eq!(trusted(&aging, start), [2], "no grace, no stay");
    }

    /// TLS has 64 KiB for them, and peers do without.
    #[test]
    fn names_of_roots_are_told_while_they_are_few() {
        let pool = Pool::default();
        let long = |n: usize| Authority::new(&format!("{n}{}", "x".repeat(1000))).root();
        let certificates: Vec<_> = (0..20).map(long).collect();
        let few = pool.anchors(certificates[..5].iter());
        assert_eq!((few.store.len(), few.hints.len()), (5, 5));
        let many = pool.anchors(certificates.iter());
        assert_eq!((many.store.len(), many.hints.len()), (20, 0));
    }

    #[test]
    fn equal_sets_are_held_once() {
        let pool = Pool::default();
        let (one, two) = (roots(&[1, 2]), roots(&[2, 1, 2]));
        let first = pool.anchors(one.iter());
        assert!(Arc::ptr_eq(&first, &pool.anchors(two.iter())));
        assert!(!Arc::ptr_eq(&first, &pool.anchors(roots(&[1]).iter())));
        let list = pool.list(&one);
        assert!(Arc::ptr_eq(&list, &pool.list(&one)));
        drop((first, list));
        assert_eq!(pool.anchors(one.iter()).certificates.len(), 2);
        assert_eq!(pool.anchors.lock().len(), 1, "the dead are swept");
    }
}
