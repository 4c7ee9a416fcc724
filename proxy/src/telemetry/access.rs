//! The access log: one line when a flow opens, one when it ends, one for each early rejection.

mod choice;

use std::{
    error::Error,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tracing::{
    Level,
    field::{DisplayValue, display},
};

use super::{
    Reason, Trace, Traffic,
    labels::{Kept, Reporter, Security},
    refusals::{Phase, Refusal, in_words},
    route::{HboneTarget, Route},
    traffic::{Meter, Watch},
};
use choice::Told;

/// Reports one flow: `connection opened` when made, `connection complete` when it ends, and the
/// closing of its [`Meter`], which also holds the names, identities and byte counts it tells.
///
/// Dropping it without [`Access::close`] reports a cancelled flow, so that every exit is told.
#[derive(Debug)]
#[must_use = "dropping the record reports the flow as cancelled"]
pub struct Access {
    meter: Meter,
    route: Route,
    told: Told,
    /// Its place among the flows whose progress is told.
    lasting: Option<usize>,
    reported: bool,
    trace: Trace,
    without_tunnel: bool,
}

/// What the lines of a flow are made of.
struct Line<'a> {
    flow: &'a Watch,
    route: &'a Route,
    /// How the bytes go, where that is not the usual way.
    path: Option<&'static str>,
}

/// One line with the fields that every access line has, then the given ones.
macro_rules! access_line {
    ($level:expr, $message:literal, $line:ident, { $($extra:tt)* }) => {{
        let (labels, route) = ($line.flow.labels(), $line.route);
        let (source, destination) = (&labels.source, &labels.destination);
        tracing::event!(
            target: "access",
            parent: None,
            $level,
            {
                src.addr = %route.source,
                src.workload = pod(&route.source_pod, &source.canonical_service),
                src.namespace = source.namespace.as_deref(),
                src.identity = $line.proven(&source.principal),
                src.cluster = source.cluster.as_deref(),
                dst.addr = %route.destination,
                dst.hbone_addr = hbone(route),
                dst.service = labels.service.hostname.as_deref(),
                dst.workload = pod(&route.destination_pod, &destination.canonical_service),
                dst.namespace = destination.namespace.as_deref(),
                dst.identity = $line.proven(&destination.principal),
                dst.cluster = destination.cluster.as_deref(),
                direction = labels.reporter.direction(),
                $($extra)*
            },
            $message
        )
    }};
}

impl Access {
    /// Logs `connection opened` (debug), if the settings tell of this flow.
    pub fn open(meter: Meter, route: Route) -> Self {
        let flow = meter.flow();
        let settings = flow.traffic().access_log();
        let told = Told::choose(settings, flow.labels(), choice::percent);
        let lasts = told == Told::All && settings.progress.is_some();
        let lasting = lasts.then(|| flow.traffic().lasting().enter(flow.clone(), route.clone()));
        let access = Self {
            meter,
            route,
            told,
            lasting,
            reported: false,
            trace: Trace::default(),
            without_tunnel: false,
        };
        if told == Told::All {
            access.line().opened();
        }
        access
    }

    /// Says that the flow goes from socket to socket within the node, where others would take a tunnel.
    pub fn without_tunnel(&mut self) {
        self.without_tunnel = true;
    }

    /// The counters of the flow.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Has the flow's span told with it.
    pub fn traced(&mut self, trace: Trace) {
        self.trace = trace;
    }

