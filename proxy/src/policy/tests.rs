mod reference;

use std::sync::Arc;

use xds_client::{
    local::{Document, NamedPolicy},
    proto::{security as wire, workload},
};

use super::{Connection, Event, Verdict, authorize, note};
use crate::mesh::{Mesh, View, Workload};

/// A mesh with one workload, `default/web` at 10.0.0.2, which names the policies in `named`.
struct World {
    mesh: Mesh,
    web: Arc<Workload>,
}

impl World {
    fn new(policies: impl IntoIterator<Item = wire::Authorization>, named: &[&str]) -> Self {
        Self::in_domain("", policies, named)
    }

    /// The workload has this trust domain.
    fn in_domain(
        trust_domain: &str,
        policies: impl IntoIterator<Item = wire::Authorization>,
        named: &[&str],
    ) -> Self {
        let mesh = Mesh::new(View {
            node_name: None,
            network: "".into(),
            cluster_id: "Kubernetes".into(),
        });
        let web = workload::Workload {
            uid: "web".into(),
            name: "web".into(),
            namespace: "default".into(),
            trust_domain: trust_domain.into(),
            addresses: vec![vec![10, 0, 0, 2]],
            authorization_policies: named.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let named = |policy: wire::Authorization| NamedPolicy {
            name: format!("{}/{}", policy.namespace, policy.name),
            policy,
        };
        let report = mesh.load(&Document {
            addresses: vec![workload::Address {
                r#type: Some(workload::address::Type::Workload(web)),
            }],
            policies: policies.into_iter().map(named).collect(),
            ..Default::default()
        });
        assert!(report.rejected.is_empty(), "{report:?}");
        let web = Arc::clone(mesh.read().workload("web").unwrap());
        Self { mesh, web }
    }

    /// The verdict on a connection of 10.0.0.1 under `identity` (empty: plaintext) to `port`.
    fn judge(&self, identity: &str, port: u16) -> Verdict {
        let id = (!identity.is_empty()).then(|| format!("spiffe://{identity}").parse().unwrap());
        let connection = Connection {
            source: "10.0.0.1:40000".parse().unwrap(),
            destination: ([10, 0, 0, 2], port).into(),
            identity: id.as_ref(),
        };
        authorize(&self.mesh.read(), &self.web, &connection)
    }

    fn allows(&self, identity: &str, port: u16) -> bool {
        self.judge(identity, port).is_allowed()
    }

    fn notes(&self, identity: &str, port: u16) -> Vec<String> {
        let text = |note: &super::Note| match &note.policy {
            Some(policy) => format!("{} {policy}", note.event),
            None => note.event.to_string(),
        };
        self.judge(identity, port).notes().map(text).collect()
    }
}

fn policy(name: &str, action: wire::Action, rules: Vec<wire::Rule>) -> wire::Authorization {
    wire::Authorization {
        name: name.into(),
        namespace: "default".into(),
        scope: wire::Scope::Namespace.into(),
        action: action.into(),
        rules,
        ..Default::default()
    }
}

fn allow(rules: Vec<wire::Rule>) -> wire::Authorization {
    policy("allow", wire::Action::Allow, rules)
}

fn deny(rules: Vec<wire::Rule>) -> wire::Authorization {
    policy("deny", wire::Action::Deny, rules)
}

fn dry(policy: wire::Authorization) -> wire::Authorization {
    wire::Authorization {
        name: format!("dry-{}", policy.name),
        dry_run: true,
        ..policy
    }
}

fn rule(clauses: impl IntoIterator<Item = Vec<wire::Match>>) -> wire::Rule {
    wire::Rule {
        clauses: clauses
            .into_iter()
            .map(|matches| wire::Clause { matches })
            .collect(),
    }
}

fn one(change: impl FnOnce(&mut wire::Match)) -> Vec<wire::Match> {
    let mut m = wire::Match::default();
    change(&mut m);
    vec![m]
}

/// `*`, `*x`, `x*` or `x`.
fn text(pattern: &str) -> wire::StringMatch {
    use wire::string_match::MatchType;
    let kind = match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => MatchType::Presence(()),
        (Some(suffix), _) => MatchType::Suffix(suffix.into()),
        (None, Some(prefix)) => MatchType::Prefix(prefix.into()),
        (None, None) => MatchType::Exact(pattern.into()),
    };
    wire::StringMatch {
        match_type: Some(kind),
    }
}

