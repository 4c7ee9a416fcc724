//! The certificate service of the stand-in: signs what a real one would, or errs as told.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use cert_agent::istio::proto::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use parking_lot::Mutex;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use tokio::{sync::watch, time::sleep};
use tonic::{Request, Response, Status};

use super::{
    Shared,
    csr::{CertificateCall, Outcome},
    server::{self, Hello},
};
use crate::{ca::Authority, openbao::Issuer};

/// Who signs, and what the answers hold.
#[derive(Debug)]
pub struct Signing {
    issuer: Authority,
    /// PEM, from the issuer on.
    intermediates: Vec<String>,
    roots: Vec<String>,
    layout: Layout,
}

/// How the intermediates of an answer are put into elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Layout {
    /// One element each.
    #[default]
    Separate,
    /// All in one element, as older versions of istiod did.
    Concatenated,
    /// One element each, and the root after them, as istiod does with the files of a `kubernetes.io/tls` secret.
    RootRepeated,
}

/// What is wrong with answers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// No element.
    Empty,
    /// Nothing but the leaf.
    LeafAlone,
    /// The leaf is for these names.
    Names(Vec<String>),
    /// The leaf is for another key.
    OtherKey,
    /// The leaf has expired.
    Expired,
    /// The leaf is not below the root.
    OtherRoot,
}

impl Signing {
    /// Leaves are signed by this root.
    #[must_use]
    pub fn by(root: Authority) -> Self {
        Self {
            intermediates: Vec::new(),
            roots: vec![root.root_pem().to_owned()],
            layout: Layout::default(),
            issuer: root,
        }
    }

    /// Leaves are signed by a new authority below the one that would have signed them.
    ///
    /// # Errors
    /// When its certificate cannot be made.
    pub fn below(mut self, common_name: &str) -> anyhow::Result<Self> {
        self.issuer = self.issuer.subordinate(common_name)?;
        let certificate = self.issuer.root_pem().to_owned();
        self.intermediates.insert(0, certificate);
        Ok(self)
    }

    /// Adds a root to what answers tell to trust.
    #[must_use]
    pub fn trusting(mut self, root: &Authority) -> Self {
        self.roots.push(root.root_pem().to_owned());
        self
    }

    /// Another layout of answers.
    #[must_use]
    pub fn layout(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    fn elements(&self, leaf: String) -> Vec<String> {
        let mut elements = vec![leaf];
        match self.layout {
            Layout::Separate => elements.extend_from_slice(&self.intermediates),
            Layout::Concatenated => elements.push(self.intermediates.concat()),
            Layout::RootRepeated => {
                elements.extend_from_slice(&self.intermediates);
                elements.extend_from_slice(&self.roots[..1]);
            }
        }
        elements.push(self.roots.concat());
        elements
    }

    /// The elements of an answer for the key of `csr`.
    fn sign(&self, ids: &[String], csr: &str, terms: &Terms) -> anyhow::Result<Vec<String>> {
        if terms.flaw == Some(Flaw::Empty) {
            return Ok(Vec::new());
        }
        let csr = CertificateSigningRequestParams::from_pem(csr).context("not a usable CSR")?;
        let mut params = leaf(terms.lifetime);
        let names = match &terms.flaw {
            Some(Flaw::Names(names)) => names,
            _ => ids,
        };
        for name in names {
            let name = SanType::URI(name.as_str().try_into()?);
            params.subject_alt_names.push(name);
        }
        if terms.flaw == Some(Flaw::Expired) {
            params.not_before = (SystemTime::now() - 2 * BACKDATED).into();
            params.not_after = (SystemTime::now() - BACKDATED).into();
        }
        let stranger;
        let issuer = if terms.flaw == Some(Flaw::OtherRoot) {
            stranger = Authority::new("a stranger")?;
            &stranger
        } else {
            &self.issuer
        };
        let leaf = if terms.flaw == Some(Flaw::OtherKey) {
            issuer.certify(&params, &KeyPair::generate()?)?
        } else {
            issuer.certify(&params, &csr.public_key)?
        };
        if terms.flaw == Some(Flaw::LeafAlone) {
            return Ok(vec![leaf]);
        }
        Ok(self.elements(leaf))
    }
}

/// As istio-csr, with its answers where something is wrong.
async fn sign_through(
    issuer: &Issuer,
    call: &CertificateCall,
    id: &str,
    lifetime: Duration,
) -> Result<Vec<String>, Status> {
    let names = call.csr.as_ref().map(|csr| &*csr.uris);
    if names != Some(&[id.to_owned()]) {
        return Err(Status::unauthenticated("request authenticate failure"));
    }
    let refused = |said: &'static str| {
        move |error: anyhow::Error| {
            tell(id, &error);
            Status::internal(said)
        }
    };
    let signed = issuer.sign(&call.csr_pem, id, lifetime).await;
    let signed = signed.map_err(refused("failed to sign certificate request"))?;
    signed.verify().map_err(refused(
        "failed to parse and verify signed certificate from issuer",
    ))?;
    Ok(signed.into_elements())
}

