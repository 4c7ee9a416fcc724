//! Why the proxy does not start, or ends.

use std::{io, path::PathBuf};

use cert_agent::InProcessCaError;
use xds_client::local::LocalError;

use crate::listen::{BindError, Shortage};

/// The proxy did not start, or could not go on; nothing of it runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A capability, or something of the kernel, is missing.
    #[error(transparent)]
    Shortage(Shortage),
    /// A thread pool could not be made.
    #[error("cannot start the worker threads")]
    Runtime(#[source] io::Error),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// A port of the proxy itself is not free.
    #[error("cannot listen on port {port}")]
    Bind {
        /// The port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The listeners of the dedicated workload could not be opened.
    #[error("cannot capture the workload")]
    Listen(#[source] BindError),
    /// The own network namespace cannot be told.
    #[error("cannot read the own network namespace")]
    Netns(#[source] io::Error),
    /// A file named by the configuration cannot be read.
    #[error("cannot read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The in-process CA has no usable root.
    #[error("the in-process CA (FAKE_CA) cannot be set up")]
    Ca(#[source] InProcessCaError),
    /// The address or a path of OpenBao is not usable.
    #[error("cannot use OpenBao as the certificate authority")]
    OpenBao(#[source] cert_agent::openbao::SettingsError),
    /// The local mesh description is not usable at all.
    #[error("cannot load the mesh from LOCAL_XDS_PATH or LOCAL_XDS")]
    Mesh(#[source] LocalError),
    /// A task that must outlive the process ended by itself.
    #[error("the task {0:?} ended by itself; see the log")]
    Ended(&'static str),
}
