//! `/debug/explain`: what this proxy would do with a connection, and why.
//!
//! Asks the same functions as the data path. It opens nothing: whether the destination answers is not known here.

mod outcome;
mod place;
mod text;
mod verdict;

use std::{net::SocketAddr, sync::Arc};

use cert_agent::{IdentityStatus, SpiffeId};
use http::{Response, StatusCode};
use serde::Serialize;

use self::{
    outcome::Outcome,
    place::{Asked, Unclear},
    verdict::Verdict,
};
use super::{
    Console,
    http1::{self, Body, json},
    query::Query,
};
use crate::{
    mesh::{Health, State, Workload},
    policy::Connection,
    route::{self, Hop, Outbound, OutboundQuery, Via},
    telemetry::Reason,
};

/// Answers `?from=WORKLOAD&to=HOST:PORT[&output=text]`.
pub(super) fn answer(console: &Console, query: &Query<'_>) -> Response<Body> {
    let (Some(from), Some(to)) = (query.value("from"), query.value("to")) else {
        return http1::text(StatusCode::BAD_REQUEST, USAGE.to_owned());
    };
    match explain(console, &from, &to) {
        Ok(explanation) if query.value("output").as_deref() == Some("text") => {
            http1::text(StatusCode::OK, explanation.to_string())
        }
        Ok(explanation) => json(&explanation),
        Err(unclear) => http1::text(StatusCode::BAD_REQUEST, format!("{unclear}\n")),
    }
}

const USAGE: &str =
    "usage: /debug/explain?from=NAMESPACE/POD|IP|UID&to=IP|HOST:PORT[&output=text]\n";

/// Everything that decides about a connection.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Explanation {
    from: Source,
    /// The address that is dialled.
    to: SocketAddr,
    /// What the address belongs to.
    owner: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waypoints: Vec<String>,
    /// Services whose waypoint this connection does not pass, since it is their pod that is dialled.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    around: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    endpoints: Vec<Endpoint>,
    route: Route,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Verdict>,
    /// Those to whom the waypoint may lead, as far as they are on the network of the source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    behind: Vec<Behind>,
    outcome: Outcome,
}

/// What a workload behind the waypoint says to the waypoint.
#[derive(Debug, Serialize)]
struct Behind {
    workload: String,
    at: SocketAddr,
    policy: Verdict,
}

/// Who connects.
#[derive(Debug, Serialize)]
struct Source {
    name: String,
    namespace: String,
    network: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    /// Whether there is a certificate to present, as in the dump.
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<String>,
}

/// One endpoint of the service, or of its waypoint.
#[derive(Debug, Serialize)]
struct Endpoint {
    workload: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    network: Arc<str>,
    addresses: Vec<std::net::IpAddr>,
    eligible: bool,
    /// Its target port if it is eligible, else why it is not.
    because: String,
}

/// Where the connection goes. Of several eligible endpoints this is one that a connection may get.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Route {
    /// `passthrough`, `tcp`, `hbone`, `double-hbone`, `resolve` or `refuse`.
    kind: &'static str,
    /// The address that is dialled for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    dialled: Option<SocketAddr>,
    /// Who is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    /// The network of who is there.
    #[serde(skip_serializing_if = "str::is_empty")]
    network: Arc<str>,
    /// `workload`, `waypoint` or `gateway`.
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<&'static str>,
    /// What the tunnel is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<String>,
    /// Identities of which the server must have one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    expected: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    inner_expected: Vec<String>,
}

fn explain(console: &Console, from: &str, to: &str) -> Result<Explanation, Unclear> {
    let (source, from_ip, to) = match place::asked(console, from, to)? {
        Asked::Known {
            source,
            from_ip,
            to,
        } => (source, from_ip, to),
        Asked::Unknown { name, to } => return Ok(Explanation::unknown_source(name, to)),
    };
    let shared = &console.shared;
    let state = shared.mesh.read();
    let silent = place::silent(console, &state, &source);
    let mut ask = OutboundQuery {
        source: &source,
        source_ip: from_ip,
        destination: to,
        avoid: &silent,
    };
    let decide = |ask: &_| route::outbound(&state, &shared.settings.guard, ask, &mut rand::rng());
    let mut outbound = decide(&ask);
    if matches!(outbound, Outbound::Refuse(_)) && !silent.is_empty() {
        // Where there is nobody else, those have their turn.
        ask.avoid = &[];
        outbound = decide(&ask);
    }
    let meaning = route::meaning(&state, &ask);
    let (route, target) = Route::of(&outbound);
    let policy = target.map(|target| {
        let identity = target.proven.then(|| source.identity()).flatten();
        let connection = Connection {
            source: SocketAddr::new(from_ip, 0),
            destination: target.at,
            identity,
        };
        Verdict::of(&state, target.workload, &connection)
    });
    let behind = Behind::all(&state, &meaning, &outbound);
    let held = held(console, &source);
    let outcome = Outcome::unproven(&outbound, &source, held.as_ref())
        .unwrap_or_else(|| Outcome::of(&outbound, policy.as_ref()));
    let owner = match (&meaning.service, &meaning.workload) {
        (Some(service), _) => format!("service {}", service.key()),
        (None, Some(workload)) => format!("workload {}", workload.uid()),
        (None, None) => "nobody in the mesh".to_owned(),
    };
    let endpoints = meaning.endpoints.iter().map(Endpoint::of).collect();
    let around = meaning.around.iter();
    drop(state);
    Ok(Explanation {
        from: Source::of(&source, held.as_ref()),
        to,
        owner,
        waypoints: meaning.waypoints.iter().map(ToString::to_string).collect(),
        around: around.map(|service| service.key().to_string()).collect(),
        endpoints,
        route,
        policy,
        behind,
        outcome,
    })
}

