//! Names that a local file and the control plane both tell of.

use std::collections::BTreeMap;

use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::select,
};
use xds_client::{Extent, local::NamedPolicy, proto::security};

use super::{super::*, fixture::*};

#[test]
fn what_both_told_stays_until_neither_tells_it() {
    use Teller::{File, Istiod};
    // Who tells of the policy, then who is silent about it; what is left is what the other tells.
    let orders: [[Teller; 3]; 4] = [
        [Istiod, File, File],
        [Istiod, File, Istiod],
        [File, Istiod, Istiod],
        [File, Istiod, File],
    ];
    for order in orders {
        for alike in [true, false] {
            for extent in [Extent::Changes, Extent::Everything] {
                let mesh = mesh();
                let [first, second, silent] = order;
                first.tells(&mesh, alike);
                second.tells(&mesh, alike);
                let what = format!("{order:?}, alike: {alike}, {extent:?}");
                assert_eq!(told_by(&mesh), Some(second), "the last: {what}");
                silent.forgets(&mesh, extent);
                let left = if silent == File { Istiod } else { File };
                assert_eq!(told_by(&mesh), Some(left), "{what}");
                let expected = left.policy(alike).policy.name;
                assert_eq!(&*mesh.policies()[0].0.name, expected, "{what}");
                left.forgets(&mesh, extent);
                assert_eq!(told_by(&mesh), None, "{what}");
                assert!(mesh.read().is_bare(), "{what}");
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Teller {
    File,
    Istiod,
}

impl Teller {
    /// What the two tell under one key, the same or each its own.
    fn policy(self, alike: bool) -> NamedPolicy {
        let mut policy = policy("shop/p", security::Scope::Namespace);
        if self == Self::File && !alike {
            policy.policy.action = security::Action::Deny.into();
            policy.policy.name = "of-file".into();
        }
        policy
    }

    fn tells(self, mesh: &Mesh, alike: bool) {
        let policies = vec![self.policy(alike)];
        match self {
            Self::File => drop(mesh.load(&Document {
                policies,
                ..Document::default()
            })),
            Self::Istiod => {
                let update = Update {
                    policies,
                    ..Update::default()
                };
                apply(mesh, Extent::Changes, update);
            }
        }
    }

    fn forgets(self, mesh: &Mesh, extent: Extent) {
        match (self, extent) {
            (Self::File, _) => drop(mesh.load(&Document::default())),
            (Self::Istiod, Extent::Everything) => drop(apply(mesh, extent, Update::default())),
            (Self::Istiod, Extent::Changes) => {
                let update = Update {
                    removed_policies: vec!["shop/p".into()],
                    ..Update::default()
                };
                apply(mesh, extent, update);
            }
        }
    }
}

fn told_by(mesh: &Mesh) -> Option<Teller> {
    let policies = mesh.policies();
    policies.first().map(|(_, source)| match source {
        Source::File => Teller::File,
        Source::ControlPlane => Teller::Istiod,
    })
}

#[test]
fn addresses_that_both_told_come_back_with_their_indexes() {
    let mesh = mesh();
    let addresses = |ip: &str| vec![pod("w", ip).into(), service("a", "h", &[ip]).into()];
    let file = |addresses| Document {
        addresses,
        ..Document::default()
    };
    put(&mesh, addresses("10.0.0.1"));
    mesh.load(&file(addresses("10.0.0.2")));
    let at = |ip: &str| {
        let (state, ip) = (mesh.read(), ip.parse().unwrap());
        (
            state.workload_at("", ip).is_some(),
            state.service_at("", ip, None).is_some(),
        )
    };
    assert_eq!(
        [at("10.0.0.1"), at("10.0.0.2")],
        [(false, false), (true, true)]
    );
    // While the file's is in force, istiod changes its mind, and the file tells the same again.
    put(&mesh, addresses("10.0.0.3"));
    mesh.load(&file(addresses("10.0.0.2")));
    assert_eq!(at("10.0.0.2"), (true, true));
    let report = mesh.load(&Document::default());
    assert_eq!((report.workloads, report.services), (1, 1));
    assert_eq!(
        [at("10.0.0.2"), at("10.0.0.3")],
        [(false, false), (true, true)]
    );
    for name in ["w", "a/h"] {
        assert!(remove(&mesh, name).is_effective());
    }
    assert!(mesh.read().is_bare());
}

#[test]
fn a_file_tells_what_istiod_removed_before_the_file_did() {
    let mesh = mesh();
    let file = Document {
        addresses: vec![pod("w", "10.0.0.2").into()],
        ..Document::default()
    };
    put(&mesh, [pod("w", "10.0.0.1").into()]);
    mesh.load(&file);
    assert!(!remove(&mesh, "w").is_effective(), "the file's is in force");
    assert!(mesh.read().workload("w").is_some());
    assert!(mesh.load(&Document::default()).is_effective());
    assert!(mesh.read().is_bare());
}

#[test]
fn istiod_is_told_the_versions_of_all_that_it_told() {
    let mesh = mesh();
    apply(
        &mesh,
        Extent::Changes,
        Update {
            addresses: vec![pod("w", "10.0.0.1").into(), service("a", "h", &[]).into()],
            policies: vec![policy("shop/p", security::Scope::Global)],
            ..Update::default()
        },
    );
    let names = || {
        Kind::ALL.map(|kind| {
            let mut names = Vec::new();
            mesh.read().versions(kind, |name, version| {
                names.push(format!("{name}={version}"));
            });
            names.sort();
            names
        })
    };
    let before = names();
    mesh.load(&Document {
        addresses: vec![
            pod("w", "10.0.0.2").into(),
            service("a", "h", &["10.0.0.2"]).into(),
        ],
        policies: vec![policy("shop/p", security::Scope::Namespace)],
        ..Document::default()
    });
    assert_eq!(names(), before, "or their removal would not be told");
}

/// What one source tells at once: for each uid the last number of an address; without one it is silent about it, or removes it.
type Telling = (Source, Extent, BTreeMap<&'static str, Option<u8>>);

fn tellings() -> impl Strategy<Value = Vec<Telling>> {
    let source = select(vec![Source::File, Source::ControlPlane]);
    let extent = prop_oneof![4 => Just(Extent::Changes), 1 => Just(Extent::Everything)];
    let contents = btree_map(select(&["w1", "w2", "w3"][..]), option::of(1..4_u8), 0..4);
    vec((source, extent, contents), 0..12)
}

/// What a uid means to each source, and which of them told it last.
#[derive(Debug, Default, Clone)]
struct Meant {
    file: Option<u8>,
    istiod: Option<u8>,
    last: Option<Source>,
}

impl Meant {
    fn hear(&mut self, (source, extent, contents): &Telling, uid: &str) {
        let (of_source, only_changes) = match source {
            Source::File => (&mut self.file, false),
            Source::ControlPlane => (&mut self.istiod, *extent == Extent::Changes),
        };
        match contents.get(uid) {
            Some(Some(number)) => {
                *of_source = Some(*number);
                self.last = Some(*source);
            }
            None if only_changes => {}
            Some(None) | None => *of_source = None,
        }
    }

    fn in_force(&self) -> Option<(u8, Source)> {
        let file = self.file.map(|number| (number, Source::File));
        let istiod = self.istiod.map(|number| (number, Source::ControlPlane));
        match self.last? {
            Source::File => file.or(istiod),
            Source::ControlPlane => istiod.or(file),
        }
    }
}

fn tell(mesh: &Mesh, (source, extent, contents): &Telling) -> Report {
    let told = contents
        .iter()
        .filter_map(|(uid, number)| Some((uid, (*number)?)));
    let addresses = told.map(|(uid, number)| pod(uid, &format!("10.0.0.{number}")).into());
    let addresses = addresses.collect();
    match source {
        Source::File => mesh.load(&Document {
            addresses,
            ..Document::default()
        }),
        Source::ControlPlane => {
            let removed = contents.iter().filter(|(_, number)| number.is_none());
            let removed_addresses = removed.map(|(uid, _)| uid.to_string()).collect();
            apply(
                mesh,
                *extent,
                Update {
                    addresses,
                    removed_addresses,
                    ..Update::default()
                },
            )
        }
    }
}

proptest! {
    #[test]
    fn each_source_has_its_own_say_in_any_order(history in tellings()) {
        let mesh = mesh();
        let mut meant = ["w1", "w2", "w3"].map(|uid| (uid, Meant::default()));
        for telling in &history {
            let before = meant.clone().map(|(_, meant)| meant.in_force().map(|(number, _)| number));
            for (uid, meant) in &mut meant {
                meant.hear(telling, uid);
            }
            let after = meant.clone().map(|(_, meant)| meant.in_force().map(|(number, _)| number));
            prop_assert_eq!(tell(&mesh, telling).is_effective(), before != after);
            let in_force: Vec<_> = mesh.workloads().iter().map(|(workload, source)| {
                (workload.uid().to_owned(), workload.addresses()[0].to_string(), *source)
            }).collect();
            let expected: Vec<_> = meant.iter().filter_map(|(uid, meant)| {
                let (number, source) = meant.in_force()?;
                Some((uid.to_string(), format!("10.0.0.{number}"), source))
            }).collect();
            prop_assert_eq!(in_force, expected);
            let mut known = Vec::new();
            mesh.read().versions(Kind::Address, |name, _| known.push(name.to_owned()));
            known.sort();
            let of_istiod = meant.iter().filter(|(_, meant)| meant.istiod.is_some());
            prop_assert_eq!(known, of_istiod.map(|(uid, _)| uid.to_string()).collect::<Vec<_>>());
        }
        for source in [Source::File, Source::ControlPlane] {
            tell(&mesh, &(source, Extent::Everything, BTreeMap::new()));
        }
        prop_assert!(mesh.read().is_bare());
        prop_assert_eq!(mesh.shared.pool.lock().held_after_sweep(), 0);
    }
}
