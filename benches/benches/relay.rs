//! The byte pump by size of block, between sockets and through a tunnel with real TLS.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench may stop at the first fault; criterion's macros carry no docs"
)]

use std::{
    hint::black_box,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use benches::relays::{Path, Relay};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

criterion_group!(benches, blocks, connects);
criterion_main!(benches);

/// One block there and back, on a connection that stands.
fn blocks(criterion: &mut Criterion) {
    for path in [Path::Plain, Path::Hbone] {
        let (_relay, mut near, mut far) = world(path);
        let mut group = criterion.benchmark_group(format!("relay/{path:?}"));
        for size in [128, 4 << 10, 16 << 10, 64 << 10, 256 << 10] {
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
