//! The PING loop that every connection runs, on both sides.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

use crate::config;

/// Asks the peer for a sign of life every so often, whatever the traffic; anything that comes is one.
pub(super) struct Keepalive {
    pings: PingPong,
    asked: bool,
    /// Bytes received when the wait for an answer began.
    heard: u64,
    timer: Pin<Box<Sleep>>,
    interval: Duration,
    limit: Duration,
}

impl Keepalive {
    /// The first PING goes out one interval from now.
    pub(super) fn new(pings: PingPong, config: &config::Tunnel) -> Self {
        Self {
            pings,
            asked: false,
            heard: 0,
            timer: Box::pin(sleep(config.ping_interval)),
            interval: config.ping_interval,
            limit: config.ping_timeout,
        }
    }

    /// Asks now, for the time of the round trip.
    pub(super) fn ask(&mut self) {
        if !self.asked && self.pings.send_ping(Ping::opaque()).is_ok() {
            self.asked = true;
            self.timer.as_mut().reset(Instant::now() + self.limit);
        }
    }

    /// Whether a question waits for its answer.
    pub(super) const fn is_waiting(&self) -> bool {
        self.asked
    }

    /// Ready when the peer is dead. Poll it from the task that drives the connection, which has `received` so many bytes so far.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>, received: u64) -> Poll<()> {
        loop {
            let wait = if self.asked {
                match self.pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.asked = false;
                        self.interval
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {
                        ready!(self.timer.as_mut().poll(cx));
                        if received == self.heard {
                            return Poll::Ready(());
                        }
                        self.heard = received;
                        self.limit
                    }
                }
            } else {
                ready!(self.timer.as_mut().poll(cx));
                if self.pings.send_ping(Ping::opaque()).is_err() {
                    return Poll::Ready(());
                }
                self.asked = true;
                self.heard = received;
                self.limit
            };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
    }
}
