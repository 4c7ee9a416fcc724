//! Random policies and connections, judged once more by a model that follows the tables word by word, on what the control plane
//! sends.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use proptest::{collection::vec, prelude::*, sample::select};
use xds_client::proto::security as wire;

use super::{World, policy, rule, text};
use crate::policy::{Connection, Denied, Event, Note, authorize};

/// One connection.
#[derive(Debug, Clone)]
struct Facts {
    source: SocketAddr,
    destination: SocketAddr,
    /// Trust domain, namespace, service account.
    identity: Option<[&'static str; 3]>,
}

/// What the model says of one connection.
#[derive(Debug)]
struct Expected {
    allowed: bool,
    /// Policies of which one must be named as the reason.
    deciding: BTreeSet<String>,
    /// Everything else that must be told, `policy: message`.
    told: BTreeSet<String>,
}

/// Judges by all policies that are for the workload, which is in namespace `default` and names those in `named`.
fn expect(policies: &[wire::Authorization], named: &[String], facts: &Facts) -> Expected {
    use wire::Action::{Allow, Deny};
    let applying: Vec<_> = policies.iter().filter(|one| applies(one, named)).collect();
    let matching = |action, dry_run| -> BTreeSet<String> {
        let kind = of_kind(&applying, action, dry_run).into_iter();
        kind.filter(|policy| matches(policy, facts))
            .map(key)
            .collect()
    };
    let exist = |action, dry_run| !of_kind(&applying, action, dry_run).is_empty();
    let unknown = |name: &&String| !policies.iter().any(|policy| key(policy) == **name);
    let missing = named.iter().filter(unknown).cloned().collect();
    let mut told = tell(missing, Event::Missing);
    told.extend(tell(matching(Deny, true), Event::DryRunDenyMatch));
    let denying = matching(Deny, false);
    if !denying.is_empty() {
        return Expected {
            allowed: false,
            deciding: denying,
            told,
        };
    }
    let would_allow = matching(Allow, true);
    let none_would = exist(Allow, true) && would_allow.is_empty();
    told.extend(tell(would_allow, Event::DryRunAllowMatch));
    if none_would && !exist(Allow, false) {
        told.insert(format!("-: {}", Event::DryRunNoAllowMatch));
    }
    let allowing = matching(Allow, false);
    Expected {
        allowed: !exist(Allow, false) || !allowing.is_empty(),
        deciding: allowing,
        told,
    }
}

fn tell(keys: BTreeSet<String>, event: Event) -> BTreeSet<String> {
    keys.into_iter()
        .map(|key| format!("{key}: {event}"))
        .collect()
}

fn applies(policy: &wire::Authorization, named: &[String]) -> bool {
    named.contains(&key(policy))
        || policy.scope == i32::from(wire::Scope::Global)
        || (policy.scope == i32::from(wire::Scope::Namespace) && policy.namespace == "default")
}

fn of_kind<'a>(
    policies: &[&'a wire::Authorization],
    action: wire::Action,
    dry_run: bool,
) -> Vec<&'a wire::Authorization> {
    let is = |policy: &&&wire::Authorization| {
        policy.action == i32::from(action) && policy.dry_run == dry_run
    };
    policies.iter().filter(is).copied().collect()
}

fn key(policy: &wire::Authorization) -> String {
    format!("{}/{}", policy.namespace, policy.name)
}

fn matches(policy: &wire::Authorization, facts: &Facts) -> bool {
    policy.rules.iter().any(|rule| {
        rule.clauses.iter().all(|clause| {
            clause.matches.is_empty() || clause.matches.iter().any(|m| holds(m, facts))
        })
    })
}

/// Every field that is given must hold, and one must be given.
fn holds(m: &wire::Match, facts: &Facts) -> bool {
    let [domain, namespace, account] = facts.identity.unwrap_or_default();
    let path = format!("{domain}/ns/{namespace}/sa/{account}");
    let known = facts.identity.is_some();
    let pointer = format!("cluster.local/ns/{namespace}/sa/{account}");
    let at_home = domain == DOMAINS[0];
    let principal = |value: &wire::StringMatch| {
        use wire::string_match::MatchType;
        let is_named = match &value.match_type {
            Some(MatchType::Exact(text) | MatchType::Prefix(text)) => {
                text.starts_with("cluster.local/")
            }
            _ => false,
        };
        known && (fits(value, &path) || (at_home && is_named && fits(value, &pointer)))
    };
    let in_namespace = |value: &wire::StringMatch| fits(value, namespace);
    let is = |value: &wire::ServiceAccountMatch| {
        known && value.namespace == namespace && value.service_account == account
    };
    let from = |range: &wire::Address| within(facts.source.ip(), range);
    let to = |range: &wire::Address| within(facts.destination.ip(), range);
    let port = |value: &u32| *value == u32::from(facts.destination.port());
    let fields = [
        one_of(&m.namespaces, in_namespace),
        none_of(&m.not_namespaces, in_namespace),
        one_of(&m.principals, principal),
        none_of(&m.not_principals, principal),
        one_of(&m.service_accounts, is),
        none_of(&m.not_service_accounts, is),
        one_of(&m.source_ips, from),
        none_of(&m.not_source_ips, from),
        one_of(&m.destination_ips, to),
        none_of(&m.not_destination_ips, to),
        one_of(&m.destination_ports, port),
        none_of(&m.not_destination_ports, port),
    ];
    let given: Vec<bool> = fields.into_iter().flatten().collect();
    !given.is_empty() && given.into_iter().all(|holds| holds)
}

