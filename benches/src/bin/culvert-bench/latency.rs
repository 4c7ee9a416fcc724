//! Latency of one small request after the other, by blocking threads: no runtime of ours is in the way.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use testkit::Pod;
use tokio::{sync::oneshot, time::Instant};

/// How requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// All over one connection.
    Kept,
    /// Each over a new connection; counted from its beginning to the answer.
    New,
}

/// Answers each byte by the same; stops when dropped.
#[derive(Debug)]
pub(crate) struct Echo {
    port: u16,
    stop: Arc<AtomicBool>,
}

/// How long requests took, sorted.
#[derive(Debug, Default)]
pub(crate) struct Distribution(Vec<Duration>);

impl Echo {
    /// Serves a free port of a pod, one connection after the other.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn start(pod: &Pod) -> io::Result<Self> {
        let listener = pod.netns().run(|| TcpListener::bind((pod.ip4(), 0)))?;
        socket2::SockRef::from(&listener).set_read_timeout(Some(TICK))?;
        let port = listener.local_addr()?.port();
        let stop = Arc::<AtomicBool>::default();
        let told = Arc::clone(&stop);
        thread::Builder::new()
            .name("echo".to_owned())
            .spawn(move || serve(&listener, &told))?;
        Ok(Self { port, stop })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One after the other: the client opens no second connection before the first is done.
fn serve(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        if let Ok((stream, _)) = listener.accept() {
            // The client sees what went wrong.
            let _ = echo(stream);
        }
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
        // So that the client may open many connections, it is the server who closes first.
        if byte == LAST {
            break;
        }
    }
    Ok(())
}

/// Sends requests from one pod to the echo of another while `work` goes on, and for a moment before and after.
///
/// # Errors
/// When a request fails: then no figure can be trusted.
pub(crate) async fn during<T>(
    flow: Flow,
    from: &Arc<Pod>,
    (ip, echo): (IpAddr, &Echo),
    work: impl Future<Output = T>,
) -> anyhow::Result<(T, Distribution)> {
    let (pod, to) = (Arc::clone(from), SocketAddr::new(ip, echo.port));
    let stop = Stop::default();
    let told = Arc::clone(&stop.0);
    let (warm_tx, warm_rx) = oneshot::channel();
    let client = tokio::task::spawn_blocking(move || {
        let run = || requests(flow, to, &told, warm_tx);
        pod.netns().run(run)
    });
    // Dropped without a word when the first request fails: the client tells.
    let _ = warm_rx.await;
    let done = work.await;
    drop(stop);
    let taken = client.await?.with_context(|| flow.to_string())?;
    ensure!(!taken.is_empty(), "{flow}: not a single request");
    Ok((done, Distribution::new(taken)))
}

/// Ends a client when dropped, also by a signal.
#[derive(Debug, Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The first requests open tunnels and fill caches; they are not counted.
fn requests(
    flow: Flow,
    to: SocketAddr,
    stop: &AtomicBool,
    warm: oneshot::Sender<()>,
) -> io::Result<Vec<Duration>> {
    let mut taken = Vec::with_capacity(1 << 18);
    let mut kept = connect(to)?;
    let mut one = || {
        let start = Instant::now();
        match flow {
            Flow::Kept => exchange(&mut kept, MORE)?,
            Flow::New => {
                let mut stream = connect(to)?;
                exchange(&mut stream, LAST)?;
                let took = start.elapsed();
                ended(&mut stream)?;
                return Ok(took);
            }
        }
        Ok::<_, io::Error>(start.elapsed())
    };
    for _ in 0..WARM_UP {
        one()?;
    }
    // Nobody waits when the bench was interrupted.
    let _ = warm.send(());
    while !stop.load(Ordering::Relaxed) {
        taken.push(one()?);
    }
    Ok(taken)
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, byte: [u8; 1]) -> io::Result<()> {
    stream.write_all(&byte)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer == byte {
        Ok(())
    } else {
        Err(io::Error::other("another answer than the request"))
    }
}

fn ended(stream: &mut TcpStream) -> io::Result<()> {
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more than the answer")),
    }
}

impl Distribution {
    /// Of requests in any order.
    pub(crate) fn new(mut taken: Vec<Duration>) -> Self {
        taken.sort_unstable();
        Self(taken)
    }

    /// Adds the requests of another round.
    pub(crate) fn join(self, other: Self) -> Self {
        Self::new([self.0, other.0].concat())
    }

    /// How many requests there were.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// So many thousandths of all requests took no longer, in seconds; 1000 = the longest. Nought of none.
    pub(crate) fn permille(&self, permille: usize) -> f64 {
        let rank = (self.0.len() * permille).div_ceil(1000).max(1);
        let taken = self.0.get(rank - 1);
        taken.map_or(0.0, Duration::as_secs_f64)
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kept => "round trip",
            Self::New => "new connection",
        })
    }
}

/// A request that is followed by others on the same connection.
const MORE: [u8; 1] = *b"m";
/// The last of its connection.
const LAST: [u8; 1] = *b"l";
const WARM_UP: u32 = 200;
/// No request may take longer.
const LIMIT: Duration = Duration::from_secs(10);
/// How soon a server sees that it is to stop.
const TICK: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted_from_the_shortest() {
        let shuffled = (1..=1000).rev().map(Duration::from_millis).collect();
        let all = Distribution::new(shuffled);
        for (permille, expected) in [(500, 0.5), (990, 0.99), (999, 0.999), (1000, 1.0)] {
            assert!((all.permille(permille) - expected).abs() < 1e-9);
        }
        let few = Distribution::new(vec![Duration::from_secs(2), Duration::from_secs(1)]);
        let few = few.join(Distribution::new(vec![Duration::from_secs(3)]));
        assert_eq!((few.permille(500), few.permille(999)), (2.0, 3.0));
        assert_eq!(Distribution::default().permille(500), 0.0);
    }
}
