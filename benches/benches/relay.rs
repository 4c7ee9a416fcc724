//! The byte pump by size of block, between sockets (spliced, and had it to copy) and through a tunnel with real TLS.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a bench may stop at the first fault, prints, and runs its far end on a plain thread; criterion's macros carry no docs"
)]

use std::{
    hint::black_box,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

use benches::{
    cpu,
    relays::{Path, Relay, THREADS},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

criterion_group!(benches, blocks, bulk, connects);
criterion_main!(benches);

/// One block there and back, on a connection that stands.
fn blocks(criterion: &mut Criterion) {
    for path in [Path::Plain, Path::Copied, Path::Hbone] {
        let (_relay, mut near, mut far) = world(path);
        let mut group = criterion.benchmark_group(format!("relay/{path:?}"));
        for size in [128, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10] {
            let (block, mut got) = (vec![1; size], vec![0; size]);
            group.throughput(Throughput::Bytes(2 * u64::try_from(size).unwrap()));
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter(|| {
                    near.write_all(&block).unwrap();
                    far.read_exact(&mut got).unwrap();
                    far.write_all(&got).unwrap();
                    near.read_exact(&mut got).unwrap();
                    black_box(&got);
                });
            });
        }
    }
}

/// Many bytes one way, and the processor time that the relay took for them.
fn bulk(criterion: &mut Criterion) {
    const BYTES: usize = 16 << 20;
    for path in [Path::Plain, Path::Copied] {
        let (_relay, mut near, mut far) = world(path);
        thread::spawn(move || {
            let mut got = vec![0; BYTES];
            while far.read_exact(&mut got).is_ok() && far.write_all(b"x").is_ok() {}
        });
        let (block, mut moved, before) = (vec![1; BYTES], 0.0, cpu::of_threads(THREADS));
        let mut group = criterion.benchmark_group("bulk");
        group.throughput(Throughput::Bytes(u64::try_from(BYTES).unwrap()));
        group.bench_function(format!("{path:?}"), |bencher| {
            bencher.iter(|| {
                near.write_all(&block).unwrap();
                near.read_exact(&mut [0]).unwrap();
                moved += BYTES as f64 / 1e9;
            });
        });
        group.finish();
        let used = cpu::of_threads(THREADS).saturating_sub(before);
        let each = used.as_secs_f64() / moved;
        eprintln!("bulk/{path:?}: {each:.3} s of processor time of the relay per GB");
    }
}

/// A new connection until its first byte has arrived.
fn connects(criterion: &mut Criterion) {
    for path in [Path::Plain, Path::Hbone] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(path, 2, listener.local_addr().unwrap());
        criterion.bench_function(&format!("connect/{path:?}"), |bencher| {
            bencher.iter(|| pair(&relay, &listener));
        });
    }
}

fn world(path: Path) -> (Relay, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start(path, 2, listener.local_addr().unwrap());
    let (near, far) = pair(&relay, &listener);
    (relay, near, far)
}

fn pair(relay: &Relay, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut near = TcpStream::connect(relay.address).unwrap();
    near.set_nodelay(true).unwrap();
    near.write_all(b"x").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_nodelay(true).unwrap();
    far.read_exact(&mut [0]).unwrap();
    (near, far)
}
