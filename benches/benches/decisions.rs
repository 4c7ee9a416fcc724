//! What a decision costs: judging by policies, choosing a route, applying mesh state.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a bench may stop at the first fault; criterion's macros carry no docs"
)]

use std::{hint::black_box, net::SocketAddr, sync::Arc};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use culvert::{
    mesh::{Mesh, View, Workload},
    policy::{Connection, authorize},
    route::{LoopGuard, Outbound, OutboundQuery, outbound},
};
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use xds_client::{
    Batch, Extent, Kind,
    local::{Document, NamedPolicy},
    proto::{discovery::Resource, security, workload as wire},
};

criterion_group!(benches, policy_match, route_lookup, state_apply);
criterion_main!(benches);

const SEED: u64 = 0x0c01_7e57;

/// ALLOW policies of the workload's namespace, of which only the last looked at matches: the most that a
/// judgement can cost.
fn policy_match(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy_match");
    for count in [1, 10, 100] {
        let mesh = mesh();
        let policies = (0..count).map(|index| policy(index, index + 1 == count));
        let report = mesh.load(&Document {
            addresses: vec![address_of(pod(0))],
            policies: policies.collect(),
            ..Document::default()
        });
        assert!(report.rejected.is_empty(), "{:?}", report.rejected);
        let workload = record(&mesh, 0);
        let identity = "spiffe://cluster.local/ns/shop/sa/client".parse().unwrap();
        let connection = Connection {
            source: SocketAddr::from(([10, 9, 9, 9], 40_000)),
            destination: SocketAddr::new(workload.addresses()[0], 8080),
            identity: Some(&identity),
        };
        assert!(authorize(&mesh.read(), &workload, &connection).is_allowed());
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| authorize(&mesh.read(), &workload, black_box(&connection)).is_allowed());
        });
    }
    group.finish();
}

/// By pod address, and by virtual address of a service with 1, 10 and 1000 endpoints.
fn route_lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("route_lookup");
    group.throughput(Throughput::Elements(1));
    let mesh = filled(2_000);
    for endpoints in [1, 10, 1_000] {
        let members =
            (0..endpoints).map(|index| address_of(member(10_000 + endpoints + index, endpoints)));
        let report = mesh.apply(&batch(members.chain([service(endpoints)])));
        assert!(report.rejected.is_empty(), "{:?}", report.rejected);
    }
    let source = record(&mesh, 0);
    let mut rng = SmallRng::seed_from_u64(SEED);
    let mut measure = |name: &str, destination: SocketAddr| {
        let ask = OutboundQuery {
            source: &source,
            source_ip: source.addresses()[0],
            destination,
            avoid: &[],
        };
        let guard = LoopGuard::default();
        let first = outbound(&mesh.read(), &guard, &ask, &mut rng);
        assert!(matches!(first, Outbound::Hbone(_)), "{first:?}");
        group.bench_function(name, |b| {
            b.iter(|| outbound(&mesh.read(), &guard, black_box(&ask), &mut rng));
        });
    };
    measure("pod", (record(&mesh, 1_234).addresses()[0], 8080).into());
    for endpoints in [1, 10, 1_000] {
        measure(&format!("vip/{endpoints}"), (vip(endpoints), 80).into());
    }
    group.finish();
}

/// The first push of a mesh, and one changed pod in it.
fn state_apply(c: &mut Criterion) {
    let mut group = c.benchmark_group("state_apply");
    for count in [10, 10_000] {
        group.sample_size(if count > 100 { 20 } else { 100 });
        let update = whole(count);
        group.throughput(Throughput::Elements(count.into()));
        group.bench_function(BenchmarkId::new("first", count), |b| {
            b.iter_batched(
                mesh,
                |mesh| {
                    mesh.apply(&update);
                    mesh // dropped outside of the measurement
                },
                BatchSize::LargeInput,
            );
        });
        let mesh = filled(count);
        let mut healthy = false;
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("one_of", count), |b| {
            b.iter(|| {
                healthy = !healthy;
                let mut changed = pod(count / 2);
                changed.status = i32::from(!healthy);
                mesh.apply(&batch([address_of(changed)]))
            });
        });
    }
    group.finish();
}

fn mesh() -> Mesh {
    Mesh::new(View {
        node_name: Some("node-1".into()),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
    })
}