/// `None`: the field is not considered.
fn one_of<T>(values: &[T], test: impl Fn(&T) -> bool) -> Option<bool> {
    (!values.is_empty()).then(|| values.iter().any(test))
}

/// As [`one_of`], of a negated field.
fn none_of<T>(values: &[T], test: impl Fn(&T) -> bool) -> Option<bool> {
    one_of(values, test).map(|any| !any)
}

fn fits(value: &wire::StringMatch, actual: &str) -> bool {
    use wire::string_match::MatchType as M;
    match value.match_type.as_ref().unwrap() {
        M::Exact(text) => actual == text,
        M::Prefix(text) => actual.starts_with(text),
        M::Suffix(text) => actual.ends_with(text),
        M::Presence(()) => !actual.is_empty(),
    }
}

/// Whether the first bits are the same, of addresses of one family.
fn within(ip: IpAddr, range: &wire::Address) -> bool {
    let bits =
        |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:08b}")).collect() };
    let ip = match ip.to_canonical() {
        IpAddr::V4(ip) => bits(&ip.octets()),
        IpAddr::V6(ip) => bits(&ip.octets()),
    };
    let range_bits = bits(&range.address);
    let length = range.length as usize;
    ip.len() == range_bits.len() && ip[..length] == range_bits[..length]
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let identity = (select(DOMAINS), select(NAMESPACES), select(ACCOUNTS));
    let identity = identity.prop_map(|(domain, namespace, account)| [domain, namespace, account]);
    let identity = proptest::option::weighted(0.8, identity);
    (any_ip(), any_ip(), 80..83_u16, identity).prop_map(|(source, destination, port, identity)| {
        Facts {
            source: SocketAddr::new(source, 40000),
            destination: SocketAddr::new(destination, port),
            identity,
        }
    })
}

/// Addresses that differ in few bits; one is IPv4 in the clothes of IPv6.
fn any_ip() -> impl Strategy<Value = IpAddr> {
    select(ADDRESSES).prop_map(|text| text.parse().unwrap())
}

/// Of any length; host bits that are set do not count.
fn any_range() -> impl Strategy<Value = wire::Address> {
    (any_ip(), 0..=128_u32).prop_map(|(ip, length)| match ip.to_canonical() {
        IpAddr::V4(ip) => wire::Address {
            address: ip.octets().to_vec(),
            length: length / 4,
        },
        IpAddr::V6(ip) => wire::Address {
            address: ip.octets().to_vec(),
            length,
        },
    })
}

fn any_match() -> impl Strategy<Value = wire::Match> {
    let texts = |values: &'static [&'static str]| {
        let texts = || vec(select(values).prop_map(text), 0..3);
        (texts(), texts())
    };
    let account = (select(NAMESPACES), select(ACCOUNTS));
    let account = account.prop_map(|(namespace, account)| wire::ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: account.into(),
    });
    let accounts = || vec(account.clone(), 0..3);
    let ranges = || vec(any_range(), 0..3);
    let ports = || vec(80..83_u32, 0..3);
    let fields = (
        texts(NAMESPACE_PATTERNS),
        texts(PRINCIPAL_PATTERNS),
        (accounts(), accounts()),
        (ranges(), ranges()),
        (ranges(), ranges()),
        (ports(), ports()),
    );
    // Which kinds of fields are given: most matches have one or two, or none.
    let kept = (any::<u8>(), any::<u8>()).prop_map(|(one, other)| one & other);
    (fields, kept).prop_map(|(fields, kept)| {
        let (namespaces, principals, accounts, sources, destinations, ports) = fields;
        let mut m = wire::Match::default();
        let is_kept = |bit: u8| kept & (1 << bit) != 0;
        if is_kept(0) {
            (m.namespaces, m.not_namespaces) = namespaces;
        }
        if is_kept(1) {
            (m.principals, m.not_principals) = principals;
        }
        if is_kept(2) {
            (m.service_accounts, m.not_service_accounts) = accounts;
        }
        if is_kept(3) {
            (m.source_ips, m.not_source_ips) = sources;
        }
        if is_kept(4) {
            (m.destination_ips, m.not_destination_ips) = destinations;
        }
        if is_kept(5) {
            (m.destination_ports, m.not_destination_ports) = ports;
        }
        m
    })
}

