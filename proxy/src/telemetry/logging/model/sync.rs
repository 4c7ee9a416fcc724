//! The primitives of `loom` as those of `parking_lot` look.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use loom::{sync, thread};

pub(super) use loom::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct Mutex<T>(sync::Mutex<T>);

/// Holds its lock, but for moments within a wait.
pub(super) struct Guard<'a, T> {
    mutex: &'a sync::Mutex<T>,
    held: Option<sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(super) fn lock(&self) -> Guard<'_, T> {
        Guard {
            mutex: &self.0,
            held: Some(self.0.lock().unwrap()),
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().unwrap()
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().unwrap()
    }
}

#[derive(Debug, Default)]
pub(super) struct Condvar(sync::Condvar);

impl Condvar {
    pub(super) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(super) fn notify_all(&self) {
        self.0.notify_all();
    }

    pub(super) fn wait<T>(&self, guard: &mut Guard<'_, T>) {
        let held = guard.held.take().unwrap();
        guard.held = Some(self.0.wait(held).unwrap());
    }

    /// The time is over as soon as others had a turn.
    pub(super) fn wait_for<T>(&self, guard: &mut Guard<'_, T>, _: Duration) {
        drop(guard.held.take());
        thread::yield_now();
        guard.held = Some(guard.mutex.lock().unwrap());
    }

    /// The time is never over.
    pub(super) fn wait_while_for<T>(
        &self,
        guard: &mut Guard<'_, T>,
        mut condition: impl FnMut(&mut T) -> bool,
        _: Duration,
    ) {
        while condition(guard) {
            self.wait(guard);
        }
    }
}
