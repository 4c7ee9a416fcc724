//! How short memory is, and who holds it.
//!
//! Memory belongs to the process as a whole, like the allocator, so there is one [`pressure`] for all: [`Watch`] sets it from what
//! is really resident, and whoever takes memory looks at it and takes less. What single pods hold ([`Shares`]) is an estimate,
//! good enough to tell the one that causes a shortage from those that suffer it.

mod share;
mod stir;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

pub use share::{Held, Owner, Share, Shares};
pub use stir::Stir;

/// How short memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(
    clippy::exhaustive_enums,
    reason = "whoever takes memory decides for each"
)]
pub enum Pressure {
    /// Not at all, or there is no budget.
    Calm,
    /// Most of the budget is used: what is given for speed is cut.
    Tight,
    /// Nearly all of it is used: who holds most gets nothing new.
    Critical,
}

impl Pressure {
    /// 0, 1 or 2: what the metric says, and in how many steps something is cut.
    #[must_use]
    pub const fn steps(self) -> u8 {
        match self {
            Self::Calm => 0,
            Self::Tight => 1,
            Self::Critical => 2,
        }
    }

    /// The level in one word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::Tight => "tight",
            Self::Critical => "critical",
        }
    }
}

/// How short memory is now. Costs one relaxed load.
#[must_use]
pub fn pressure() -> Pressure {
    match LEVEL.load(Relaxed) {
        0 => Pressure::Calm,
        1 => Pressure::Tight,
        _ => Pressure::Critical,
    }
}

/// Where it is noted that memory is being taken, for who looks how much of it is left.
pub static TAKING: Stir = Stir::new();

/// What was done because memory was short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Relief {
    /// A connection or stream was refused.
    FlowRefused,
    /// A connection was accepted later than it came.
    AcceptSlowed,
    /// A tunnel that nobody used was closed before its time.
    TunnelClosed,
    /// A label set that no flow used was forgotten before its time.
    SeriesEvicted,
}

impl Relief {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::FlowRefused,
        Self::AcceptSlowed,
        Self::TunnelClosed,
        Self::SeriesEvicted,
    ];

    /// The value of the label `relief`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FlowRefused => "flow_refused",
            Self::AcceptSlowed => "accept_slowed",
            Self::TunnelClosed => "tunnel_closed",
            Self::SeriesEvicted => "series_evicted",
        }
    }

    /// Counts it, so many times.
    pub fn count(self, times: u64) {
        self.counter().fetch_add(times, Relaxed);
    }

    /// How often it was done.
    #[must_use]
    pub fn counted(self) -> u64 {
        self.counter().load(Relaxed)
    }

    fn counter(self) -> &'static AtomicU64 {
        static COUNTERS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
        let [refused, slowed, tunnels, series] = &COUNTERS;
        match self {
            Self::FlowRefused => refused,
            Self::AcceptSlowed => slowed,
            Self::TunnelClosed => tunnels,
            Self::SeriesEvicted => series,
        }
    }
}

/// Holds what is resident against the budget.
#[derive(Debug)]
pub struct Watch {
    budget: u64,
    level: Pressure,
}

impl Watch {
    /// Watches over `budget` bytes.
    #[must_use]
    pub const fn new(budget: u64) -> Self {
        Self {
            budget,
            level: Pressure::Calm,
        }
    }

    /// Takes in that so many bytes are resident, and tells everybody how short memory is.
    pub fn look(&mut self, resident: u64) -> Pressure {
        let next = self.next(resident);
        if next != self.level {
            let (was, now) = (self.level.as_str(), next.as_str());
            if next > self.level {
                tracing::warn!(was, now, resident, budget = self.budget, "memory is short");
            } else {
                tracing::info!(
                    was,
                    now,
                    resident,
                    budget = self.budget,
                    "memory is less short"
                );
            }
        }
        self.level = next;
        LEVEL.store(next.steps(), Relaxed);
        next
    }

    /// A level is left well below where it is entered, so that it does not flicker.
    fn next(&self, resident: u64) -> Pressure {
        let above = |percent| resident >= self.budget / 100 * percent;
        let (tight, critical) = match self.level {
            Pressure::Calm => (above(75), above(90)),
            Pressure::Tight => (above(65), above(90)),
            Pressure::Critical => (above(65), above(80)),
        };
        match (tight, critical) {
            (_, true) => Pressure::Critical,
            (true, false) => Pressure::Tight,
            (false, false) => Pressure::Calm,
        }
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_entered_high_and_left_low() {
        use Pressure::{Calm, Critical, Tight};
        let mut watch = Watch::new(1000);
        for (resident, expected) in [
            (700, Calm),
            (749, Calm),
            (750, Tight),
            (700, Tight),
            (649, Calm),
            (899, Tight),
            (900, Critical),
            (801, Critical),
            (799, Tight),
            (5000, Critical),
            (0, Calm),
        ] {
            watch.level = watch.next(resident);
            assert_eq!(watch.level, expected, "{resident}");
        }
    }
}
