//! The two directions of a flow in one small future.

use std::{
    error::Error,
    fmt,
    mem::replace,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Sleep, sleep},
};

use super::{
    Buffers, Endpoint, Fault, Leave,
    lane::{End, Event, Lane, Source, State, Turn},
    tcp::stay_tracked,
};
use crate::telemetry::Meter;

/// How long an endpoint of an ended flow may take to deliver what was put there.
const LONGEST_LEAVE: Duration = Duration::from_secs(2);

/// Where moved bytes are counted.
pub trait Count {
    /// `bytes` went from downstream to upstream.
    fn received(&self, bytes: u64);
    /// `bytes` went from upstream to downstream.
    fn sent(&self, bytes: u64);
}

impl Count for Meter {
    fn received(&self, bytes: u64) {
        Self::received(self, bytes);
    }

    fn sent(&self, bytes: u64) {
        Self::sent(self, bytes);
    }
}

/// A side of a flow: downstream opened it, upstream was dialled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a flow has two sides")]
pub enum Side {
    /// Who opened the flow.
    Downstream,
    /// Whom the flow was opened to.
    Upstream,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Downstream => "downstream",
            Self::Upstream => "upstream",
        })
    }
}

/// How a flow ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// The side that ended it: whose fault it was, or else whose direction ended first.
    pub ended_by: Side,
    /// In which way.
    pub ending: Ending,
}

/// The way a flow ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum Ending {
    /// Both directions came to their orderly end.
    Clean,
    /// A side gave up (TCP reset, `CONNECT_ERROR`, `CANCEL`): no error, though bytes may be missing.
    Reset,
    /// A side broke, with the text for the access log.
    Failed(Box<dyn Error + Send + Sync>),
}

/// Moves bytes both ways between `downstream` and `upstream` until both directions have ended.
///
/// # Cancel safety
/// Dropping the future drops both endpoints: sockets close, an unfinished stream is reset.
pub fn pump<'a, D, U, C>(
    downstream: D,
    upstream: U,
    count: &'a C,
    buffers: &'a Buffers,
) -> Pump<'a, D, U, C>
where
    D: Endpoint + Unpin,
    U: Endpoint + Unpin,
    C: Count,
{
    Pump {
        downstream,
        upstream,
        inward: Lane::default(),
        outward: Lane::default(),
        count,
        buffers,
        outcome: None,
        is_half_closed: false,
        leaving: None,
    }
}

/// The future of [`pump`].
#[must_use = "a pump does nothing unless awaited"]
pub struct Pump<'a, D, U, C> {
    downstream: D,
    upstream: U,
    /// Downstream to upstream.
    inward: Lane,
    /// Upstream to downstream.
    outward: Lane,
    count: &'a C,
    buffers: &'a Buffers,
    outcome: Option<Outcome>,
    /// Whether one direction has ended, and the sockets know.
    is_half_closed: bool,
    /// The limit of the leave, once an endpoint needs time for it.
    leaving: Option<Pin<Box<Sleep>>>,
}

impl<D: Endpoint, U: Endpoint, C> Pump<'_, D, U, C> {
    /// The connections of downstream and upstream, as far as they are the flow's own; also after its end.
    pub fn sockets(&self) -> [Option<&TcpStream>; 2] {
        [self.downstream.socket(), self.upstream.socket()]
    }
}

impl<D, U, C> fmt::Debug for Pump<'_, D, U, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pump")
            .field("inward", &self.inward.state)
            .field("outward", &self.outward.state)
            .finish_non_exhaustive()
    }
}

impl<D, U, C> Future for Pump<'_, D, U, C>
where
    D: Endpoint + Unpin,
    U: Endpoint + Unpin,
    C: Count,
{
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let this = self.get_mut();
        let (down, up, count) = (&mut this.downstream, &mut this.upstream, this.count);
        let (inward, outward) = (&mut this.inward, &mut this.outward);
        let (outcome, buffers) = (&mut this.outcome, this.buffers);
        let mut turn = Turn {
            cx,
            buffers,
            reverse: outward,
        };
        inward.run(&mut turn, down, up, |event| {
            match event {
                Event::Moved(bytes) => count.received(bytes),
                Event::Ended(end) => end.settle(outcome, Side::Downstream, Side::Upstream),
            };
        });
        let mut turn = Turn {
            cx,
            buffers,
            reverse: inward,
        };
        outward.run(&mut turn, up, down, |event| {
            match event {
                Event::Moved(bytes) => count.sent(bytes),
                Event::Ended(end) => end.settle(outcome, Side::Upstream, Side::Downstream),
            };
        });
        match (inward.state, outward.state) {
            (State::Done, State::Done) => {}
            (State::Done, _) | (_, State::Done) => {
                if !replace(&mut this.is_half_closed, true) {
                    this.sockets().into_iter().flatten().for_each(stay_tracked);
                    if this.outward.state == State::Done {
                        // The other lane ran before, and so has not asked its sink whether that is gone.
                        cx.waker().wake_by_ref();
                    }
                }
                return Poll::Pending;
            }
            _ => return Poll::Pending,
        }
        ready!(this.poll_leave(cx));
        Poll::Ready(this.outcome.take().unwrap_or(Outcome {
            ended_by: Side::Downstream,
            ending: Ending::Clean,
        }))
    }
}

impl<D: Endpoint, U: Endpoint, C> Pump<'_, D, U, C> {
    /// Lets both endpoints deliver what was put there, within a limit.
    fn poll_leave(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let broken = [&self.inward, &self.outward].map(|lane| lane.source == Source::Broken);
        let leave = |lane: &Lane| match lane.source {
            _ if broken.contains(&true) => Leave::Reset,
            Source::Ended => Leave::Ended,
            Source::Open | Source::Failing | Source::Broken => Leave::Early,
        };
        let (down, up) = (leave(&self.inward), leave(&self.outward));
        loop {
            let limit = self.leaving.as_mut();
            let late = limit.is_some_and(|limit| limit.as_mut().poll(cx).is_ready());
            let down = self.downstream.poll_leave(cx, down, self.buffers, late);
            let up = self.upstream.poll_leave(cx, up, self.buffers, late);
            if down.is_ready() && up.is_ready() {
                return Poll::Ready(());
            }
            if self.leaving.is_some() {
                return Poll::Pending;
            }
            self.leaving = Some(Box::pin(sleep(LONGEST_LEAVE)));
        }
    }
}

impl End {
    /// The first end decides the outcome, a failure overrides what is no failure.
    fn settle(self, outcome: &mut Option<Outcome>, source: Side, sink: Side) {
        let (ended_by, ending) = match self {
            Self::Orderly => (source, Ending::Clean),
            Self::Source(Fault::Gone | Fault::Reset) => (source, Ending::Reset),
            Self::Source(Fault::Failed(error)) => (source, Ending::Failed(error)),
            Self::Sink(Fault::Gone | Fault::Reset) => (sink, Ending::Reset),
            Self::Sink(Fault::Failed(error)) => (sink, Ending::Failed(error)),
        };
        let rank = |ending: &Ending| match ending {
            Ending::Clean => 0,
            Ending::Reset => 1,
            Ending::Failed(_) => 2,
        };
        if outcome
            .as_ref()
            .is_none_or(|held| rank(&held.ending) < rank(&ending))
        {
            *outcome = Some(Outcome { ended_by, ending });
        }
    }
}