fn principal(pattern: &str) -> Vec<wire::Match> {
    one(|m| m.principals = vec![text(pattern)])
}

fn no_principal() -> Vec<wire::Match> {
    one(|m| m.not_principals = vec![text("*")])
}

fn namespace(name: &str) -> Vec<wire::Match> {
    one(|m| m.namespaces = vec![text(name)])
}

fn port(port: u32) -> Vec<wire::Match> {
    one(|m| m.destination_ports = vec![port])
}

const WEB: &str = "td/ns/a/sa/web";
const OTHER: &str = "td/ns/b/sa/other";
const PLAINTEXT: &str = "";

#[test]
fn without_policies_everything_is_allowed() {
    let world = World::new([], &[]);
    assert!(world.allows(PLAINTEXT, 80));
    assert_eq!(world.notes(WEB, 80), ["no allow policies, allow"]);
}

#[test]
fn strict_mutual_tls_denies_plaintext_only() {
    let strict = deny(vec![rule([no_principal()])]);
    let world = World::new([strict], &[]);
    assert!(world.allows(WEB, 80));
    let denied = world.judge(PLAINTEXT, 80).outcome.unwrap_err();
    assert_eq!(denied.to_string(), "explicitly denied by: default/deny");
}

#[test]
fn strict_mutual_tls_with_a_permissive_port() {
    let exempt = one(|m| m.not_destination_ports = vec![9090]);
    let world = World::new([deny(vec![rule([no_principal(), exempt])])], &[]);
    assert_eq!(
        [9090, 8080].map(|port| world.allows(PLAINTEXT, port)),
        [true, false]
    );
    assert_eq!(
        [9090, 8080].map(|port| world.allows(WEB, port)),
        [true, true]
    );
}

#[test]
fn permissive_mutual_tls_with_a_strict_port() {
    let strict = one(|m| {
        m.not_principals = vec![text("*")];
        m.destination_ports = vec![8080];
    });
    let world = World::new([deny(vec![rule([strict])])], &[]);
    assert_eq!(
        [9090, 8080].map(|port| world.allows(PLAINTEXT, port)),
        [true, false]
    );
    assert!(world.allows(WEB, 8080));
}

#[test]
fn empty_levels_mean_what_the_table_says() {
    let empty_match = || vec![wire::Match::default()];
    // What a policy with these rules matches.
    let cases = [
        (vec![], false),
        (vec![rule([])], true),
        (vec![rule([vec![]])], true),
        (vec![rule([empty_match()])], false),
        (vec![rule([empty_match(), vec![]])], false),
        (vec![rule([[empty_match(), port(80)].concat()])], true),
        (vec![rule([empty_match()]), rule([])], true),
    ];
    for (rules, matches) in cases {
        let denying = World::new([deny(rules.clone())], &[]);
        let allowing = World::new([allow(rules.clone())], &[]);
        for identity in [WEB, PLAINTEXT] {
            assert_eq!(denying.allows(identity, 80), !matches, "{rules:?}");
            assert_eq!(allowing.allows(identity, 80), matches, "{rules:?}");
        }
    }
    let denied = World::new([allow(vec![])], &[])
        .judge(WEB, 80)
        .outcome
        .unwrap_err();
    assert_eq!(denied.to_string(), "allow policies exist, but none allowed");
}

#[test]
fn principals_are_matched_without_their_scheme() {
    let cases = [
        ("*", true),
        ("*/sa/web", true),
        ("td/ns/a/*", true),
        ("td/ns/a/sa/web", true),
        ("spiffe://td/ns/a/sa/web", false),
        ("td/ns/A/*", false),
        ("*/sa/we", false),
    ];
    for (pattern, allowed) in cases {
        let world = World::new([allow(vec![rule([principal(pattern)])])], &[]);
        assert_eq!(world.allows(WEB, 80), allowed, "{pattern}");
        assert!(!world.allows(PLAINTEXT, 80), "{pattern}");
    }
}

