//! The application: an HTTP/1.1 server that tells an account's balance and takes uploads, and its client.
//!
//! Every message repeats [`MARKER`] so often that no capture of its plaintext can miss it.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail, ensure};
use testkit::{Pod, traffic, wait::SOON};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

/// The secret that travels.
pub(crate) const MARKER: &str = "IBAN DE89 3704 0044 0532 0130 00";
/// Where the server listens.
pub(crate) const PORT: u16 = 8080;

const BLOCK: usize = 64 * 1024;
/// The marker stands at each multiple of this in an upload.
const STRIDE: usize = 512;
const UPLOAD_LIMIT: Duration = Duration::from_secs(60);

/// The server in a pod; stops when dropped.
#[derive(Debug)]
pub(crate) struct Bank {
    _tasks: JoinSet<()>,
}

impl Bank {
    /// Opens in a pod.
    ///
    /// # Errors
    /// When the port is taken.
    pub(crate) fn open(pod: &Pod) -> anyhow::Result<Self> {
        let listener = traffic::listen(pod.netns(), SocketAddr::new([0; 8].into(), PORT))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((stream, peer)) = listener.accept().await {
                clients.spawn(async move {
                    // A client that leaves in the middle of a message is its own affair; what it misses, it tells.
                    let _ = serve(stream, peer).await;
                });
                while clients.try_join_next().is_some() {}
            }
        });
        Ok(Self { _tasks: tasks })
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(BLOCK, stream);
    while let Some(head) = read_head(&mut stream).await? {
        let body = if head.length == 0 {
            format!("hello {}, {MARKER}\n", peer.ip().to_canonical())
        } else {
            receive(&mut stream, head.length).await?;
            format!("{} bytes received, all intact\n", head.length)
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

/// Reads an upload and compares it block by block.
async fn receive(stream: &mut BufReader<TcpStream>, mut left: u64) -> anyhow::Result<()> {
    let (mut expected, mut block) = (block(), vec![0; BLOCK]);
    let mut number = 0;
    while left > 0 {
        let length = usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK));
        let part = block.get_mut(..length).context("within a block")?;
        stream.read_exact(part).await?;
        stamp(&mut expected, number);
        ensure!(expected.starts_with(part), "block {number} is damaged");
        left -= length as u64;
        number += 1;
    }
    Ok(())
}

fn block() -> Vec<u8> {
    let mut block: Vec<u8> = (0..=u8::MAX).cycle().take(BLOCK).collect();
    for line in block.chunks_mut(STRIDE) {
        for (place, byte) in line.iter_mut().skip(8).zip(MARKER.bytes()) {
            *place = byte;
        }
    }
    block
}

/// Numbers a block, so that a lost, doubled or swapped one shows.
fn stamp(block: &mut [u8], number: u64) {
    for (place, byte) in block.iter_mut().zip(number.to_be_bytes()) {
        *place = byte;
    }
}

/// The first line of a message and what `content-length` says.
#[derive(Debug)]
struct Head {
    first: String,
    length: u64,
}

async fn read_head(stream: &mut BufReader<TcpStream>) -> anyhow::Result<Option<Head>> {
    let (mut first, mut length) = (String::new(), 0);
    if stream.read_line(&mut first).await? == 0 {
        return Ok(None);
    }
    loop {
        let mut line = String::new();
        ensure!(
            stream.read_line(&mut line).await? > 0,
            "the head is cut off"
        );
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse()?;
            }
            Some(_) => {}
            None => return Ok(Some(Head { first, length })),
        }
    }
}

/// One client's connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    opened: Instant,
    host: String,
}

/// What a client measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// From connecting to the first answer.
    pub(crate) first: Duration,
    /// The middle one of all further answers.
    pub(crate) median: Duration,
}

impl Client {
    /// Connects from inside a pod.
    ///
    /// # Errors
    /// When refused or late.
    pub(crate) async fn connect(pod: &Pod, to: SocketAddr, host: &str) -> anyhow::Result<Self> {
        let opened = Instant::now();
        let stream = timeout(SOON, pod.connect(to)).await.context("connect")??;
        Ok(Self {
            stream: BufReader::new(stream),
            opened,
            host: host.to_owned(),
        })
    }