fn any_policies() -> impl Strategy<Value = Vec<wire::Authorization>> {
    use wire::{Action, Scope};
    const ACTIONS: &[Action] = &[Action::Allow, Action::Deny];
    const SCOPES: &[Scope] = &[Scope::Global, Scope::Namespace, Scope::WorkloadSelector];
    let rules = vec(vec(vec(any_match(), 0..3), 0..3).prop_map(rule), 0..3);
    let kind = (select(ACTIONS), proptest::bool::weighted(0.3));
    let place = (select(SCOPES), select(HOMES));
    vec((rules, kind, place), 0..6).prop_map(|policies| {
        let build = |(index, (rules, (action, dry_run), (scope, home)))| wire::Authorization {
            namespace: str::to_owned(home),
            scope: Scope::into(scope),
            dry_run,
            ..policy(&format!("p{index}"), action, rules)
        };
        policies.into_iter().enumerate().map(build).collect()
    })
}

/// What the workload names; there is not always such a policy.
fn any_names() -> impl Strategy<Value = Vec<String>> {
    let name = (select(HOMES), 0..7_usize).prop_map(|(home, index)| format!("{home}/p{index}"));
    proptest::collection::btree_set(name, 0..5).prop_map(|names| names.into_iter().collect())
}

/// Holds the verdict of the proxy against the model's.
fn compare(world: &World, facts: &Facts, expected: &Expected) -> Result<(), TestCaseError> {
    let id = facts.identity.map(|[domain, namespace, account]| {
        let id = format!("spiffe://{domain}/ns/{namespace}/sa/{account}");
        id.parse().unwrap()
    });
    let connection = Connection {
        source: facts.source,
        destination: facts.destination,
        identity: id.as_ref(),
    };
    let verdict = authorize(&world.mesh.read(), &world.web, &connection);
    prop_assert_eq!(verdict.is_allowed(), expected.allowed, "{:?}", facts);
    let decision = verdict.decision();
    match &decision.policy {
        Some(policy) => prop_assert!(expected.deciding.contains(&**policy), "{:?}", decision),
        None => prop_assert!(expected.deciding.is_empty(), "{:?}", decision),
    }
    if let Err(Denied::Explicitly(policy)) = &verdict.outcome {
        prop_assert_eq!(Some(policy), decision.policy.as_ref());
    }
    prop_assert_eq!(verdict.notes().last(), Some(decision));
    let text = |note: &Note| {
        let policy = note.policy.as_deref().unwrap_or("-");
        format!("{policy}: {}", note.event)
    };
    let told: Vec<String> = verdict.asides.iter().map(text).collect();
    let distinct: BTreeSet<String> = told.iter().cloned().collect();
    prop_assert_eq!(told.len(), distinct.len(), "told twice: {:?}", told);
    prop_assert_eq!(&distinct, &expected.told);
    Ok(())
}

proptest! {
    #[test]
    fn judges_as_the_tables_say(
        policies in any_policies(),
        named in any_names(),
        connections in vec(any_facts(), 8),
    ) {
        let names: Vec<&str> = named.iter().map(String::as_str).collect();
        let world = World::in_domain(DOMAINS[0], policies.clone(), &names);
        for facts in connections {
            compare(&world, &facts, &expect(&policies, &named, &facts))?;
        }
    }
}

/// Trust domains; the workload is of the first.
const DOMAINS: &[&str] = &["td", "other"];
const NAMESPACES: &[&str] = &["a", "b", "ab"];
const ACCOUNTS: &[&str] = &["x", "y"];
/// Where policies are; the workload is in the first.
const HOMES: &[&str] = &["default", "other"];
const NAMESPACE_PATTERNS: &[&str] = &["a", "b", "*", "a*", "*b"];
const PRINCIPAL_PATTERNS: &[&str] = &[
    "td/ns/a/sa/x",
    "*/sa/y",
    "td/ns/b/*",
    "cluster.local/ns/a/sa/x",
    "cluster.local/ns/b/*",
    "cluster*",
    "*",
    "spiffe://td/ns/a/sa/x",
    "spiffe://*",
];
const ADDRESSES: &[&str] = &[
    "10.0.0.1",
    "10.0.0.2",
    "10.0.128.1",
    "192.168.0.1",
    "::ffff:10.0.0.1",
    "fd00::1",
    "fd00::2",
    "fd00:0:0:8000::1",
];
