//! One direction of a flow.
//!
//! A lane belongs to the task of its flow, which polls both; nothing of it is shared but the pools of buffers and pipes, behind
//! a lock. So there is no synchronisation to try.

use std::task::{Context, Poll, ready};

use bytes::Buf;

use tokio::net::TcpStream;

use super::{
    Appetite, Buffers, Endpoint, Fault, Payload,
    pipe::{Pipe, is_unsupported},
    tcp::{read_fault, write_fault},
};

/// One direction.
#[derive(Default)]
pub(super) struct Lane {
    pending: Pending,
    appetite: Appetite,
    pace: Pace,
    pub(super) state: State,
    pub(super) source: Source,
}

/// Bytes that the sink has not taken yet.
enum Pending {
    Read(Payload),
    Piped(Pipe),
}

impl Default for Pending {
    fn default() -> Self {
        Self::Read(Payload::empty())
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        match self {
            Self::Read(payload) => !payload.has_remaining(),
            Self::Piped(pipe) => pipe.is_empty(),
        }
    }
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
        let mut moved = 0;
        loop {
            let step = match self.state {
                State::Moving if moved >= TURN => {
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
                    moved += bytes.max(SMALL);
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
        if self.pending.is_empty() {
            self.pending = ready!(self.fetch(turn, source, sink))?;
        }
        let put = match &mut self.pending {
            Pending::Read(payload) => ready!(sink.poll_put(turn.cx, payload)),
            Pending::Piped(pipe) => ready!(drain(pipe, turn, sink)),
        };
        let put = put.map_err(End::Sink)?;
        source.release(put);
        if self.pending.is_empty() {
            self.pending = Pending::default();
        }
        Poll::Ready(Ok(put))
    }

    /// Gets the next chunk, or learns while there is none that the sink wants none.
    fn fetch<S: Endpoint, T: Endpoint>(
        &mut self,
        turn: &mut Turn<'_, '_>,
        source: &mut S,
        sink: &mut T,
    ) -> Poll<Result<Pending, End>> {
        let fetched = self.try_fetch(turn, source, sink);
        if fetched.is_pending() && turn.reverse.state == State::Done {
            // Nothing is read from the sink any more, so only asking it tells of its end.
            let fault = ready!(sink.poll_gone(turn.cx));
            return Poll::Ready(Err(End::Sink(fault)));
        }
        fetched
    }

    /// Gets the next chunk.
    fn try_fetch<S: Endpoint, T: Endpoint>(
        &mut self,
        turn: &mut Turn<'_, '_>,
        source: &mut S,
        sink: &mut T,
    ) -> Poll<Result<Pending, End>> {
        ready!(source.poll_readable(turn.cx)).map_err(End::Source)?;
        ready!(sink.poll_room(turn.cx)).map_err(End::Sink)?;
        if self.pace.splices()
            && let (Some(from), Some(to)) = (source.socket(), sink.socket())
            && let Some(pipe) = ready!(self.splice(turn, from, to))?
        {
            return Poll::Ready(Ok(Pending::Piped(pipe)));
        }
        let wanted = self.appetite.bytes();
        match ready!(source.poll_take(turn.cx, &mut self.appetite, turn.buffers)) {
            Ok(Some(payload)) => {
                self.pace.read(payload.remaining(), wanted);
                Poll::Ready(Ok(Pending::Read(payload)))
            }
            Ok(None) => Poll::Ready(Err(End::Orderly)),
            Err(fault) => Poll::Ready(Err(End::Source(fault))),
        }
    }

    /// Gets the next chunk into a pipe. `None` if a read has to get it: where there is no pipe to be had, or nothing for it.
    fn splice(
        &mut self,
        turn: &mut Turn<'_, '_>,
        from: &TcpStream,
        to: &TcpStream,
    ) -> Poll<Result<Option<Pipe>, End>> {
        // A full sink is waited for without a pipe. What is wrong with it, the next chunk tells.
        let _ = ready!(to.poll_write_ready(turn.cx));
        let Some(mut pipe) = Pipe::take(turn.buffers) else {
            self.pace = Pace::default();
            return Poll::Ready(Ok(None));
        };
        match pipe.fill(from) {
            Ok(0) => Poll::Ready(Ok(None)),
            Ok(bytes) => {
                self.pace.spliced(bytes);
                Poll::Ready(Ok(Some(pipe)))
            }
            Err(error) if is_unsupported(&error) => {
                self.pace = Pace::default();
                Poll::Ready(Ok(None))
            }
            Err(error) => Poll::Ready(Err(End::Source(read_fault(error)))),
        }
    }

    /// Notes why no more bytes are moved, and what that means for the other lane.
    fn stop(&mut self, end: &End, reverse: &mut Self) {
        self.pending = Pending::default();
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

fn drain<T: Endpoint>(
    pipe: &mut Pipe,
    turn: &mut Turn<'_, '_>,
    sink: &T,
) -> Poll<Result<usize, Fault>> {
    // Only what goes from socket to socket is in a pipe.
    let Some(socket) = sink.socket() else {
        return Poll::Ready(Err(Fault::Gone));
    };
    let put = ready!(pipe.poll_drain(turn.cx, socket)).map_err(write_fault)?;
    if put == 0 {
        return Poll::Ready(Err(Fault::Gone));
    }
    turn.buffers.note_spliced(u64::try_from(put).unwrap_or(0));
    Poll::Ready(Ok(put))
}

/// Whether a direction splices, where it can: bulk costs less that way, a small exchange more, for it takes three system calls
/// instead of two.
#[derive(Debug, Default, Clone, Copy)]
struct Pace {
    splices: bool,
    /// Chunks in a row that speak for the other way.
    against: u8,
}

/// Reads in a row that fill their buffers, before a direction splices: 84 KiB of a new flow.
const FULL_READS: u8 = 3;

/// A lean chunk, in bytes.
const LEAN: usize = 32 << 10;

/// Lean chunks in a row, before a direction reads again.
const LEAN_CHUNKS: u8 = 2;

impl Pace {
    const fn splices(self) -> bool {
        self.splices
    }

    /// Learns from a read.
    fn read(&mut self, got: usize, wanted: usize) {
        if !self.splices {
            self.learn(got >= wanted, FULL_READS);
        }
    }

    /// Learns from a chunk that was spliced.
    fn spliced(&mut self, got: usize) {
        self.learn(got < LEAN, LEAN_CHUNKS);
    }

    fn learn(&mut self, against: bool, patience: u8) {
        self.against = if against { self.against + 1 } else { 0 };
        if self.against >= patience {
            self.splices = !self.splices;
            self.against = 0;
        }
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

/// Bytes that one direction moves before it lets other tasks run: about a millisecond.
const TURN: usize = 4 << 20;

/// A chunk costs a turn as much as one of this many bytes at least.
const SMALL: usize = TURN / 16;