/// What is known of the certificate of `workload`.
fn held(console: &Console, workload: &Workload) -> Option<IdentityStatus> {
    let identity = workload.identity()?;
    let mut held = console.shared.agent.snapshot().into_iter();
    held.find(|held| held.identity == *identity)
}

impl Explanation {
    /// The data path waits for the record of its own pod, and then gives up.
    fn unknown_source(name: String, to: SocketAddr) -> Self {
        Self {
            from: Source {
                name,
                namespace: String::new(),
                network: String::new(),
                identity: None,
                certificate: None,
            },
            to,
            owner: "not looked at".to_owned(),
            waypoints: Vec::new(),
            around: Vec::new(),
            endpoints: Vec::new(),
            route: Route {
                kind: "refuse",
                ..Route::default()
            },
            policy: None,
            behind: Vec::new(),
            outcome: Outcome::refused(Reason::UnknownLocal, &route::Refusal::UnknownLocal),
        }
    }
}

impl Behind {
    /// Asks everybody behind the waypoint of `outbound`, if there is one, about the waypoint.
    fn all(state: &State, meaning: &route::Meaning, outbound: &Outbound) -> Vec<Self> {
        let Outbound::Hbone(hop) = outbound else {
            return Vec::new();
        };
        let asked = meaning.behind.iter().filter(|_| hop.via == Via::Waypoint);
        asked
            .map(|(workload, at)| {
                let connection = Connection {
                    source: SocketAddr::new(hop.to.ip(), 0),
                    destination: *at,
                    identity: hop.workload.identity(),
                };
                Self {
                    workload: workload.uid().to_owned(),
                    at: *at,
                    policy: Verdict::of(state, workload, &connection),
                }
            })
            .collect()
    }
}

impl Source {
    fn of(workload: &Workload, held: Option<&IdentityStatus>) -> Self {
        let identity = workload.identity();
        let certificate = identity.map(|_| {
            held.map_or_else(
                || "not held: this node does not keep it".to_owned(),
                |held| held.state.to_string(),
            )
        });
        Self {
            name: workload.name().to_owned(),
            namespace: workload.namespace().to_string(),
            network: workload.network().to_string(),
            identity: identity.map(ToString::to_string),
            certificate,
        }
    }
}

impl Endpoint {
    fn of((workload, fit): &(Arc<Workload>, Result<route::Fit, route::Unfit>)) -> Self {
        Self {
            workload: workload.uid().to_owned(),
            network: Arc::clone(workload.network()),
            addresses: workload.addresses().to_vec(),
            eligible: fit.is_ok(),
            because: match fit {
                Ok(fit) if workload.health() != Health::Healthy => {
                    format!("port {}, though unhealthy", fit.port)
                }
                Ok(fit) => format!("port {}", fit.port),
                Err(unfit) => unfit.to_string(),
            },
        }
    }
}

/// Whose policies are asked, and about what.
struct Target<'a> {
    workload: &'a Workload,
    at: SocketAddr,
    /// Whether the source proves its identity.
    proven: bool,
}

impl Route {
    /// The route as shown, and whose policies the next proxy asks; those behind a waypoint or gateway are not for it.
    fn of(outbound: &Outbound) -> (Self, Option<Target<'_>>) {
        match outbound {
            Outbound::Passthrough { to, .. } => (Self::plain("passthrough", *to, None), None),
            Outbound::Direct { to, workload, .. } => {
                (Self::plain("tcp", *to, Some(workload)), None)
            }
            Outbound::Hbone(hop) => {
                let target = match (&hop.authority, hop.via) {
                    (route::Authority::Address(at), Via::Workload) => Some(Target {
                        workload: &hop.workload,
                        at: *at,
                        proven: true,
                    }),
                    _ => None,
                };
                (Self::tunnel("hbone", hop), target)
            }
            Outbound::Nested { outer, inner } => {
                let route = Self {
                    inner_expected: listed(&inner.expected),
                    ..Self::tunnel("double-hbone", outer)
                };
                (route, None)
            }
            Outbound::Resolve(lookup) => {
                let route = Self {
                    kind: "resolve",
                    workload: Some(lookup.workload().uid().to_owned()),
                    authority: Some(lookup.hostname().to_string()),
                    ..Self::default()
                };
                (route, None)
            }
            Outbound::Refuse(_) => {
                let route = Self {
                    kind: "refuse",
                    ..Self::default()
                };
                (route, None)
            }
        }
    }

    fn plain(kind: &'static str, to: SocketAddr, workload: Option<&Workload>) -> Self {
        Self {
            kind,
            dialled: Some(to),
            workload: workload.map(|workload| workload.uid().to_owned()),
            network: workload.map_or_else(Arc::default, |workload| Arc::clone(workload.network())),
            ..Self::default()
        }
    }

    fn tunnel(kind: &'static str, hop: &Hop) -> Self {
        Self {
            kind,
            dialled: Some(hop.to),
            workload: Some(hop.workload.uid().to_owned()),
            network: Arc::clone(hop.workload.network()),
            via: Some(match hop.via {
                Via::Workload => "workload",
                Via::Waypoint => "waypoint",
                Via::Gateway => "gateway",
            }),
            authority: Some(hop.authority.to_string()),
            expected: listed(&hop.expected),
            ..Self::default()
        }
    }
}

fn listed(identities: &[SpiffeId]) -> Vec<String> {
    identities.iter().map(ToString::to_string).collect()
}
