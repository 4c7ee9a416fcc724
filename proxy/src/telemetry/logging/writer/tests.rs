use super::{super::queue::QUEUE_BYTES, *};
use std::{
    io::Read,
    os::fd::OwnedFd,
    sync::mpsc::{self, Receiver},
};

/// Passes each write on.
struct Tap(mpsc::Sender<Vec<u8>>);

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn tapped() -> (Writer, Receiver<Vec<u8>>) {
    let (tx, rx) = mpsc::channel();
    (Writer::spawn(Tap(tx)).unwrap(), rx)
}

#[test]
fn records_come_out_in_order_and_all_at_the_end() {
    let (writer, written) = tapped();
    let queue = writer.queue();
    let mut expected = Vec::new();
    for i in 0..10_000 {
        let record = format!("record {i}\n");
        queue.push(record.as_bytes());
        expected.extend_from_slice(record.as_bytes());
    }
    drop(writer);
    let all: Vec<Vec<u8>> = written.try_iter().collect();
    assert_eq!(all.concat(), expected);
    assert!(all.len() < 1_000, "{} writes are not coalesced", all.len());
    assert_eq!(queue.dropped().get(), 0);
}

#[test]
fn an_idle_writer_wakes_up() {
    let (_writer, written) = tapped();
    let queue = _writer.queue();
    for _ in 0..3 {
        queue.push(b"x\n");
        let got = written.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(got, b"x\n");
    }
}

#[test]
fn a_stalled_output_never_stalls_who_logs() {
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    let writer = Writer::spawn(std::fs::File::from(write)).unwrap();
    let queue = writer.queue();
    let record = [b"a".repeat(1023), b"\n".to_vec()].concat();
    let total = 3 * QUEUE_BYTES / record.len();
    let (done_tx, done) = mpsc::channel();
    let emitter = queue.clone();
    let bytes = record.clone();
    let thread = thread::spawn(move || {
        (0..total).for_each(|_| emitter.push(&bytes));
        done_tx.send(()).unwrap();
    });
    // Nobody reads the pipe.
    done.recv_timeout(Duration::from_secs(30))
        .expect("emitters go on");
    thread.join().unwrap();
    let dropped = usize::try_from(queue.dropped().get()).unwrap();
    assert!(dropped >= total / 3, "{dropped} of {total} dropped");
    // Whoever comes back to read gets everything that was not dropped.
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        std::fs::File::from(read).read_to_end(&mut all).unwrap();
        all.len()
    });
    drop(writer);
    assert_eq!(reader.join().unwrap(), (total - dropped) * record.len());
}

#[test]
fn the_end_does_not_wait_for_a_stalled_output() {
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    let writer = Writer::spawn(std::fs::File::from(write)).unwrap();
    (0..200).for_each(|_| writer.queue().push(&[b'\n'; 1024]));
    let start = tokio::time::Instant::now();
    drop(writer);
    let took = start.elapsed();
    assert!(took >= FLUSH_LIMIT && took < 5 * FLUSH_LIMIT, "{took:?}");
    drop(read);
}

#[test]
fn what_a_broken_output_refuses_is_counted() {
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
    drop(read);
    let writer = Writer::spawn(std::fs::File::from(write)).unwrap();
    let queue = writer.queue();
    queue.push(b"one\n");
    queue.push(b"two\n");
    drop(writer);
    assert_eq!(queue.dropped().get(), 2);
    queue.push(b"late\n");
    assert_eq!(queue.dropped().get(), 3);
}

#[test]
fn a_non_blocking_output_is_tried_again() {
    struct Shy<W>(W, bool);
    impl<W: Write> Write for Shy<W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.0.write(&bytes[..bytes.len().min(3)])
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (tx, written) = mpsc::channel();
    let writer = Writer::spawn(Shy(Tap(tx), false)).unwrap();
    writer.queue().push(b"in small bits\n");
    drop(writer);
    let all: Vec<Vec<u8>> = written.try_iter().collect();
    assert_eq!(all.concat(), b"in small bits\n");
}

#[test]
fn what_was_dropped_is_told_once_the_output_is_back() {
    /// Refuses the first write, while another record comes in.
    struct Away(Queue, Vec<u8>);
    impl Write for &mut Away {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if bytes == b"lost\n" {
                self.0.push(b"later\n");
                return Err(ErrorKind::BrokenPipe.into());
            }
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let queue = Queue::default();
    let mut away = Away(queue.clone(), Vec::new());
    queue.push(b"lost\n");
    queue.stop();
    let tell = |records| queue.push(format!("{records} dropped\n").as_bytes());
    run(&queue, &mut away, tell);
    assert_eq!(String::from_utf8(away.1).unwrap(), "later\n1 dropped\n");
}

#[test]
fn an_output_that_is_gone_is_left_alone() {
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let queue = Queue::default();
    queue.push(b"lost\n");
    queue.stop();
    run(&queue, Gone, |_| panic!("nobody is there to be told"));
    assert_eq!(queue.dropped().get(), 1);
}