/// A mesh of `count` pods in `count / 10` services.
fn filled(count: u32) -> Mesh {
    let mesh = mesh();
    let report = mesh.apply(&whole(count));
    assert!(report.rejected.is_empty(), "{:?}", report.rejected);
    mesh
}

fn whole(count: u32) -> Batch {
    let services = (0..count / 10).map(|index| service(20_000 + index));
    let pods = (0..count).map(|index| address_of(pod(index)));
    batch(services.chain(pods))
}

/// What a control plane sends.
fn batch(addresses: impl IntoIterator<Item = wire::Address>) -> Batch {
    let encoded = addresses
        .into_iter()
        .map(|one| Resource::new("", "", &one).encode_to_vec().into());
    Batch::new(
        Kind::Address,
        Extent::Changes,
        encoded.collect(),
        Vec::new(),
    )
}

fn record(mesh: &Mesh, index: u32) -> Arc<Workload> {
    Arc::clone(
        mesh.read()
            .workload(&pod(index).uid)
            .expect("the pod was applied"),
    )
}

/// A pod of a mesh: ten to a deployment and service, on nodes and in zones drawn from a seed.
fn pod(index: u32) -> wire::Workload {
    member(index, 20_000 + index / 10)
}

fn member(index: u32, service: u32) -> wire::Workload {
    let mut rng = SmallRng::seed_from_u64(SEED ^ u64::from(index));
    let deployment = format!("deployment-{service}");
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{deployment}-{index}"),
        name: format!("{deployment}-{index}"),
        namespace: "shop".into(),
        addresses: vec![ip(0x0a00_0000 + index)],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: deployment.clone(),
        node: format!("node-{}", rng.random_range(0..100)),
        canonical_name: deployment.clone(),
        canonical_revision: "latest".into(),
        workload_name: deployment,
        locality: Some(wire::Locality {
            region: "r1".into(),
            zone: format!("z{}", rng.random_range(0..3)),
            subzone: String::new(),
        }),
        services: [(format!("shop/{}", host(service)), wire::PortList::default())].into(),
        ..wire::Workload::default()
    }
}

fn address_of(workload: wire::Workload) -> wire::Address {
    wire::Address {
        r#type: Some(wire::address::Type::Workload(workload)),
    }
}

fn service(number: u32) -> wire::Address {
    let vip = wire::NetworkAddress {
        address: ip(0x0b00_0000 + number),
        ..wire::NetworkAddress::default()
    };
    let port = wire::Port {
        service_port: 80,
        target_port: 8080,
        ..wire::Port::default()
    };
    let service = wire::Service {
        name: format!("svc-{number}"),
        namespace: "shop".into(),
        hostname: host(number),
        addresses: vec![vip],
        ports: vec![port],
        ..wire::Service::default()
    };
    wire::Address {
        r#type: Some(wire::address::Type::Service(service)),
    }
}

fn host(number: u32) -> String {
    format!("svc-{number}.shop.svc.cluster.local")
}

fn vip(number: u32) -> std::net::IpAddr {
    std::net::Ipv4Addr::from_bits(0x0b00_0000 + number).into()
}

fn ip(bits: u32) -> Vec<u8> {
    bits.to_be_bytes().to_vec()
}

/// A policy as people write them: from one of two principals, to one of two ports.
fn policy(index: u64, matches: bool) -> NamedPolicy {
    let principal = |name: &str| security::StringMatch {
        match_type: Some(security::string_match::MatchType::Exact(format!(
            "cluster.local/ns/shop/sa/{name}"
        ))),
    };
    let account = if matches { "client" } else { "somebody" };
    let from = security::Match {
        principals: vec![principal("admin"), principal(account)],
        ..security::Match::default()
    };
    let to = security::Match {
        destination_ports: vec![9090, 8080],
        ..security::Match::default()
    };
    let clause = |part| security::Clause {
        matches: vec![part],
    };
    let name = format!("policy-{index:03}");
    NamedPolicy {
        name: format!("shop/{name}"),
        policy: security::Authorization {
            name,
            namespace: "shop".into(),
            scope: security::Scope::Namespace.into(),
            action: security::Action::Allow.into(),
            rules: vec![security::Rule {
                clauses: vec![clause(to), clause(from)],
            }],
            ..security::Authorization::default()
        },
    }
}
