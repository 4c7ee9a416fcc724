//! The parts of the page.

use std::time::{Duration, SystemTime};

use cert_agent::{CertificateState, IdentityStatus};
use maud::{Markup, html};

use super::map;
use crate::{
    admin::{
        Console, PodPhase, ShownPod,
        flows::{Flow, Shown},
        when,
    },
    budget::{self, Pressure},
    flow::FlowTable,
    listen::Redirection,
    telemetry::DnsMetrics,
};

pub(super) fn all(console: &Console) -> Markup {
    let pods = console.pods.pods();
    let identities = console.shared.agent.snapshot();
    html! {
        (tiles(console, &pods, &identities))
        (map::section(&console.shared.traffic))
        (identity_table(&identities))
        (refusals(console))
        (flows(&pods))
        (pod_table(&pods))
        (rejected(console))
    }
}

fn tile(value: &str, what: &str, class: &str) -> Markup {
    html! { div.tile { b class=(class) { (value) } span { (what) } } }
}

/// How the node is.
fn tiles(console: &Console, pods: &[ShownPod], identities: &[IdentityStatus]) -> Markup {
    let pending = console.readiness.pending();
    let (ready, class) = if pending.is_empty() {
        ("ready".to_owned(), "good")
    } else {
        (format!("waits for {}", pending.join(", ")), "bad")
    };
    let up = pods.iter().filter(|pod| pod.phase == PodPhase::Up).count();
    let open: usize = pods
        .iter()
        .map(|pod| pod.flows.as_deref().map_or(0, FlowTable::len))
        .sum();
    let counts = console.shared.mesh.read().counts();
    let known = format!(
        "{} / {} / {}",
        counts.workloads, counts.services, counts.policies
    );
    html! {
        section.tiles {
            (tile(&ready, "this node", class))
            (control_plane(console))
            (authority(console.settings.authority(), identities))
            (tile(&format!("{up} of {}", pods.len()), "pods served", if up == pods.len() { "" } else { "warn" }))
            (tile(&open.to_string(), "open flows", ""))
            (memory())
            (name_servers(console))
            (certificates(identities))
            (tile(&known, "workloads / services / policies known", ""))
        }
    }
}

/// Shown only while nobody answers.
fn name_servers(console: &Console) -> Markup {
    let since = console.names.as_ref().and_then(DnsMetrics::silent_since);
    let silent = since.map(|since| span(since.elapsed().unwrap_or_default()));
    html! {
        @if let Some(silent) = silent {
            (tile("silent", &format!("name servers, for {silent}"), "bad"))
        }
    }
}

fn certificates(identities: &[IdentityStatus]) -> Markup {
    let count = |such: fn(&&IdentityStatus) -> bool| identities.iter().filter(such).count();
    let held = count(|one| one.state == CertificateState::Available);
    let failing = count(|one| one.last_failure.is_some());
    let all = identities.len();
    let (what, class) = match failing {
        0 if held == all => ("certificates held".to_owned(), "good"),
        0 => ("certificates held".to_owned(), "warn"),
        _ => (format!("certificates held, {failing} fail"), "bad"),
    };
    tile(&format!("{held} of {all}"), &what, class)
}

fn memory() -> Markup {
    let pressure = budget::pressure();
    let class = match pressure {
        Pressure::Calm => "",
        Pressure::Tight => "warn",
        Pressure::Critical => "bad",
    };
    tile(pressure.as_str(), "memory", class)
}

fn control_plane(console: &Console) -> Markup {
    let source = &console.control_plane;
    let Some(address) = &source.address else {
        return tile("local file", "source of the mesh", "");
    };
    let silence = source.last_response().and_then(|at| at.elapsed().ok());
    let heard = silence.map_or_else(
        || "never heard".to_owned(),
        |silence| format!("heard {} ago", span(silence)),
    );
    let (state, class) = if source.is_connected() {
        ("connected", "good")
    } else {
        ("disconnected", "bad")
    };
    let told = console.shared.mesh.read().recalled();
    let age = told.map(|told| span(told.elapsed().unwrap_or_default()));
    let recalled = age.map_or_else(String::new, |age| {
        format!(", serving what was known {age} ago")
    });
    tile(state, &format!("{address}, {heard}{recalled}"), class)
}

