//! Tokens for calls: one for all identities, got when first needed, replaced before it ends or when it is refused, by one
//! login at a time; or, where each workload logs in for itself, one for each certificate, which is not kept.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{
    client::{Call, Client},
    failure::{Failure, Step},
    secret::{failed, read},
    settings::{Jwt, Login},
    wire::{self, AppRoleLogin, JwtLogin, LoggedIn},
};
use crate::{Retry, SpiffeId};

/// The token of this process.
pub(super) struct Tokens {
    login: Login,
    state: Mutex<State>,
    /// Whose turn it is to log in; the state is never locked meanwhile.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    token: Option<Token>,
    /// How many logins have ended, and how the last one failed.
    ended: u64,
    failure: Option<Failure>,
    /// No login before: the last one failed a moment ago.
    not_before: Option<Instant>,
    /// The token is brand-new and yet refused: until then another one would be, too.
    pointless_until: Option<Instant>,
}

struct Token {
    value: HeaderValue,
    /// `None`: it does not end.
    life: Option<Life>,
}

struct Life {
    renew_at: Instant,
    end: Instant,
}

impl Tokens {
    pub(super) fn new(login: Login) -> Self {
        Self {
            login,
            state: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// The token to have a certificate of `id` signed with.
    ///
    /// That of all identities comes after a login if there is none, or if two thirds of its life are over. One that is
    /// still good is used on while logins fail.
    ///
    /// # Cancel safety
    /// A login under way is lost; whoever waits next makes another one.
    pub(super) async fn token(
        &self,
        client: &Client,
        id: &SpiffeId,
    ) -> Result<HeaderValue, Failure> {
        if self.login.is_per_workload() {
            return Ok(Box::pin(self.log_in(client, id)).await?.token);
        }
        let ended = {
            let state = self.state.lock();
            if let Some(token) = state.fresh(Instant::now()) {
                return Ok(token);
            }
            state.ended
        };
        let _turn = self.turn.lock().await;
        {
            let (state, now) = (self.state.lock(), Instant::now());
            if let Some(token) = state.fresh(now) {
                return Ok(token);
            }
            let just_failed = state.ended != ended || state.not_before.is_some_and(|at| now < at);
            if let Some(failure) = state.failure.as_ref().filter(|_| just_failed) {
                return state.usable(now).ok_or_else(|| failure.clone());
            }
        }
        let outcome = Box::pin(self.log_in(client, id)).await;
        self.state.lock().take(outcome)
    }

    /// Another token in place of `refused`, if there is reason to hope that it is not refused as well.
    ///
    /// # Cancel safety
    /// As [`Tokens::token`].
    pub(super) async fn replace(
        &self,
        client: &Client,
        id: &SpiffeId,
        refused: &HeaderValue,
    ) -> Result<Option<HeaderValue>, Failure> {
        if self.login.is_per_workload() {
            return Ok(None); // it is a moment old
        }
        {
            let mut state = self.state.lock();
            if state.pointless_until.is_some_and(|at| Instant::now() < at) {
                return Ok(None);
            }
            if state.token.as_ref().is_some_and(|it| it.value == *refused) {
                state.token = None;
            }
        }
        let token = self.token(client, id).await?;
        Ok((token != *refused).then_some(token))
    }

    /// The token that [`Tokens::replace`] gave is refused, too: it is not about the token.
    pub(super) fn refused_again(&self) {
        self.state.lock().pointless_until = Some(Instant::now() + POINTLESS);
    }

    async fn log_in(&self, client: &Client, id: &SpiffeId) -> Result<LoggedIn, Failure> {
        let (mount, body, secret) = match &self.login {
            Login::TokenFile(path) => {
                let text = read(path).await?;
                let token = wire::token_value(&text)
                    .ok_or_else(|| failed(format!("there is no token in {}", path.display())))?;
                let life = Duration::ZERO;
                return Ok(LoggedIn { token, life });
            }
            Login::Kubernetes { mount, role, jwt } => {
                with_jwt(mount, Some(role), jwt.read(id).await?)?
            }
            Login::Jwt { mount, role, jwt } => {
                with_jwt(mount, role.as_deref(), jwt.read(id).await?)?
            }
            Login::AppRole {
                mount,
                role_id,
                secret_id,
            } => {
                let role_id = read(role_id).await?;
                let secret = match secret_id {
                    Some(path) => Some(read(path).await?),
                    None => None,
                };
                let body = AppRoleLogin {
                    role_id: role_id.trim(),
                    secret_id: secret.as_deref().map(|secret| secret.trim()),
                };
                let size = role_id.len() + secret.as_ref().map_or(0, |secret| secret.len());
                let body = wire::body(&body, size).map_err(|error| failed(error.to_string()))?;
                (mount.as_str(), body, secret.unwrap_or_default())
            }
        };
        let path = format!("auth/{mount}/login");
        let call = Call {
            step: Step::Login,
            path: &path,
            token: None,
            secret: Some(secret.trim()),
            body: Some(body),
            max_answer: MAX_ANSWER,
        };
        LoggedIn::parse(&client.call(&call).await?)
    }
}

impl State {
    /// The token, unless it is time for another one.
    fn fresh(&self, now: Instant) -> Option<HeaderValue> {
        let token = self.token.as_ref()?;
        let fresh = token.life.as_ref().is_none_or(|life| now < life.renew_at);
        fresh.then(|| token.value.clone())
    }

    /// The token, unless it has ended.
    fn usable(&self, now: Instant) -> Option<HeaderValue> {
        let token = self.token.as_ref()?;
        let usable = token.life.as_ref().is_none_or(|life| now < life.end);
        usable.then(|| token.value.clone())
    }

    /// Notes how a login ended.
    fn take(&mut self, outcome: Result<LoggedIn, Failure>) -> Result<HeaderValue, Failure> {
        let now = Instant::now();
        self.ended += 1;
        match outcome {
            Ok(LoggedIn { token, life }) => {
                let life = (!life.is_zero()).then(|| Life {
                    renew_at: now + life * 2 / 3,
                    end: now + life,
                });
                self.token = Some(Token {
                    value: token.clone(),
                    life,
                });
                (self.failure, self.not_before) = (None, None);
                tracing::debug!("logged in at OpenBao");
                Ok(token)
            }
            Err(failure) => {
                let pause = match failure.retry {
                    Retry::After(pause) => pause.max(MIN_SPACING),
                    Retry::Soon | Retry::Slowly => MIN_SPACING,
                };
                self.not_before = Some(now + pause);
                self.failure = Some(failure.clone());
                let old = self.usable(now);
                if old.is_some() {
                    tracing::warn!(%failure, "no new token; the former one is still good");
                }
                old.ok_or(failure)
            }
        }
    }
}

impl Jwt {
    /// The token to show for `id`.
    async fn read(&self, id: &SpiffeId) -> Result<Zeroizing<String>, Failure> {
        match self {
            Self::Own(path) => read(path).await,
            // Neither part can lead out of the directory.
            Self::Directory(path) => {
                read(&path.join(id.namespace()).join(id.service_account())).await
            }
            Self::Requested(api) => api.token_of(id).await,
        }
    }
}

fn with_jwt<'a>(
    mount: &'a str,
    role: Option<&str>,
    jwt: Zeroizing<String>,
) -> Result<(&'a str, Bytes, Zeroizing<String>), Failure> {
    let login = JwtLogin {
        role,
        jwt: jwt.trim(),
    };
    let body = wire::body(&login, jwt.len()).map_err(|error| failed(error.to_string()))?;
    Ok((mount, body, jwt))
}

const MAX_ANSWER: usize = 64 * 1024;
/// Between a login that failed and the next one, whoever asks.
const MIN_SPACING: Duration = Duration::from_secs(1);
/// How long a refusal is not taken for one of the token.
const POINTLESS: Duration = Duration::from_secs(30);
