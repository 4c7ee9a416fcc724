//! Where resources come from: what each source may replace and remove, what is refused, which versions are told.

use bytes::Bytes;
use proptest::{collection::vec, prelude::*};
use prost::Message;
use xds_client::{
    Batch, Extent, Rejected,
    proto::{
        discovery::{Resource, resource::Payload},
        security, workload as pb,
    },
};

use super::{super::*, fixture::*};

#[test]
fn a_full_set_removes_what_it_does_not_name() {
    let mesh = mesh();
    put(
        &mesh,
        ["w1", "w2", "w3"].map(|uid| pod(uid, "10.0.0.7").into()),
    );
    put(&mesh, [service("a", "h", &[]).into()]);
    let update = Update {
        addresses: vec![pod("w1", "10.0.0.7").into(), bad("w2").into()],
        ..Update::default()
    };
    let report = apply(&mesh, Extent::Everything, update);
    let reasons: Vec<_> = report.rejected.iter().map(ToString::to_string).collect();
    assert_eq!(reasons, ["w2: addresses: an address of 3 bytes"]);
    assert_eq!((report.workloads, report.services), (1, 1));
    assert_eq!(uids(&mesh), ["w1", "w2"]);
}

#[test]
fn a_file_removes_what_it_no_longer_names() {
    let mesh = mesh();
    let pods = ["w1", "w2", "w3", "w4"].map(|uid| pod(uid, "10.0.0.7").into());
    mesh.load(&Document {
        addresses: pods.into(),
        policies: vec![policy("shop/p", security::Scope::Global)],
        ..Document::default()
    });
    let unreadable = Rejected {
        name: "w3".into(),
        reason: "no".into(),
    };
    let report = mesh.load(&Document {
        addresses: vec![pod("w1", "10.0.0.7").into(), bad("w2").into()],
        rejected: vec![unreadable],
        ..Document::default()
    });
    assert_eq!((report.workloads, report.policies), (1, 1));
    assert_eq!(report.rejected.len(), 1);
    assert_eq!(uids(&mesh), ["w1", "w2", "w3"]);
}

#[test]
fn no_source_removes_what_the_other_told() {
    let mesh = mesh();
    let of_file = Document {
        addresses: vec![
            pod("file", "10.0.0.1").into(),
            pod("both", "10.0.0.3").into(),
        ],
        ..Document::default()
    };
    mesh.load(&of_file);
    put(
        &mesh,
        [
            pod("told", "10.0.0.2").into(),
            pod("both", "10.0.0.3").into(),
        ],
    );
    assert!(!remove(&mesh, "file").is_effective());
    mesh.load(&Document::default());
    assert_eq!(uids(&mesh), ["both", "told"]);
    mesh.load(&of_file);
    apply(&mesh, Extent::Everything, Update::default());
    assert_eq!(uids(&mesh), ["both", "file"], "the file tells of both");
}

#[test]
fn the_last_of_two_resources_of_one_name_counts_and_removals_after_both() {
    let mesh = mesh();
    put(&mesh, [pod("held", "10.0.0.1").into()]);
    let update = |removed: &[&str]| Update {
        addresses: vec![
            pod("held", "10.0.0.2").into(),
            pod("new", "10.0.0.3").into(),
            pod("held", "10.0.0.1").into(),
            pod("new", "10.0.0.4").into(),
        ],
        removed_addresses: removed.iter().map(ToString::to_string).collect(),
        ..Update::default()
    };
    apply(&mesh, Extent::Changes, update(&[]));
    for (ip, expected) in [
        ("10.0.0.1", Some("held")),
        ("10.0.0.2", None),
        ("10.0.0.3", None),
        ("10.0.0.4", Some("new")),
    ] {
        let state = mesh.read();
        let found = state.workload_at("", ip.parse().unwrap());
        assert_eq!(found.map(|one| one.uid()), expected, "{ip}");
    }
    apply(&mesh, Extent::Changes, update(&["held", "new"]));
    assert!(mesh.read().is_bare());
}