    /// The flow's span.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Ends the flow. With a `failure`, whose causes are logged too, it counts as failed.
    pub fn close(mut self, failure: Option<(Reason, &(dyn Error + 'static))>) {
        self.report(failure);
    }

    fn report(&mut self, failure: Option<(Reason, &(dyn Error + 'static))>) {
        self.reported = true;
        if let Some(key) = self.lasting {
            self.meter.flow().traffic().lasting().leave(key);
        }
        let (bytes, names) = (self.line().bytes(), self.meter.flow().labels());
        self.trace.close(names, &self.route, bytes, failure);
        let Some((reason, error)) = failure else {
            if self.told == Told::All {
                self.line().complete();
            }
            return;
        };
        self.meter.end_with(reason);
        if self.told != Told::Nothing {
            self.line().failed(reason, error);
        }
        // An end that was asked for is no failure.
        if reason != Reason::Drained {
            self.meter
                .flow()
                .traffic()
                .refusals()
                .tell(self.refusal(reason, error));
        }
    }

    /// What was asked for behind the address that was dialled.
    fn wanted(&self) -> SocketAddr {
        match self.route.hbone {
            Some(HboneTarget::Address(target)) => target,
            Some(HboneTarget::Host(..)) | None => self.route.destination,
        }
    }

    fn refusal(&self, reason: Reason, error: &(dyn Error + 'static)) -> Refusal {
        let labels = self.meter.flow().labels();
        let named = |pod: &Option<Arc<str>>| pod.clone().filter(|name| !name.is_empty());
        Refusal {
            at: SystemTime::now(),
            reporter: labels.reporter,
            phase: Phase::Opened,
            source: self.route.source,
            destination: Some(self.wanted()),
            source_pod: named(&self.route.source_pod),
            destination_name: labels
                .service
                .hostname
                .clone()
                .or_else(|| named(&self.route.destination_pod)),
            reason,
            error: in_words(error),
        }
    }

    fn line(&self) -> Line<'_> {
        Line {
            flow: self.meter.flow(),
            route: &self.route,
            path: self.without_tunnel.then_some("same-node"),
        }
    }
}

impl Line<'_> {
    fn opened(&self) {
        access_line!(Level::DEBUG, "connection opened", self, {});
    }

    fn progress(&self) {
        access_line!(Level::INFO, "connection progress", self, {
            bytes_sent = self.bytes().0,
            bytes_recv = self.bytes().1,
            duration = self.duration().as_str(),
        });
    }

    fn complete(&self) {
        access_line!(Level::INFO, "connection complete", self, {
            bytes_sent = self.bytes().0,
            bytes_recv = self.bytes().1,
            duration = self.duration().as_str(),
            path = self.path,
        });
    }

    fn failed(&self, reason: Reason, error: &(dyn Error + 'static)) {
        access_line!(Level::ERROR, "connection complete", self, {
            bytes_sent = self.bytes().0,
            bytes_recv = self.bytes().1,
            duration = self.duration().as_str(),
            error,
            reason = reason.as_str(),
            path = self.path,
        });
    }

    fn duration(&self) -> Millis {
        Millis::of(self.flow.opened().elapsed())
    }

    /// (sent, received) as the local workload sees them: the metrics count by who is client.
    fn bytes(&self) -> (u64, u64) {
        let (to_server, to_client) = self.flow.totals();
        match self.flow.labels().reporter {
            Reporter::Source => (to_server, to_client),
            Reporter::Destination => (to_client, to_server),
        }
    }

    /// `value`, if the peers proved their identities.
    fn proven<'a>(&self, value: &'a Kept) -> Option<&'a str> {
        match self.flow.labels().security {
            Security::MutualTls => value.as_deref(),
            Security::Unknown => None,
        }
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        if !self.reported {
            let (reason, why) = if std::thread::panicking() {
                (Reason::Internal, Cancelled::Panic)
            } else {
                (Reason::Drained, Cancelled::Drain)
            };
            self.report(Some((reason, &why)));
        }
    }
}

/// A connection that does not become a flow.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// Which side of the connection this proxy is.
    pub reporter: Reporter,
    /// Who connected.
    pub source: SocketAddr,
    /// What was wanted; `None` if that could not be read.
    pub destination: Option<SocketAddr>,
}

impl Traffic {
    /// Logs `connection failed` (warn) for a connection that was refused before it became a flow. It is counted by its
    /// reason, and by no `istio_tcp_*` family.
    pub fn reject(&self, attempt: Attempt, reason: Reason, error: &(dyn Error + 'static)) {
        let Attempt {
            reporter,
            source,
            destination,
        } = attempt;
        tracing::event!(
            target: "access",
            parent: None,
            Level::WARN,
            {
                src.addr = %source,
                dst.addr = destination.map(display),
                direction = reporter.direction(),
                error,
            },
            "connection failed"
        );
        self.refusals().tell(Refusal {
            at: SystemTime::now(),
            reporter,
            phase: Phase::Early,
            source,
            destination,
            source_pod: None,
            destination_name: None,
            reason,
            error: in_words(error),
        });
    }
}

fn pod<'a>(name: &'a Option<Arc<str>>, service: &'a Kept) -> Option<&'a str> {
    let name = name.as_deref().filter(|name| !name.is_empty());
    name.or(service.as_deref())
}

fn hbone(route: &Route) -> Option<DisplayValue<&HboneTarget>> {
    route.hbone.as_ref().map(display)
}

/// Why a flow was dropped instead of closed.
#[derive(Debug, thiserror::Error)]
enum Cancelled {
    #[error("connection closed due to connection drain")]
    Drain,
    #[error("connection closed due to an internal error")]
    Panic,
}

/// A duration in whole milliseconds, as text without an allocation.
struct Millis {
    digits: [u8; 24],
    len: usize,
}

impl Millis {
    fn of(duration: Duration) -> Self {
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let mut text = Self {
            digits: [0; 24],
            len: 0,
        };
        let mut rest = text.digits.as_mut_slice();
        // 20 digits and the unit always fit.
        let written = std::io::Write::write_fmt(&mut rest, format_args!("{millis}ms"));
        let left = rest.len();
        if written.is_ok() {
            text.len = text.digits.len() - left;
        }
        text
    }

    fn as_str(&self) -> &str {
        let text = self.digits.get(..self.len).unwrap_or_default();
        std::str::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
