//! Who talks to whom, as a drawing: bytes as the width of a line, denials in red.

use std::collections::BTreeMap;

use maud::{Markup, html};

use crate::telemetry::{Names, Reporter, Series, Traffic};

/// All that flowed between two names.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Edge {
    bytes: u64,
    opened: u64,
    denied: u64,
    failed: u64,
}

pub(super) fn section(traffic: &Traffic) -> Markup {
    let mut edges: Vec<_> = edges(traffic).into_iter().collect();
    let total = edges.len();
    edges.sort_by_key(|(_, edge)| std::cmp::Reverse((edge.bytes, edge.opened)));
    edges.truncate(MOST);
    html! {
        section.half id="map" {
            h2 { "Who talks to whom " span.dim { (edges.len()) " of " (total) " pairs, since the start" } }
            @if edges.is_empty() { p.dim { "nobody yet" } } @else { div.wide { (drawing(&edges)) } }
        }
    }
}

/// A flow between two pods of this node is told by both ends, so of each pair the end that tells more counts.
fn edges(traffic: &Traffic) -> BTreeMap<(String, String), Edge> {
    let mut edges: BTreeMap<_, [Edge; 2]> = BTreeMap::new();
    for series in traffic.series() {
        let names = series.labels();
        let [source, destination] = edges.entry(ends(names)).or_default();
        match names.reporter {
            Reporter::Source => source.add(&series),
            Reporter::Destination => destination.add(&series),
        }
    }
    let told = edges.into_iter();
    told.map(|(ends, [source, destination])| (ends, source.or_more(destination)))
        .collect()
}

impl Edge {
    fn add(&mut self, series: &Series) {
        let (received, sent) = series.totals();
        let denied = series.denied();
        self.bytes += received + sent;
        self.opened += series.opened();
        self.denied += denied;
        self.failed += series.failed().saturating_sub(denied);
    }

    fn or_more(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.max(other.bytes),
            opened: self.opened.max(other.opened),
            denied: self.denied.max(other.denied),
            failed: self.failed.max(other.failed),
        }
    }
}

fn ends(names: &Names) -> (String, String) {
    let workload = |namespace: &Option<_>, name: &Option<_>| match (namespace, name) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        (_, Some(name)) => format!("{name}"),
        (_, None) => "unknown".to_owned(),
    };
    let (source, destination) = (&names.source, &names.destination);
    let to = match &names.service.hostname {
        Some(hostname) => hostname.to_string(),
        None => workload(&destination.namespace, &destination.workload),
    };
    (workload(&source.namespace, &source.workload), to)
}

type Named<'a> = &'a ((String, String), Edge);

fn drawing(edges: &[((String, String), Edge)]) -> Markup {
    let left = places(edges.iter().map(|((source, _), _)| source));
    let right = places(edges.iter().map(|((_, destination), _)| destination));
    let height = left.len().max(right.len()) * ROW + 10;
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {height}")) role="img" aria-label="who talks to whom" {
            @for edge in edges { (line(edge, &left, &right)) }
            @for edge in edges { (amount(edge, edges, &left, &right)) }
            @for (name, at) in &left { text x=(LEFT - 8) y=(at + 4) text-anchor="end" { (shortened(name)) } }
            @for (name, at) in &right { text x=(RIGHT + 8) y=(at + 4) { (shortened(name)) } }
        }
    }
}

fn line(named: Named<'_>, left: &BTreeMap<&str, usize>, right: &BTreeMap<&str, usize>) -> Markup {
    let ((source, destination), edge) = named;
    let (from, to) = (left.get(source.as_str()), right.get(destination.as_str()));
    let (from, to) = (
        from.copied().unwrap_or_default(),
        to.copied().unwrap_or_default(),
    );
    let middle = usize::midpoint(LEFT, RIGHT);
    // From one pixel for a byte to eleven for a terabyte.
    let width = 1 + edge.bytes.checked_ilog2().unwrap_or_default() / 4;
    let refused = edge.denied > 0;
    let title = format!(
        "{source} → {destination}: {}, {} flows, {} denied, {} failed",
        bytes(edge.bytes),
        edge.opened,
        edge.denied,
        edge.failed
    );
    html! {
        path.bad[refused] d=(format!("M{LEFT} {from} C{middle} {from} {middle} {to} {RIGHT} {to}")) stroke-width=(width) {
            title { (title) }
        }
    }
}

