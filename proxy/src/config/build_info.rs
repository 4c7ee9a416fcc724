//! What this binary was built from.

use serde::Serialize;

/// The facts of the build, under the names that the config dump gives them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct BuildInfo {
    /// Version of the proxy.
    pub version: &'static str,
    /// Commit, or `unknown` outside of a checkout.
    pub git_revision: &'static str,
    /// Compiler.
    pub rust_version: &'static str,
    /// `debug` or `release`.
    pub build_profile: &'static str,
    /// `Clean`, or `Modified` if the checkout had changes.
    pub build_status: &'static str,
    /// `ISTIO_META_ISTIO_VERSION`: the Istio version the image is made for.
    pub istio_version: String,
    /// The cryptography library.
    pub crypto_provider: &'static str,
}

impl BuildInfo {
    /// The build of this binary. The Istio version is a fact of the image.
    #[must_use]
    pub fn new(istio_version: &str) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            git_revision: env!("CULVERT_GIT_REVISION"),
            rust_version: env!("CULVERT_RUST_VERSION"),
            build_profile: env!("CULVERT_BUILD_PROFILE"),
            build_status: env!("CULVERT_BUILD_STATUS"),
            istio_version: istio_version.to_owned(),
            crypto_provider: "aws-lc-rs",
        }
    }
}

impl std::fmt::Display for BuildInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "version.BuildInfo{{Version:{:?}, GitRevision:{:?}, RustVersion:{:?}, BuildProfile:{:?}, \
             BuildStatus:{:?}, IstioVersion:{:?}, CryptoProvider:{:?}}}",
            self.version,
            self.git_revision,
            self.rust_version,
            self.build_profile,
            self.build_status,
            self.istio_version,
            self.crypto_provider,
        )
    }
}