#[test]
fn cluster_local_stands_for_the_own_trust_domain() {
    const PEERS: [&str; 3] = ["td/ns/a/sa/web", "other/ns/a/sa/web", PLAINTEXT];
    let cases = [
        ("cluster.local/ns/a/sa/web", true),
        ("cluster.local/ns/a/*", true),
        ("cluster.local/*", true),
        ("cluster*", false),
        ("cluster.local*", false),
        ("cluster.local/ns/b/*", false),
        ("cluster.local/ns/a/sa/we", false),
        ("cluster.localx/ns/a/sa/web", false),
    ];
    for (pattern, is) in cases {
        let world = World::in_domain("td", [allow(vec![rule([principal(pattern)])])], &[]);
        let allowed = PEERS.map(|peer| world.allows(peer, 80));
        assert_eq!(allowed, [is, false, false], "{pattern}");
        let but = one(|m| m.not_principals = vec![text(pattern)]);
        let world = World::in_domain("td", [deny(vec![rule([but])])], &[]);
        let allowed = PEERS.map(|peer| world.allows(peer, 80));
        assert_eq!(allowed, [is, false, false], "all but {pattern}");
    }
    // The workload is of another trust domain than its peer.
    let world = World::new([allow(vec![rule([principal("cluster.local/*")])])], &[]);
    assert!(!world.allows(WEB, 80));
}

#[test]
fn denied_namespaces_but_one_shut_out_plaintext() {
    let not_a = one(|m| m.not_namespaces = vec![text("a")]);
    let world = World::new([deny(vec![rule([not_a])])], &[]);
    assert_eq!(
        [WEB, OTHER, PLAINTEXT].map(|who| world.allows(who, 80)),
        [true, false, false]
    );
}

#[test]
fn service_accounts_are_of_any_trust_domain() {
    let account = wire::ServiceAccountMatch {
        namespace: "a".into(),
        service_account: "web".into(),
    };
    let is = one(|m| m.service_accounts = vec![account.clone()]);
    let is_not = one(|m| m.not_service_accounts = vec![account.clone()]);
    let who = [
        WEB,
        "other.td/ns/a/sa/web",
        OTHER,
        "td/ns/b/sa/web",
        PLAINTEXT,
    ];
    let world = World::new([allow(vec![rule([is])])], &[]);
    assert_eq!(
        who.map(|who| world.allows(who, 80)),
        [true, true, false, false, false]
    );
    let world = World::new([allow(vec![rule([is_not])])], &[]);
    assert_eq!(
        who.map(|who| world.allows(who, 80)),
        [false, false, true, true, true]
    );
}

#[test]
fn addresses_match_by_range_and_family() {
    let range = |bytes: &[u8], length| wire::Address {
        address: bytes.to_vec(),
        length,
    };
    let cases = [
        (range(&[10, 0, 0, 0], 8), true),
        (range(&[10, 0, 0, 1], 32), true),
        (range(&[10, 0, 0, 2], 32), false),
        (range(&[0, 0, 0, 0], 0), true),
        (range(&[0; 16], 0), false),
    ];
    for (range, matches) in cases {
        let from = one(|m| m.source_ips = vec![range.clone()]);
        let not_from = one(|m| m.not_source_ips = vec![range.clone()]);
        assert_eq!(
            World::new([allow(vec![rule([from])])], &[]).allows(WEB, 80),
            matches
        );
        assert_eq!(
            World::new([allow(vec![rule([not_from])])], &[]).allows(WEB, 80),
            !matches
        );
    }
    let to = one(|m| m.destination_ips = vec![range(&[10, 0, 0, 2], 32)]);
    assert!(World::new([allow(vec![rule([to])])], &[]).allows(WEB, 80));
}

#[test]
fn clauses_are_joined_by_and_rules_by_or() {
    let rules = vec![rule([namespace("a"), port(80)]), rule([port(90)])];
    let world = World::new([allow(rules)], &[]);
    let cases = [
        (WEB, 80, true),
        (WEB, 90, true),
        (OTHER, 90, true),
        (OTHER, 80, false),
    ];
    for (who, port, allowed) in cases {
        assert_eq!(world.allows(who, port), allowed, "{who} {port}");
    }
}

