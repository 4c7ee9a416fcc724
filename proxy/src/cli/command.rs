//! The command line.

use std::ffi::OsString;

use clap::{CommandFactory as _, Parser, Subcommand};

use super::{doctor::Examination, explain::Question};

/// What the process is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
#[expect(clippy::exhaustive_enums, reason = "`main` must handle every command")]
pub enum Command {
    /// Run the proxy (also without any command); further arguments are ignored
    Proxy {
        /// Shown as `proxyArgs` in the configuration dump, otherwise unused
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        ignored: Vec<OsString>,
    },
    /// Print one line of build information
    Version {
        /// Unused
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        ignored: Vec<OsString>,
    },
    /// Print this list
    Help {
        /// Unused
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        ignored: Vec<OsString>,
    },
    /// Ask the running proxy what it would do with a connection, and why
    Explain(Question),
    /// Examine this node: what is wrong with it, and what to do about it
    Doctor(Examination),
    /// Show the proxy at work on this machine, without Kubernetes (runs culvert-demo)
    Demo {
        /// Handed to culvert-demo
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// The arguments ask for nothing that exists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}\n\n{commands}", commands = command_list())]
#[non_exhaustive]
pub struct UsageError {
    /// What is wrong, in one line.
    pub reason: String,
}

/// Reads the arguments after the program name; none at all means `proxy`, which has no flags.
///
/// # Errors
/// [`UsageError`] if the first argument is no command.
pub fn command(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut arguments = arguments.into_iter().peekable();
    if arguments.peek().is_none() {
        let ignored = Vec::new();
        return Ok(Command::Proxy { ignored });
    }
    let name = OsString::from(env!("CARGO_PKG_NAME"));
    Arguments::try_parse_from(std::iter::once(name).chain(arguments))
        .map(|Arguments { command }| command)
        .map_err(|error| {
            let text = error.to_string();
            let first = text.lines().take_while(|line| !line.is_empty());
            let first = first.map(str::trim).collect::<Vec<_>>().join(" ");
            UsageError {
                reason: first
                    .strip_prefix("error: ")
                    .unwrap_or("a command is missing")
                    .to_owned(),
            }
        })
}

/// All commands, one a line.
#[must_use]
pub fn command_list() -> String {
    Arguments::command().render_help().to_string()
}

/// Node-level L4 mTLS proxy: the data plane of an Istio ambient mesh.
#[derive(Debug, Parser)]
#[command(
    disable_help_flag = true,
    disable_help_subcommand = true,
    disable_version_flag = true,
    override_usage = "culvert [COMMAND]"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}
