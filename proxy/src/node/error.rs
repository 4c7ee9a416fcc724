//! Why the proxy does not start, or ends.

use std::{fmt, io, path::PathBuf};

use cert_agent::InProcessCaError;
use xds_client::{Rejected, local::LocalError};

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
    /// Certificates and keys cannot be kept where they are to be.
    #[error("cannot keep keys in {path} (STATE_KEYS)", path = .path.display())]
    Keys {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The in-process CA has no usable root.
    #[error("the in-process CA (FAKE_CA) cannot be set up")]
    Ca(#[source] InProcessCaError),
    /// The address or a path of OpenBao is not usable.
    #[error("cannot use OpenBao as the certificate authority")]
    OpenBao(#[source] cert_agent::openbao::SettingsError),
    /// Records of the local mesh description are misshapen: nobody knows what was meant.
    #[error("the mesh description has records that are not usable: {}", Listed(.0))]
    MeshRecords(Vec<Rejected>),
    /// The local mesh description is not usable at all.
    #[error("cannot load the mesh from LOCAL_XDS_PATH or LOCAL_XDS")]
    Mesh(#[source] LocalError),
    /// A task that must outlive the process ended by itself.
    #[error("the task {0:?} ended by itself; see the log")]
    Ended(&'static str),
}

/// Records and what is wrong with them; of many, the first.
struct Listed<'a>(&'a [Rejected]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rejected) in self.0.iter().take(MAX_LISTED).enumerate() {
            let between = if index == 0 { "" } else { "; " };
            write!(f, "{between}{rejected}")?;
        }
        match self.0.len().saturating_sub(MAX_LISTED) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

const MAX_LISTED: usize = 10;