/// Who signs certificates, and whether they come.
fn authority(address: Option<&str>, identities: &[IdentityStatus]) -> Markup {
    let Some(address) = address else {
        return tile("itself", "signs certificates", "warn");
    };
    let failing = identities.iter().any(|one| one.last_failure.is_some());
    let last = identities.iter().filter_map(|one| one.obtained_at).max();
    let (state, class) = match (failing, last) {
        (true, _) => ("fails", "bad"),
        (false, Some(_)) => ("signs", "good"),
        (false, None) => ("was not heard", ""),
    };
    let since = last.and_then(|at| at.elapsed().ok());
    let since = since.map_or_else(String::new, |age| {
        format!(", last certificate {} ago", span(age))
    });
    tile(state, &format!("{address}{since}"), class)
}

/// Connections that did not come to be, with the question to ask about each.
fn refusals(console: &Console) -> Markup {
    let recent = console.shared.traffic.refusals().recent();
    let shown: Vec<_> = recent
        .iter()
        .take(MOST_REFUSALS)
        .map(|one| Shown::of(one))
        .collect();
    html! {
        section id="refusals" {
            h2 { "Recent refusals and failures" }
            @if shown.is_empty() { p.dim { "none" } }
            @else {
                div.wide { table {
                    thead { tr { th { "when" } th { "reason" } th { "from" } th { "to" } th { "what happened" } th {} } }
                    tbody { @for one in &shown { (refusal(one)) } }
                } }
            }
        }
    }
}

fn refusal(one: &Shown) -> Markup {
    let command = one
        .destination
        .filter(|_| one.direction == "outbound")
        .map(|to| format!("culvert explain --from {} --to {to}", one.source.ip()));
    html! {
        tr {
            td { (one.at) }
            td.bad { (one.reason.as_str()) }
            td { @if let Some(pod) = &one.source_pod { (pod) " " } code { (one.source) } }
            td { @if let Some(name) = &one.destination_name { (name) " " } @if let Some(to) = one.destination { code { (to) } } }
            td.text { (one.error) }
            td { @if let Some(command) = &command { button data-copy=(command) title=(command) { "copy explain" } } }
        }
    }
}

fn flows(pods: &[ShownPod]) -> Markup {
    let tables = pods
        .iter()
        .filter_map(|pod| Some((pod, pod.flows.as_deref()?)));
    let total: usize = tables.clone().map(|(_, table)| table.len()).sum();
    let open = tables.flat_map(|(pod, table)| {
        let open = table.open().into_iter();
        open.map(move |facts| Flow::of(pod, &facts))
    });
    let shown: Vec<_> = open.take(MOST_FLOWS).collect();
    html! {
        section id="flows" {
            h2 { "Live flows " span.dim { (shown.len()) " of " (total) } }
            @if shown.is_empty() { p.dim { "none" } }
            @else {
                div.wide { table {
                    thead { tr {
                        th { "pod" } th {} th { "from" } th { "to" } th { "service" } th { "route" }
                        th.num { "age" } th.num { "to server" } th.num { "to client" } th { "decided by" }
                    } }
                    tbody { @for flow in &shown { (flow_row(flow)) } }
                } }
            }
        }
    }
}

fn flow_row(flow: &Flow) -> Markup {
    let age = Duration::from_millis(flow.age_ms);
    html! {
        tr {
            td { (flow.pod) }
            td { @if flow.direction == "outbound" { "→" } @else { "←" } }
            td { @if let Some(side) = &flow.source { (side) " " } code.dim { (flow.source_address) } }
            td { @if let Some(side) = &flow.destination { (side) " " } code.dim { (flow.dialled) } }
            td { @if let Some(service) = &flow.service { (service) } }
            td { (flow.route) }
            td.num { (span(age)) }
            td.num { (map::bytes(flow.bytes_received)) }
            td.num { (map::bytes(flow.bytes_sent)) }
            td { @if let Some(policy) = &flow.policy { (policy) } }
        }
    }
}

