//! One direction of a flow.

use std::task::{Context, Poll, ready};

use bytes::Buf;

use super::{Appetite, Buffers, Endpoint, Fault, Payload};

/// One direction.
#[derive(Default)]
pub(super) struct Lane {
    pending: Payload,
    appetite: Appetite,
    pub(super) state: State,
    pub(super) source: Source,
}

/// What is known of the endpoint that a lane reads from.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// More may come.
    #[default]
    Open,
    /// It came to its orderly end.
    Ended,
    /// It broke while it was written to: what it has sent may still be read, but no end of that is an orderly one.
    Failing,
    /// It broke.
    Broken,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Moving,
    /// No more bytes will come; the sink is to be told.
    Finishing,
    Done,
}

impl Lane {
    /// Moves what can be moved now.
    pub(super) fn run<S: Endpoint, T: Endpoint>(
        &mut self,
        turn: &mut Turn<'_, '_>,
        source: &mut S,
        sink: &mut T,
        mut tell: impl FnMut(Event),
    ) {
        let mut chunks = 0;
        loop {
            let step = match self.state {
                State::Moving if chunks == TURN => {
                    turn.cx.waker().wake_by_ref();
                    return;
                }
                State::Moving => self.step(turn, source, sink),
                State::Finishing => sink.poll_finish(turn.cx).map(|finished| {
                    self.state = State::Done;
                    finished.map(|()| 0).map_err(End::Sink)
                }),
                State::Done => return,
            };
            match step {
                Poll::Pending => return,
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(Ok(bytes)) => {
                    chunks += 1;
                    tell(Event::Moved(u64::try_from(bytes).unwrap_or(u64::MAX)));
                }
                Poll::Ready(Err(end)) => {
                    self.stop(&end, turn.reverse);
                    tell(Event::Ended(end));
                }
            }
        }
    }

    /// Moves one chunk.
    fn step<S: Endpoint, T: Endpoint>(
        &mut self,
        turn: &mut Turn<'_, '_>,
        source: &mut S,
        sink: &mut T,
    ) -> Poll<Result<usize, End>> {
        if !self.pending.has_remaining() {
            match source.poll_readable(turn.cx) {
                Poll::Pending if turn.reverse.state == State::Done => {
                    // Nothing is read from the sink any more, so only asking it tells of its end.
                    let fault = ready!(sink.poll_gone(turn.cx));
                    return Poll::Ready(Err(End::Sink(fault)));
                }
                Poll::Pending => return Poll::Pending,
                Poll::Ready(readable) => readable.map_err(End::Source)?,
            }
            ready!(sink.poll_room(turn.cx)).map_err(End::Sink)?;
            let taken = source.poll_take(turn.cx, &mut self.appetite, turn.buffers);
            match ready!(taken).map_err(End::Source)? {
                Some(payload) => self.pending = payload,
                None => return Poll::Ready(Err(End::Orderly)),
            }
        }
        let put = ready!(sink.poll_put(turn.cx, &mut self.pending)).map_err(End::Sink)?;
        source.release(put);
        if !self.pending.has_remaining() {
            self.pending = Payload::empty();
        }
        Poll::Ready(Ok(put))
    }

    /// Notes why no more bytes are moved, and what that means for the other lane.
    fn stop(&mut self, end: &End, reverse: &mut Self) {
        self.pending = Payload::empty();
        self.state = match end {
            End::Orderly if self.source != Source::Failing => {
                self.source = Source::Ended;
                State::Finishing
            }
            End::Source(Fault::Gone) => {
                // A side that ends its stream as a whole takes no bytes either.
                reverse.state = State::Done;
                self.source = Source::Ended;
                State::Finishing
            }
            End::Orderly | End::Source(_) => {
                reverse.state = State::Done;
                self.source = Source::Broken;
                State::Done
            }
            End::Sink(fault) => {
                reverse.source = match (fault, reverse.state) {
                    (Fault::Gone, _) => reverse.source,
                    (_, State::Moving) => Source::Failing,
                    (_, State::Finishing | State::Done) => Source::Broken,
                };
                State::Done
            }
        };
    }
}

/// What a poll of the pump passes down.
pub(super) struct Turn<'t, 'c> {
    pub(super) cx: &'t mut Context<'c>,
    pub(super) buffers: &'t Buffers,
    /// The other lane.
    pub(super) reverse: &'t mut Lane,
}

/// What happened in a lane.
pub(super) enum Event {
    Moved(u64),
    Ended(End),
}

/// Why a lane stopped moving bytes.
pub(super) enum End {
    /// Its source came to its end.
    Orderly,
    /// Its source reset or broke.
    Source(Fault),
    /// Its sink takes no more.
    Sink(Fault),
}

/// Chunks that one direction moves before it lets other tasks run.
const TURN: u8 = 16;
