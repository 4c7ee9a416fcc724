//! Just enough of HTTP/1.1 to ask a proxy's own servers.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{sys::Netns, traffic, wait::SOON};

/// An answer with its whole body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, without transfer coding.
    pub body: String,
}

impl Answer {
    /// The first header of that lower-case name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// `METHOD path` on one connection from inside `netns`; `headers` are whole lines without line ends.
///
/// # Errors
/// When there is no well-formed answer within ten seconds.
pub async fn request(
    netns: &Netns,
    server: SocketAddr,
    method_and_path: &str,
    headers: &[&str],
) -> anyhow::Result<Answer> {
    let talk = async {
        let mut stream = traffic::connect(netns, server).await?;
        let mut head =
            format!("{method_and_path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n");
        for line in headers {
            head += line;
            head += "\r\n";
        }
        stream.write_all((head + "\r\n").as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        parse(&bytes)
    };
    tokio::time::timeout(SOON, talk)
        .await
        .with_context(|| format!("{method_and_path} at {server}"))?
}

fn parse(bytes: &[u8]) -> anyhow::Result<Answer> {
    let text = String::from_utf8(bytes.to_vec())?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of head")?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .context("no status")?
        .parse()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let chunked = headers
        .iter()
        .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let body = if chunked {
        dechunk(body)?
    } else {
        body.to_owned()
    };
    Ok(Answer {
        status,
        headers,
        body,
    })
}

fn dechunk(mut rest: &str) -> anyhow::Result<String> {
    let mut body = String::new();
    loop {
        let (size, tail) = rest.split_once("\r\n").context("no chunk size")?;
        let size = usize::from_str_radix(size.trim(), 16)?;
        if size == 0 {
            return Ok(body);
        }
        let Some((chunk, tail)) = tail.split_at_checked(size) else {
            bail!("short chunk")
        };
        body += chunk;
        rest = tail.strip_prefix("\r\n").context("no end of chunk")?;
    }
}
