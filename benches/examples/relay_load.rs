//! Load on one relay, with the processor time of its threads alone.
//!
//! `relay_load [plain|copied|hbone] [bulk|reverse|requests|connections|idle] [seconds or count]`, for use with `perf`; without
//! arguments, all of them one after the other.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a measuring tool: prints, and drives its load from plain threads in real time"
)]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use benches::{
    cpu,
    relays::{Path, Relay, THREADS},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const REQUEST: usize = 100;
const ANSWER: usize = 1000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let paths = match arguments.next().as_deref() {
        Some("plain") => vec![Path::Plain],
        Some("copied") => vec![Path::Copied],
        Some("hbone") => vec![Path::Hbone],
        _ => vec![Path::Plain, Path::Copied, Path::Hbone],
    };
    let load = arguments.next();
    let amount = arguments.next().and_then(|text| text.parse().ok());
    let wanted = |name| load.as_deref().is_none_or(|load| load == name);
    for path in paths {
        if wanted("bulk") {
            bulk(path, 1, false, amount.unwrap_or(3));
            bulk(path, 8, false, amount.unwrap_or(3));
        }
        if wanted("reverse") {
            bulk(path, 1, true, amount.unwrap_or(3));
        }
        if wanted("requests") {
            requests(path, 1, amount.unwrap_or(3));
            requests(path, 64, amount.unwrap_or(3));
        }
        if wanted("connections") {
            connections(path, 32, amount.unwrap_or(3));
        }
        if wanted("idle") {
            idle(path, usize::try_from(amount.unwrap_or(2000)).unwrap());
        }
    }
}

/// A server application: reads the kind of each connection from its first byte.
fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            socket.set_nodelay(true).unwrap();
            let small = thread::Builder::new().stack_size(320 << 10);
            small.spawn(move || answer(&mut socket)).unwrap();
        }
    });
    address
}

fn answer(socket: &mut TcpStream) {
    let mut kind = [0];
    if socket.read_exact(&mut kind).is_err() {
        return;
    }
    let mut block = vec![0; if kind == *b"r" { REQUEST } else { 128 << 10 }];
    let answer = [1; ANSWER];
    match &kind {
        b"b" => while socket.read(&mut block).is_ok_and(|count| count > 0) {},
        b"s" => while socket.write_all(&block).is_ok() {},
        _ => while socket.read_exact(&mut block).is_ok() && socket.write_all(&answer).is_ok() {},
    }
}

fn connect(to: SocketAddr, kind: u8) -> TcpStream {
    let mut socket = TcpStream::connect(to).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.write_all(&[kind]).unwrap();
    socket
}

/// Runs `each` in `count` threads for `seconds`, after a second of warming up; gives what they
/// counted, the time, and the processor time of the relay.
fn load(
    count: usize,
    seconds: u64,
    each: impl Fn(&AtomicU64, &AtomicBool) + Sync,
) -> (f64, Duration, Duration) {
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| each(&done, &stop));
        }
        thread::sleep(Duration::from_millis(700));
        let before = (done.load(Relaxed), cpu::of_threads(THREADS), Instant::now());
        thread::sleep(Duration::from_secs(seconds));
        let amount = done.load(Relaxed) - before.0;
        let used = cpu::of_threads(THREADS).saturating_sub(before.1);
        let time = before.2.elapsed();
        stop.store(true, Relaxed);
        (amount as f64, time, used)
    })
}

fn bulk(path: Path, streams: usize, reverse: bool, seconds: u64) {
    let relay = Relay::start(path, 2, server());
    let (bytes, time, used) = load(streams, seconds, |done, stop| {
        let mut socket = connect(relay.address, if reverse { b's' } else { b'b' });
        let mut block = vec![7; 128 << 10];
        while !stop.load(Relaxed) {
            let count = if reverse {
                socket.read(&mut block).unwrap()
            } else {
                socket.write(&block).unwrap()
            };
            done.fetch_add(count as u64, Relaxed);
        }
    });
    let gigabytes = bytes / 1e9;
    println!(
        "{path:?} {} of {streams}: {:.2} GB/s, {:.3} s of processor per GB",
        if reverse { "reverse" } else { "bulk" },
        gigabytes / time.as_secs_f64(),
        used.as_secs_f64() / gigabytes
    );
}

fn requests(path: Path, connections: usize, seconds: u64) {
    let relay = Relay::start(path, 2, server());
    let (count, time, used) = load(connections, seconds, |done, stop| {
        let mut socket = connect(relay.address, b'r');
        let (request, mut answer) = ([1; REQUEST], [0; ANSWER]);
        while !stop.load(Relaxed) {
            socket.write_all(&request).unwrap();
            socket.read_exact(&mut answer).unwrap();
            done.fetch_add(1, Relaxed);
        }
    });
    report(
        path,
        &format!("requests on {connections}"),
        count,
        time,
        used,
    );
}

fn connections(path: Path, at_once: usize, seconds: u64) {
    let relay = Relay::start(path, 2, server());
    let (count, time, used) = load(at_once, seconds, |done, stop| {
        while !stop.load(Relaxed) {
            let mut socket = connect(relay.address, b'r');
            socket.write_all(&[1; REQUEST]).unwrap();
            socket.read_exact(&mut [0; ANSWER]).unwrap();
            done.fetch_add(1, Relaxed);
        }
    });
    report(
        path,
        &format!("connections, {at_once} at once"),
        count,
        time,
        used,
    );
}

fn report(path: Path, what: &str, count: f64, time: Duration, used: Duration) {
    println!(
        "{path:?} {what}: {:.0} per s, {:.1} µs of processor each",
        count / time.as_secs_f64(),
        used.as_secs_f64() * 1e6 / count
    );
}

fn idle(path: Path, count: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start(path, 2, listener.local_addr().unwrap());
    let pair = || {
        let near = connect(relay.address, b'x');
        let (mut far, _) = listener.accept().unwrap();
        far.read_exact(&mut [0]).unwrap();
        (near, far)
    };
    let mut held = vec![pair()];
    held.reserve(count);
    let before = cpu::resident_bytes();
    held.extend((0..count).map(|_| pair()));
    thread::sleep(Duration::from_secs(1));
    let each = (cpu::resident_bytes() - before) / count as u64;
    println!(
        "{path:?} idle: {each} bytes resident each of {count}; {:?}",
        relay.buffers
    );
    drop(held);
    thread::sleep(Duration::from_secs(28));
    relay.buffers.trim();
    let after = cpu::resident_bytes();
    println!("{path:?} after: {before} bytes before, {after} after");
}
