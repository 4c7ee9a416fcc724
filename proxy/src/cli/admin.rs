//! Asks the admin server of a running proxy.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// What a server said.
#[derive(Debug)]
pub(super) struct Answer {
    /// The status of HTTP; 0 if it spoke something else.
    pub(super) status: u16,
    pub(super) body: String,
}

/// The whole answer to a GET. HTTP/1.0, so that it comes in one piece.
///
/// # Errors
/// If nobody answers in time.
pub(super) fn get(server: SocketAddr, path: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok(Answer {
        status: status.unwrap_or(0),
        body: body.to_owned(),
    })
}

/// How long each step may take.
const LIMIT: Duration = Duration::from_secs(10);
/// More than the dump of a mesh with tens of thousands of workloads needs.
const MAX_ANSWER_BYTES: u64 = 256 << 20;
