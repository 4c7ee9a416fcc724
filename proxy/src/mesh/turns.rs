//! A lock for a value that many look at all the time, and that one writer changes in many short turns.
//!
//! Who holds a lock may lose the processor, and on a busy node it is tens of milliseconds until it is back: so long does
//! everybody wait who wants the lock, and the worker threads of all connections with them. That cannot be forbidden, but made
//! rare. A thread that was asleep has a full slice of time before it, so the writer sleeps before each turn, and a turn takes a
//! hundredth of a slice. Who finds the lock taken looks again for as long as a turn lasts, because giving up the processor would
//! cost a place in the scheduler's queue, too.

use std::{hint::spin_loop, time::Duration};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The value and its lock.
#[derive(Debug)]
pub(super) struct Turns<T>(RwLock<T>);

impl<T> Turns<T> {
    pub(super) fn new(value: T) -> Self {
        Self(RwLock::new(value))
    }

    /// The value, for a short look.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, T> {
        for _ in 0..LOOKS {
            if let Some(value) = self.0.try_read() {
                return value;
            }
            for _ in 0..SPINS {
                spin_loop();
            }
        }
        self.0.read()
    }

    /// One short change; readers that wait come before the next.
    pub(super) fn write<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut value = self.0.write();
        let result = change(&mut value);
        RwLockWriteGuard::unlock_fair(value);
        result
    }

    /// Lets others go on before the next of many turns. Blocks the thread: not for the workers of a runtime.
    #[expect(
        clippy::disallowed_methods,
        reason = "a pause of the thread is what is wanted"
    )]
    pub(super) fn pause() {
        std::thread::sleep(PAUSE);
    }
}

/// How often a reader looks before it waits: together with [`SPINS`] some 50 µs, which is longer than a turn.
const LOOKS: u32 = 100;
const SPINS: u32 = 32;
/// The shortest that there is; the kernel makes some 60 µs of it.
const PAUSE: Duration = Duration::from_micros(1);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn readers_and_a_writer_take_turns() {
        let (value, done) = (Turns::new((0_u64, 0_u64)), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let readers = [(), ()].map(|()| {
                scope.spawn(|| {
                    let mut seen = Vec::new();
                    while !done.load(Ordering::Acquire) {
                        let (one, two) = *value.read();
                        assert_eq!(one, two, "half of a change");
                        seen.push(one);
                    }
                    seen
                })
            });
            for _ in 0..500 {
                value.write(|(one, two)| {
                    *one += 1;
                    *two += 1;
                });
                Turns::<()>::pause();
            }
            done.store(true, Ordering::Release);
            for reader in readers {
                let mut seen = reader.join().unwrap();
                assert!(seen.is_sorted());
                seen.dedup();
                assert!(seen.len() > 1, "readers come in between");
            }
        });
        assert_eq!(*value.read(), (500, 500));
    }

    #[test]
    fn a_reader_waits_for_a_turn_however_long_it_is() {
        let value = Turns::new(0);
        let (began_tx, began_rx) = std::sync::mpsc::channel();
        let (go_tx, go_rx) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let value = &value;
            scope.spawn(move || {
                value.write(|held| {
                    began_tx.send(()).unwrap();
                    go_rx.recv().unwrap();
                    *held = 1;
                });
            });
            began_rx.recv().unwrap();
            let reader = scope.spawn(|| *value.read());
            go_tx.send(()).unwrap();
            assert_eq!(reader.join().unwrap(), 1);
        });
    }
}
