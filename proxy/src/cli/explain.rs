//! `culvert explain`: asks the running proxy what it would do with a connection, and why.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use clap::{Args, ValueEnum};

/// The question.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[non_exhaustive]
pub struct Question {
    /// Who connects: NAMESPACE/POD, POD, an address, or a workload's uid
    #[arg(long)]
    pub from: String,
    /// Where to: IP:PORT, or HOST:PORT with a host name of the mesh
    #[arg(long)]
    pub to: String,
    /// Where the proxy's admin server is
    #[arg(long, default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// How to tell
    #[arg(long, value_enum, default_value = "text")]
    pub output: Output,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[non_exhaustive]
pub enum Output {
    /// Lines for people.
    Text,
    /// A JSON document.
    Json,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExplainError {
    /// Nobody listens there, or it is no admin server.
    #[error(
        "cannot ask the admin server at {admin}; is the proxy running in this network namespace?"
    )]
    Unreachable {
        /// Where it was looked for.
        admin: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It does not understand the question.
    #[error("{0}")]
    Refused(String),
}

/// Asks, and returns the answer as it is to be printed.
///
/// # Errors
/// [`ExplainError`] if there is none.
pub fn explain(question: &Question) -> Result<String, ExplainError> {
    let output = match question.output {
        Output::Text => "text",
        Output::Json => "json",
    };
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("from", &question.from)
        .append_pair("to", &question.to)
        .append_pair("output", output)
        .finish();
    let admin = question.admin;
    let answer = get(admin, &format!("/debug/explain?{query}"));
    let answer = answer.map_err(|source| ExplainError::Unreachable { admin, source })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("200") {
        Ok(body.to_owned())
    } else {
        Err(ExplainError::Refused(body.trim_end().to_owned()))
    }
}

/// The whole answer, head included. HTTP/1.0, so that it comes in one piece.
fn get(server: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
    Ok(answer)
}

/// How long each step may take.
const LIMIT: Duration = Duration::from_secs(10);
/// More than a service with thousands of endpoints needs.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
