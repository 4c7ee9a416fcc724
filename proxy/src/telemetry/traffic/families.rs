//! The traffic families as text, and what the table tells about itself.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{Counters, Entry, Traffic};
use crate::telemetry::labels::{Reporter, ResponseFlag, Single};

impl Traffic {
    /// Writes the families that are counted by labels, as they are now, in `OpenMetrics` text. No lock is held while
    /// `out` takes it, so `out` may be slow.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let all: Vec<Reading> = self.0.table.all().into_iter().map(Reading::take).collect();
        for family in &FAMILIES {
            self.write_family(family, &all, out)?;
        }
        Ok(())
    }

    fn write_family(
        &self,
        Family { name, help, kind }: &Family,
        all: &[Reading],
        out: &mut impl fmt::Write,
    ) -> fmt::Result {
        let mut samples = all.iter().flat_map(|one| kind.samples(one)).peekable();
        if samples.peek().is_none() {
            return Ok(()); // a family without samples is left out
        }
        writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter")?;
        for (names, flag, value) in samples {
            write!(out, "{name}_total")?;
            names.write(self.0.settings.labels, flag, out)?;
            writeln!(out, " {value}")?;
        }
        Ok(())
    }
}

/// A series at one moment: what was opened and closed fits together, however long the writing takes.
struct Reading {
    entry: Arc<Entry<Counters>>,
    opened: u64,
    closed: u64,
    received: u64,
    sent: u64,
}

impl Reading {
    fn take(entry: Arc<Entry<Counters>>) -> Self {
        let counters = &entry.series;
        // Closed before opened: what opens in between is open then, not closed before it was opened.
        let closed = counters.closed.load(Relaxed);
        Self {
            closed,
            opened: counters.opened.load(Relaxed),
            received: counters.received.load(Relaxed),
            sent: counters.sent.load(Relaxed),
            entry,
        }
    }
}

/// One of the families over the table.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Opened,
    Closed,
    Received,
    Sent,
    Failed,
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "istio_tcp_connections_opened",
        help: "TCP connections opened.",
        kind: Kind::Opened,
    },
    Family {
        name: "istio_tcp_connections_closed",
        help: "TCP connections closed.",
        kind: Kind::Closed,
    },
    Family {
        name: "istio_tcp_received_bytes",
        help: "Bytes carried from client to server.",
        kind: Kind::Received,
    },
    Family {
        name: "istio_tcp_sent_bytes",
        help: "Bytes carried from server to client.",
        kind: Kind::Sent,
    },
    Family {
        name: "istio_tcp_connections_failed",
        help: "TCP connections that ended with a failure (unstable).",
        kind: Kind::Failed,
    },
];

impl Kind {
    /// The samples of one series in this family.
    fn samples(
        self,
        reading: &Reading,
    ) -> impl Iterator<Item = (&crate::telemetry::names::Names, ResponseFlag, u64)> {
        let (plain, flagged) = match self {
            Self::Opened => (Some(reading.opened), false),
            // Closings appear with the first one; the others exist from the opening on.
            Self::Closed => (Some(reading.closed).filter(|&closed| closed > 0), true),
            Self::Received => (Some(reading.received), false),
            Self::Sent => (Some(reading.sent), false),
            Self::Failed => (None, true),
        };
        let counters = &reading.entry.series;
        let failures = flagged.then(|| counters.failures()).into_iter().flatten();
        let plain = plain.map(|value| (ResponseFlag::None, value));
        plain
            .into_iter()
            .chain(failures)
            .map(|(flag, value)| (&counters.names, flag, value))
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_sockets(&mut encoder)?;
        let retries = self.0.retries.load(Relaxed);
        if retries > 0 {
            let help = "Attempts at another endpoint after one could not be reached (unstable).";
            count(&mut encoder, "istio_tcp_connection_retries", help, retries)?;
        }
        let without_tunnel = self.0.without_tunnel.load(Relaxed);
        if without_tunnel > 0 {
            let help = "Flows between two pods of this node without a tunnel (unstable).";
            count(
                &mut encoder,
                "culvert_same_node_flows",
                help,
                without_tunnel,
            )?;
        }
        self.encode_table(&mut encoder)?;
        self.0.refusals.encode(&mut encoder)
    }
}

impl Traffic {
    fn encode_sockets(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let seen = [Reporter::Source, Reporter::Destination].map(|reporter| {
            let sockets = self.0.sockets(reporter);
            // Closed first: a socket that opens in between then counts as open, not as minus one.
            let closed = sockets.closed.load(Relaxed);
            (reporter, sockets.opened.load(Relaxed), closed)
        });
        if seen.iter().all(|&(_, opened, _)| opened == 0) {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "istio_tcp_sockets_open",
            "Sockets accepted from or for workloads and still open (unstable).",
            None,
            MetricType::Gauge,
        )?;
        for (reporter, opened, closed) in seen.into_iter().filter(|&(_, opened, _)| opened > 0) {
            family
                .encode_family(&Single("reporter", reporter.as_str()))?
                .encode_gauge(&opened.saturating_sub(closed))?;
        }
        Ok(())
    }

    fn encode_table(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let table = &self.0.table;
        encoder
            .encode_descriptor(
                "culvert_traffic_series",
                "Label sets of traffic that are kept.",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&u64::try_from(table.len()).unwrap_or(u64::MAX))?;
        let help = "Label sets of traffic that were forgotten because no flow used them.";
        count(
            encoder,
            "culvert_traffic_series_evicted",
            help,
            table.evicted(),
        )?;
        let mut folded = encoder.encode_descriptor(
            "culvert_traffic_flows_folded",
            "Flows counted without their names because there were too many label sets.",
            None,
            MetricType::Counter,
        )?;
        for (into, flows) in ["namespace", "other"].into_iter().zip(&self.0.folded) {
            folded
                .encode_family(&Single("into", into))?
                .encode_counter::<NoLabelSet, _, u64>(&flows.load(Relaxed), None)?;
        }
        Ok(())
    }
}

/// A family of one counter.
fn count(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    encoder
        .encode_descriptor(name, help, None, MetricType::Counter)?
        .encode_counter::<NoLabelSet, _, u64>(&value, None)
}