    /// Asks `count` times, one after the other; every answer must name `client` and hold the marker.
    ///
    /// # Errors
    /// When one does not, or the connection ends.
    pub(crate) async fn ask(&mut self, count: usize, client: &Pod) -> anyhow::Result<Timing> {
        let expected = format!("hello {}, {MARKER}\n", client.ip4());
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            let body = timeout(SOON, self.get()).await.context("no answer")??;
            ensure!(body == expected, "answer {body:?} instead of {expected:?}");
            times.push(start.elapsed());
            if times.len() == 1 {
                times = vec![self.opened.elapsed()];
            }
        }
        let (first, further) = times.split_first_mut().context("nothing asked")?;
        further.sort_unstable();
        let median = further.get(further.len() / 2).copied().unwrap_or(*first);
        Ok(Timing {
            first: *first,
            median,
        })
    }

    async fn get(&mut self) -> anyhow::Result<String> {
        let request = format!(
            "GET /balance HTTP/1.1\r\nhost: {}\r\naccount: {MARKER}\r\n\r\n",
            self.host
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> anyhow::Result<String> {
        let head = read_head(&mut self.stream)
            .await?
            .context("the connection was closed instead of an answer")?;
        ensure!(
            head.first.starts_with("HTTP/1.1 200 "),
            "answer {:?}",
            head.first
        );
        let mut body = String::new();
        let mut part = (&mut self.stream).take(head.length);
        part.read_to_string(&mut body).await?;
        Ok(body)
    }

    /// Sends `bytes` in one message; returns how long it took until the server confirmed them.
    ///
    /// # Errors
    /// When they do not arrive intact, or take more than a minute.
    pub(crate) async fn upload(&mut self, bytes: u64) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let body = timeout(UPLOAD_LIMIT, self.put(bytes))
            .await
            .context("the upload does not end")??;
        ensure!(
            body == format!("{bytes} bytes received, all intact\n"),
            "answer {body:?}"
        );
        Ok(start.elapsed())
    }

    async fn put(&mut self, mut left: u64) -> anyhow::Result<String> {
        let head = format!(
            "PUT /statement HTTP/1.1\r\nhost: {}\r\ncontent-length: {left}\r\n\r\n",
            self.host
        );
        self.stream.write_all(head.as_bytes()).await?;
        let (mut block, mut number) = (block(), 0);
        while left > 0 {
            let length = usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK));
            stamp(&mut block, number);
            let part = block.get(..length).context("within a block")?;
            self.stream.write_all(part).await?;
            left -= length as u64;
            number += 1;
        }
        self.answer().await
    }

    /// Asks and expects the connection to be cut without a byte of an answer; returns when it was, from connecting on.
    ///
    /// # Errors
    /// When there is an answer, or the connection stays open.
    pub(crate) async fn expect_refusal(&mut self) -> anyhow::Result<Duration> {
        match timeout(SOON, self.get_anything()).await {
            Err(_) => bail!("neither answered nor closed"),
            Ok(Some(bytes)) => bail!("answered: {:?}", String::from_utf8_lossy(&bytes)),
            Ok(None) => Ok(self.opened.elapsed()),
        }
    }

    async fn get_anything(&mut self) -> Option<Vec<u8>> {
        // The peer may have closed already: then the write fails, or the read does.
        let request = format!("GET /balance HTTP/1.1\r\naccount: {MARKER}\r\n\r\n");
        let _ = self.stream.write_all(request.as_bytes()).await;
        let mut bytes = vec![0; 1024];
        let count = self.stream.read(&mut bytes).await.unwrap_or(0);
        bytes.truncate(count);
        (count > 0).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_repeats_the_marker_and_carries_its_number() {
        let (mut one, mut two) = (block(), block());
        stamp(&mut one, 1);
        stamp(&mut two, 2);
        assert_ne!(one, two);
        for line in one.chunks(STRIDE) {
            assert!(line[8..].starts_with(MARKER.as_bytes()));
        }
    }
}
