//! SPIFFE identities of workloads, their certificates, and the TLS configurations made of them.
//!
//! The crate is usable alone: it knows no mesh, no xDS and no listener. Give an [`Agent`] a
//! [`Source`] of certificates, own the future of [`Agent::run`], and ask for an [`Svid`] whenever a
//! TLS handshake is about to start:
//!
//! ```
//! # use std::sync::Arc;
//! # use cert_agent::{Agent, AgentOptions, CsrSource, InProcessCa, SpiffeId};
//! # use tokio_util::sync::CancellationToken;
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = Arc::new(CsrSource::new(InProcessCa::random()?));
//! let agent = Agent::new(source, AgentOptions::default());
//! let stop = CancellationToken::new();
//! let use_it = async {
//!     let web: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse()?;
//!     let db: SpiffeId = "spiffe://cluster.local/ns/shop/sa/db".parse()?;
//!     let svid = agent.svid(&web).await?;
//!     let _accepts_mesh_peers = svid.server_config();
//!     let _dials_the_database_only = svid.client_config(&Arc::from([db]));
//!     stop.cancel();
//!     Ok::<_, Box<dyn std::error::Error>>(())
//! };
//! let (result, ()) = tokio::join!(use_it, agent.run(stop.clone()));
//! # result
//! # }
//! ```
//!
//! What it promises: one certificate per identity, renewed well before its end, never presented
//! after it; no answer of a CA is used unchecked; private keys stay in memory, are wiped, and
//! appear in no `Debug`, dump or log line.

#![forbid(unsafe_code)]

mod agent;
mod anchors;
mod bundle;
mod chain;
mod check;
mod clock;
mod crl;
mod error_text;
mod file;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod in_process;
pub mod istio;
mod kept;
mod key;
pub mod openbao;
mod source;
mod svid;
mod tls;
mod verify;

#[cfg(test)]
mod testing;

pub use agent::{
    Agent, AgentOptions, SvidError,
    snapshot::{CertificateState, HeldCertificate, IdentityStatus, Stage},
};
pub use bundle::{BundleError, RootSourceStatus, TrustBundle};
pub use check::{Rejection, SanRule};
pub use clock::Clock;
pub use crl::{CrlError, RevocationStatus, Revocations, SideCounts, Standing, Tracked, Tracker};
pub use id::{SpiffeId, SpiffeIdError};
pub use in_process::{InProcessCa, InProcessCaError, RootPair};
pub use kept::KeptSource;
pub use key::{CsrError, PrivateKey};
pub use source::{
    BoxFuture, CsrSource, KeyedChain, ObtainError, Origin, Retry, SignedChain, Signer,
    SigningRequest, Source,
};
pub use svid::Svid;
pub use tls::TlsOptions;
pub use verify::{IdentityError, peer_id, peer_not_after};