fn pod_table(pods: &[ShownPod]) -> Markup {
    html! {
        section.half id="pods" {
            h2 { "Pods" }
            @if pods.is_empty() { p.dim { "none" } }
            @else {
                div.wide { table {
                    thead { tr { th { "pod" } th { "service account" } th { "listeners" } th { "rules" } th.num { "flows" } } }
                    tbody { @for pod in pods {
                        tr {
                            td { (pod.who.namespace) "/" (pod.who.name) }
                            td { (pod.who.service_account) }
                            td { @match pod.phase {
                                PodPhase::Up => span.good { "open" },
                                PodPhase::Pending => span.bad { "cannot be opened, tried again" },
                            } }
                            td { (rules(pod)) }
                            td.num { (pod.flows.as_deref().map_or(0, FlowTable::len)) }
                        }
                    } }
                } }
            }
        }
    }
}

/// Whether the pod's connections come here, as far as that was tried.
fn rules(pod: &ShownPod) -> Markup {
    let Some(probed) = pod.probed else {
        return html! { span.dim { "not tried yet" } };
    };
    let families = [("IPv4", probed.ipv4), ("IPv6", probed.ipv6)];
    let which = |wanted| {
        let such = families.into_iter().filter(|(_, rules)| *rules == wanted);
        such.map(|(family, _)| family)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (work, missing) = (which(Redirection::Works), which(Redirection::Missing));
    html! {
        @if !work.is_empty() { span.good { "work for " (work) } " " }
        @if !missing.is_empty() { span.bad { "missing for " (missing) } }
        @if work.is_empty() && missing.is_empty() { span.dim { "unknown" } }
    }
}

fn identity_table(identities: &[IdentityStatus]) -> Markup {
    html! {
        section.half id="identities" {
            h2 { "Identities" }
            @if identities.is_empty() { p.dim { "none" } }
            @else {
                div.wide { table {
                    thead { tr { th { "identity" } th { "state" } th { "left of its life" } } }
                    tbody { @for one in identities { (identity_row(one)) } }
                } }
            }
        }
    }
}

fn identity_row(one: &IdentityStatus) -> Markup {
    let now = SystemTime::now();
    let life = one.chain.first().map(|leaf| {
        let left = leaf.not_after.duration_since(now).unwrap_or_default();
        let whole = leaf
            .not_after
            .duration_since(leaf.not_before)
            .unwrap_or_default();
        (left, left.as_secs_f64() / whole.as_secs_f64().max(1.0))
    });
    let held = one.state == CertificateState::Available;
    html! {
        tr {
            td { code { (one.identity.as_str()) } }
            td class=(if held { "good" } else { "bad" }) {
                (one.stage.as_str())
                @if let Some(failure) = &one.last_failure { div.bad { (failure) } }
            }
            td { @if let Some((left, share)) = life {
                meter min="0" max="1" low="0.15" optimum="1" value=(format!("{share:.3}")) {}
                " " (span(left))
            } }
        }
    }
}

/// What the control plane told in vain.
fn rejected(console: &Console) -> Markup {
    let rejected = console.control_plane.rejections.all();
    html! {
        @if !rejected.is_empty() {
            section id="rejected" {
                h2 { "Refused resources of the mesh" }
                div.wide { table {
                    thead { tr { th { "when" } th { "name" } th { "why" } } }
                    tbody { @for one in &rejected {
                        tr { td { (when::rfc3339(one.at)) } td { (one.name) } td.text.bad { (one.reason) } }
                    } }
                } }
            }
        }
    }
}

/// The two largest units.
fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// Flows that are shown; a browser takes no more in good time.
const MOST_FLOWS: usize = 1000;
const MOST_REFUSALS: usize = 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units() {
        for (seconds, text) in [(0, "0s"), (61, "1m 1s"), (7200, "2h 0m"), (90_000, "1d 1h")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }
}
