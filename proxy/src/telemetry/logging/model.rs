//! The queue with each order in which its threads can run.

use loom::thread;

/// The source of the queue once more, on primitives that `loom` schedules.
#[path = "queue.rs"]
#[expect(
    dead_code,
    clippy::duplicate_mod,
    reason = "what is tried is what runs"
)]
mod queue;
mod sync;

use queue::Queue;
use sync::{Arc, Condvar, Mutex};

#[test]
fn every_record_is_written_and_the_end_is_told() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let (queue, written) = (Queue::default(), Arc::new(Written::default()));
        let writer = thread::spawn({
            let (queue, written) = (queue.clone(), Arc::clone(&written));
            move || {
                let mut batch = Vec::new();
                while queue.take(&mut batch) {
                    written.add(&mut batch);
                }
                queue.end();
            }
        });
        let other = thread::spawn({
            let queue = queue.clone();
            move || queue.push(b"a\n")
        });
        queue.push(b"b\n");
        other.join().unwrap();
        // No limit passes here: a writer that is not woken is a deadlock, which the model tells.
        let all = written.wait_for(4);
        queue.push(b"c\n");
        queue.stop();
        queue.wait_for_end(std::time::Duration::MAX);
        writer.join().unwrap();
        assert_eq!(
            (all, written.wait_for(6)),
            (b"\n\nab".to_vec(), b"\n\n\nabc".to_vec())
        );
        assert_eq!((queue.bytes(), queue.dropped().get()), (0, 0));
    });
}

/// What the writer has taken.
#[derive(Default)]
struct Written {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Written {
    fn add(&self, batch: &mut Vec<u8>) {
        self.bytes.lock().append(batch);
        self.more.notify_one();
    }

    /// So many bytes, once they are there, sorted.
    fn wait_for(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.bytes.lock();
        while bytes.len() < count {
            self.more.wait(&mut bytes);
        }
        let mut bytes = bytes.clone();
        bytes.sort_unstable();
        bytes
    }
}