#[test]
fn dry_runs_are_told_and_not_enforced() {
    let everything = || vec![rule([])];
    let nothing = Vec::new;
    let allowed = "no allow policies, allow";
    let cases = [
        (
            vec![dry(deny(everything()))],
            vec!["dry-run: deny policy match default/dry-deny", allowed],
        ),
        (vec![dry(deny(nothing()))], vec![allowed]),
        (
            vec![dry(allow(everything()))],
            vec!["dry-run: allow policy match default/dry-allow", allowed],
        ),
        (
            vec![dry(allow(nothing()))],
            vec!["dry-run: no allow policies match", allowed],
        ),
        (
            vec![dry(allow(nothing())), allow(everything())],
            vec!["allow policy match default/allow"],
        ),
        (
            vec![
                dry(allow(everything())),
                deny(everything()),
                dry(deny(everything())),
            ],
            vec![
                "dry-run: deny policy match default/dry-deny",
                "deny policy match default/deny",
            ],
        ),
        (
            vec![dry(allow(everything())), allow(nothing())],
            vec![
                "dry-run: allow policy match default/dry-allow",
                "no allow policies matched",
            ],
        ),
    ];
    for (policies, notes) in cases {
        let world = World::new(policies, &[]);
        assert_eq!(world.notes(WEB, 80), notes);
        let refused = notes
            .last()
            .is_some_and(|last| last.starts_with("deny") || last.ends_with("matched"));
        assert_eq!(world.allows(WEB, 80), !refused);
    }
}

#[test]
fn a_missing_policy_is_told_and_the_others_are_enforced() {
    let selected = wire::Authorization {
        scope: wire::Scope::WorkloadSelector.into(),
        ..deny(vec![rule([port(80)])])
    };
    let world = World::new([selected], &["default/gone", "default/deny"]);
    assert_eq!(
        world.notes(WEB, 80),
        [
            "policy not found, not enforced default/gone",
            "deny policy match default/deny"
        ]
    );
    assert!(world.allows(WEB, 90));
    let verdict = world.judge(WEB, 90);
    assert!(verdict.notes().next().unwrap().event.is_degradation());
    assert_eq!(verdict.missing().count(), 1);
}

#[test]
fn where_the_state_is_a_recalled_one_a_missing_policy_refuses() {
    let world = World::new([], &["default/gone"]);
    assert!(world.allows("td/ns/a/sa/b", 80));
    world.mesh.recall(std::time::SystemTime::now());
    assert!(!world.allows("td/ns/a/sa/b", 80));
    let expected = "policy not found, and the state is not confirmed default/gone";
    assert_eq!(world.notes("td/ns/a/sa/b", 80), [expected]);
    world.mesh.confirm();
    assert!(world.allows("td/ns/a/sa/b", 80));
}

#[test]
fn mandatory_mutual_tls_is_in_force_by_its_name() {
    let name = "istio-system/istio_converted_static_strict";
    let world = World::new([], &[name]);
    let verdict = world.judge("", 80);
    assert_eq!(*verdict.decision(), note(Event::DenyMatch, name.into()));
    assert!(!verdict.is_allowed());
    assert!(world.allows(WEB, 80));
    assert_eq!(world.judge(WEB, 80).missing().count(), 0);
    // What another name says, nobody knows.
    let world = World::new([], &["shop/converted_peer_authentication_x"]);
    assert!(world.allows("", 80));
    assert_eq!(world.judge("", 80).missing().count(), 1);
}

#[test]
fn scopes_decide_whom_a_policy_is_for() {
    let scoped = |scope: wire::Scope, namespace: &str| wire::Authorization {
        scope: scope.into(),
        namespace: namespace.into(),
        ..deny(vec![rule([])])
    };
    let cases = [
        (scoped(wire::Scope::Global, "istio-system"), &[][..], false),
        (scoped(wire::Scope::Namespace, "default"), &[], false),
        (scoped(wire::Scope::Namespace, "other"), &[], true),
        (
            scoped(wire::Scope::Namespace, "other"),
            &["other/deny"],
            false,
        ),
        (scoped(wire::Scope::WorkloadSelector, "default"), &[], true),
        (
            scoped(wire::Scope::WorkloadSelector, "default"),
            &["default/deny"],
            false,
        ),
    ];
    for (policy, named, allowed) in cases {
        let world = World::new([policy.clone()], named);
        assert_eq!(world.allows(WEB, 80), allowed, "{policy:?} {named:?}");
    }
}
