//! `culvert explain`: asks the running proxy what it would do with a connection, and why.

use std::{io, net::SocketAddr};

use clap::{Args, ValueEnum};

use super::admin;

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
    let answer = admin::get(admin, &format!("/debug/explain?{query}"));
    let answer = answer.map_err(|source| ExplainError::Unreachable { admin, source })?;
    if answer.status == 200 {
        Ok(answer.body)
    } else {
        Err(ExplainError::Refused(answer.body.trim_end().to_owned()))
    }
}