/// How much a line carries, at that end of it where it is alone.
fn amount(
    named: Named<'_>,
    edges: &[((String, String), Edge)],
    left: &BTreeMap<&str, usize>,
    right: &BTreeMap<&str, usize>,
) -> Markup {
    let ((source, destination), edge) = named;
    let (from, to) = (left.get(source.as_str()), right.get(destination.as_str()));
    let (from, to) = (
        from.copied().unwrap_or_default(),
        to.copied().unwrap_or_default(),
    );
    let alone = |is_same: &dyn Fn(&(String, String)) -> bool| {
        edges.iter().filter(|(ends, _)| is_same(ends)).count() == 1
    };
    let (x, y, anchor) = if alone(&|(_, to)| to == destination) {
        (RIGHT - 8, to, "end")
    } else if alone(&|(from, _)| from == source) {
        (LEFT + 8, from, "start")
    } else {
        (
            usize::midpoint(LEFT, RIGHT),
            usize::midpoint(from, to),
            "middle",
        )
    };
    html! {
        text.dim x=(x) y=(y - 6) text-anchor=(anchor) {
            (bytes(edge.bytes))
            @if edge.denied > 0 { ", " (edge.denied) " denied" }
            @if edge.failed > 0 { ", " (edge.failed) " failed" }
        }
    }
}

/// Each name once, with the height at which it stands.
fn places<'a>(names: impl Iterator<Item = &'a String>) -> BTreeMap<&'a str, usize> {
    let mut places = BTreeMap::new();
    for name in names {
        let next = places.len() * ROW + ROW / 2;
        places.entry(name.as_str()).or_insert(next);
    }
    places
}

fn shortened(name: &str) -> &str {
    name.strip_suffix(".svc.cluster.local").unwrap_or(name)
}

/// `1.5 MiB`.
pub(super) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = count.checked_ilog2().unwrap_or_default() / 10;
    let unit = usize::try_from(step).ok().and_then(|step| units.get(step));
    match (step, unit) {
        (0, _) | (_, None) => format!("{count} B"),
        (_, Some(unit)) => {
            let tenths = (count >> (10 * (step - 1))) * 10 / 1024;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
    }
}

const MOST: usize = 30;
const WIDTH: usize = 720;
const LEFT: usize = 210;
const RIGHT: usize = 480;
const ROW: usize = 34;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Access, Label, Labels, Party, Reason, Route, Security, ServiceName};

    #[test]
    fn both_ends_of_a_flow_within_the_node_are_one_and_denials_are_no_failures() {
        let traffic = Traffic::default();
        let refused = std::io::Error::other("refused");
        let route = Route {
            source: ([10, 244, 1, 7], 40_112).into(),
            destination: ([10, 244, 2, 9], 15_008).into(),
            hbone: None,
            source_pod: None,
            destination_pod: None,
        };
        let of_source = [None, Some(Reason::DeniedByPeer), Some(Reason::Broken)];
        let of_destination = [None, Some(Reason::PolicyDenied)];
        let told = |reporter, reasons: &[Option<Reason>]| {
            for reason in reasons {
                let labels: Labels<Label<'_>> = Labels {
                    reporter,
                    security: Security::MutualTls,
                    source: Party::identified("web"),
                    destination: Party::default(),
                    service: ServiceName::default(),
                };
                let meter = traffic.open(&labels);
                meter.sent(10);
                let access = Access::open(meter, route.clone());
                access.close(reason.map(|reason| (reason, &refused as &dyn std::error::Error)));
            }
        };
        told(Reporter::Source, &of_source);
        told(Reporter::Destination, &of_destination);
        let edges: Vec<_> = edges(&traffic).into_values().collect();
        let expected = Edge {
            bytes: 30,
            opened: 3,
            denied: 1,
            failed: 1,
        };
        assert_eq!(edges, [expected]);
    }

    #[test]
    fn bytes_have_one_decimal() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