/// The cause of an answer that hides it.
#[expect(
    clippy::print_stderr,
    reason = "the log of an istio-csr; shown when a test fails"
)]
fn tell(id: &str, error: &anyhow::Error) {
    eprintln!("{id}: {error:#}");
}

/// What istiod puts into a leaf.
fn leaf(lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
    ];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.not_before = (SystemTime::now() - BACKDATED).into();
    params.not_after = (SystemTime::now() + lifetime).into();
    params
}

/// The service, and how it behaves.
#[derive(Debug)]
pub(super) struct Signer {
    signing: Mutex<Signing>,
    settings: Mutex<Settings>,
    pub(super) calls: watch::Sender<Vec<CertificateCall>>,
}

#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Whom calls without impersonation are from.
    pub(super) caller: String,
    /// No certificate lives longer.
    pub(super) longest: Duration,
    pub(super) flaw: Option<Flaw>,
    pub(super) refusal: Option<Status>,
    /// For the next calls only, one each.
    pub(super) refusals: Vec<Status>,
    pub(super) latency: Duration,
    /// Signs instead of the stand-in.
    pub(super) issuer: Option<Arc<Issuer>>,
}

struct Terms {
    lifetime: Duration,
    flaw: Option<Flaw>,
}

impl Signer {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            signing: Mutex::new(Signing::by(Authority::new("stand-in mesh root")?)),
            settings: Mutex::new(Settings {
                caller: "spiffe://cluster.local/ns/istio-system/sa/ztunnel".to_owned(),
                longest: Duration::from_secs(90 * 24 * 60 * 60),
                flaw: None,
                refusal: None,
                refusals: Vec::new(),
                latency: Duration::ZERO,
                issuer: None,
            }),
            calls: watch::Sender::default(),
        })
    }

    pub(super) fn sign_by(&self, signing: Signing) {
        *self.signing.lock() = signing;
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.lock());
    }

    /// The first root.
    pub(super) fn root_pem(&self) -> String {
        self.signing.lock().roots[0].clone()
    }

    /// The settings for one call, unless it is to be refused.
    fn settings(&self) -> Result<Settings, Status> {
        let mut settings = self.settings.lock();
        let refusal = settings.refusal.clone().or_else(|| {
            let next = !settings.refusals.is_empty();
            next.then(|| settings.refusals.remove(0))
        });
        refusal.map_or_else(|| Ok(settings.clone()), Err)
    }

    async fn answer(&self, call: &CertificateCall) -> Result<Vec<String>, Status> {
        let settings = self.settings()?;
        let asked = match u64::try_from(call.validity_seconds) {
            Ok(0) | Err(_) => Duration::from_secs(24 * 60 * 60),
            Ok(seconds) => Duration::from_secs(seconds),
        };
        let terms = Terms {
            lifetime: asked.min(settings.longest),
            flaw: settings.flaw,
        };
        let id = call.impersonated.clone().unwrap_or(settings.caller);
        if let Some(issuer) = settings.issuer {
            return sign_through(&issuer, call, &id, terms.lifetime).await;
        }
        let signing = self.signing.lock();
        signing
            .sign(&[id], &call.csr_pem, &terms)
            .map_err(|error| Status::invalid_argument(format!("CSR signing error ({error:#})")))
    }
}

/// The service of one stand-in.
#[derive(Debug)]
pub(super) struct Certificates(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let hello = request.extensions().get::<Hello>().cloned();
        let headers = server::headers(request.metadata());
        let admitted = self.0.access.admit(&headers);
        let call = CertificateCall::new(hello, headers, request.into_inner());
        let signer = &self.0.signer;
        let noted = Noted::new(signer, call.clone());
        // A call that the client gave up ends here, and is noted as such.
        let latency = signer.settings.lock().latency;
        sleep(latency).await;
        let refused = |_| Status::unauthenticated("request authenticate failure");
        let answer = match admitted.map_err(refused) {
            Ok(()) => signer.answer(&call).await,
            Err(status) => Err(status),
        };
        noted.end(match &answer {
            Ok(_) => Outcome::Answered,
            Err(status) => Outcome::Refused(status.code()),
        });
        let cert_chain = answer?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The record of a running call.
struct Noted<'a> {
    signer: &'a Signer,
    serial: usize,
    outcome: Outcome,
}

impl<'a> Noted<'a> {
    fn new(signer: &'a Signer, call: CertificateCall) -> Self {
        let mut serial = 0;
        signer.calls.send_modify(|calls| {
            serial = calls.len();
            calls.push(call);
        });
        Self {
            signer,
            serial,
            outcome: Outcome::Cancelled,
        }
    }

    fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        let outcome = self.outcome;
        let calls = &self.signer.calls;
        calls.send_modify(|calls| calls[self.serial].end(outcome));
    }
}

/// Peers whose clocks are behind accept new certificates at once.
const BACKDATED: Duration = Duration::from_secs(120);
