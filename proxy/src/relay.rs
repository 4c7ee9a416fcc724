//! Moves bytes between two endpoints until both directions have ended.
//!
//! `flow` calls [`pump`] once a flow is allowed and both its sides are connected; `tunnel` makes
//! its streams an [`Endpoint`]. The promises: the two directions are independent and end by
//! half-close; an idle flow holds no buffer (a few hundred bytes of future and nothing else); a
//! chunk is read once and handed on without a copy; a source is told of bytes only after the sink
//! took them, so back-pressure reaches the sender; a side that breaks is seen to break on the other
//! side, never as an orderly end, and after the bytes that came before.

mod buffer;
mod lane;
mod pipe;
mod pump;
mod sys;
mod tcp;
#[cfg(test)]
mod tests;

use std::{
    error::Error,
    task::{Context, Poll},
};

use tokio::net::TcpStream;

pub use self::{
    buffer::{Appetite, Buffer, Buffers, Payload},
    pump::{Count, Ending, Outcome, Pump, Side, pump},
    tcp::Socket,
};

/// What ended a direction other than the orderly end of its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The far end wants no more of this flow; the other side sees an orderly end.
    #[error("closed by the peer")]
    Gone,
    /// The far end reset the flow; so will the other side.
    #[error("reset by the peer")]
    Reset,
    /// The endpoint broke; the other side is reset, and the text goes to the access log.
    #[error(transparent)]
    Failed(Box<dyn Error + Send + Sync>),
}

/// One side of a flow: a TCP socket or a tunnel stream.
///
/// All methods are called from one task. A method that returns `Pending` has registered that task.
pub trait Endpoint {
    /// The connection, if this end is one and nothing more: its bytes are those of the flow.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }

    /// Whether [`Self::poll_take`] is worth a call; costs no buffer.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;

    /// The next bytes, `None` at the end of the stream. Takes a buffer of the size that
    /// `appetite` asks for, and gives it back at once when there is nothing to read.
    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        appetite: &mut Appetite,
        buffers: &Buffers,
    ) -> Poll<Result<Option<Payload>, Fault>>;

    /// Whether bytes may be put here now.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;

    /// Takes bytes off the front of `payload`, at least one when ready, and tells how many.
    fn poll_put(
        &mut self,
        cx: &mut Context<'_>,
        payload: &mut Payload,
    ) -> Poll<Result<usize, Fault>>;

    /// Ends the direction towards this endpoint, after all that was put.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;

    /// `bytes` that came from here have reached the other side.
    fn release(&mut self, bytes: usize);

    /// Ready, with the reason, once nothing can be put here any more. Asked only after the direction
    /// *from* here ended, when no read would tell.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Fault>;

    /// Takes leave, after both directions have ended. Ready when the endpoint may be dropped. May be
    /// called again after that; once `late`, it is ready at once.
    fn poll_leave(
        &mut self,
        cx: &mut Context<'_>,
        leave: Leave,
        buffers: &Buffers,
        late: bool,
    ) -> Poll<()>;
}

/// How a flow takes leave of one of its endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "every endpoint knows all of them")]
pub enum Leave {
    /// Both directions came to their orderly end.
    Ended,
    /// What still comes from here is wanted by nobody; what was put here is to arrive.
    Early,
    /// The other side broke: the far end is to see a reset, after what was put here.
    Reset,
}