#[test]
fn versions_are_those_of_what_is_in_force() {
    let mesh = mesh();
    mesh.load(&Document {
        addresses: vec![pod("file", "10.0.0.1").into()],
        ..Document::default()
    });
    let told = |name: &str, version: &str, content: &pb::Workload| {
        let address = pb::Address::from(content.clone());
        let resource = Resource::new(name, version, &address);
        let encoded = vec![resource.encode_to_vec().into()];
        mesh.apply(&Batch::new(
            Kind::Address,
            Extent::Changes,
            encoded,
            Vec::new(),
        ))
    };
    let versions = || {
        let mut all = Vec::new();
        mesh.read().versions(Kind::Address, |name, version| {
            all.push(format!("{name}={version}"));
        });
        all.sort();
        all
    };
    told("w", "00000000000000a1", &pod("w", "10.0.0.7"));
    told("never", "00000000000000a1", &bad("never"));
    assert_eq!(versions(), ["w=00000000000000a1"]);
    told("w", "00000000000000a2", &bad("w"));
    assert_eq!(
        versions(),
        ["w=00000000000000a1"],
        "a refused version is not held"
    );
    assert!(!told("w", "v3", &pod("w", "10.0.0.7")).is_effective());
    assert_eq!(
        versions(),
        ["w=v3"],
        "the content is the same, the version new"
    );
    // Of a version that is held, the content is not even looked at.
    assert!(told("w", "v3", &bad("w")).rejected.is_empty());
}

#[test]
fn what_cannot_be_decoded_is_refused_and_the_rest_applies() {
    let mesh = mesh();
    let resource = |name: &str, content: &'static [u8]| Resource {
        name: name.into(),
        resource: Some(Payload {
            value: Bytes::from_static(content),
            ..Payload::default()
        }),
        ..Resource::default()
    };
    let hollow = Resource {
        name: "hollow".into(),
        ..Resource::default()
    };
    let good = Resource::new("w", "1", &pb::Address::from(pod("w", "10.0.0.7")));
    let all = [
        resource("broken", b"\xff\xff"),
        hollow,
        resource("empty", b""),
        good,
    ];
    let mut encoded: Vec<Bytes> = all.map(|one| one.encode_to_vec().into()).into();
    encoded.push(Bytes::from_static(b"\xff"));
    let batch = Batch::new(Kind::Address, Extent::Changes, encoded, Vec::new());
    let report = mesh.apply(&batch);
    let names: Vec<_> = report.rejected.iter().map(|one| &*one.name).collect();
    let unreadable = "(a resource without a readable name)";
    assert_eq!(names, ["broken", "hollow", "empty", unreadable]);
    assert_eq!(uids(&mesh), ["w"]);
}

#[test]
fn a_resource_that_cannot_be_read_costs_nothing_that_it_may_be() {
    let mesh = mesh();
    let named = |name| policy(name, security::Scope::Global);
    let update = Update {
        policies: vec![named("shop/deny"), named("shop/other")],
        ..Update::default()
    };
    apply(&mesh, Extent::Changes, update);
    // It has a name, `shop/deny`, but its aliases are no text.
    let broken = Bytes::from_static(b"\x1a\x09shop/deny\x22\x01\xff");
    let everything = |encoded| {
        let batch = Batch::new(Kind::Authorization, Extent::Everything, encoded, Vec::new());
        mesh.apply(&batch)
    };
    let nameless = Bytes::from_static(b"\x1a\x09shop");
    let held = || ["shop/deny", "shop/other"].map(|name| mesh.read().policy(name).is_some());
    assert_eq!(everything(vec![nameless]).rejected.len(), 1);
    assert_eq!(held(), [true, true], "it may be any");
    assert_eq!(everything(vec![broken]).rejected.len(), 1);
    assert_eq!(held(), [true, false], "it is told of, the other is not");
    assert_eq!(everything(Vec::new()).policies, 1);
}

proptest! {
    #[test]
    fn arbitrary_responses_never_panic_and_leave_what_is_in_force(
        contents in vec(vec(any::<u8>(), 0..80), 0..6),
        framed in any::<bool>(),
    ) {
        let mesh = mesh();
        put(&mesh, [pod("held", "10.0.0.7").into(), service("a", "h", &["10.96.0.1"]).into()]);
        let encoded = |kind| {
            let name = |number: usize| format!("{kind:?}{number}");
            let encoded = contents.iter().enumerate().map(|(number, content)| {
                let value = Bytes::from(content.clone());
                let payload = Payload { value: value.clone(), ..Payload::default() };
                let resource = Resource { name: name(number), resource: Some(payload), ..Resource::default() };
                if framed { resource.encode_to_vec().into() } else { value }
            });
            Batch::new(kind, Extent::Changes, encoded.collect(), Vec::new())
        };
        for kind in Kind::ALL {
            mesh.apply(&encoded(kind));
        }
        prop_assert!(mesh.read().workload("held").is_some());
        prop_assert!(mesh.read().service("a", "h").is_some());
    }
}

/// A workload with an address that cannot be.
fn bad(uid: &str) -> pb::Workload {
    workload(uid, "", |w| w.addresses = vec![vec![1, 2, 3]])
}

fn uids(mesh: &Mesh) -> Vec<String> {
    let state = mesh.read();
    let mut uids: Vec<_> = state.workloads().map(|w| w.uid().to_owned()).collect();
    uids.sort_unstable();
    uids
}
