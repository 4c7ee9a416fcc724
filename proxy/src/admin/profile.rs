//! `/debug/pprof`: where processor time goes, and where memory came from.

mod heap;
mod image;
mod pprof;
mod sampling;
mod sys;

use std::{io, ops::RangeInclusive, str::FromStr, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};
use tokio::{sync::Semaphore, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use self::{
    image::images,
    sampling::{Wanted, sample},
};
use super::{
    http1::{Body, bytes, text},
    query::Query,
};

/// `/debug/pprof/profile`: samples all threads for a while. What it takes from the query is taken at once.
///
/// # Cancel safety
/// The sampling ends soon after the future is dropped.
pub(super) fn cpu(query: Query<'_>) -> impl Future<Output = Response<Body>> + Send + use<> {
    let seconds = within(query, "seconds", 10, SECONDS);
    let frequency = within(query, "frequency", 100, HERTZ);
    async move {
        let (seconds, frequency) = match (seconds, frequency) {
            (Ok(seconds), Ok(frequency)) => (seconds, frequency),
            (Err(fault), _) | (_, Err(fault)) => return text(StatusCode::BAD_REQUEST, fault),
        };
        let Ok(_alone) = ONE_AT_A_TIME.try_acquire() else {
            let busy = "another profile is being taken\n".to_owned();
            return text(StatusCode::CONFLICT, busy);
        };
        let length = Duration::from_secs(seconds);
        let stop = CancellationToken::new();
        let _stopped_with_this = stop.clone().drop_guard();
        let sampling = spawn_blocking(move || {
            let (wanted, images) = (Wanted { length, frequency }, images()?);
            let stacks = sample(wanted, &images, &stop)?;
            io::Result::Ok(stacks.profile(&images, length, frequency))
        });
        match sampling.await.map_err(io::Error::other).flatten() {
            Ok(profile) => bytes(Bytes::from(profile)),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, why(&error)),
        }
    }
}

/// `/debug/pprof/heap`: what is allocated, by where it was.
pub(super) async fn heap() -> Response<Body> {
    let dumping = spawn_blocking(|| heap::profile(&images()?));
    match dumping.await.map_err(io::Error::other).flatten() {
        Ok(profile) => bytes(Bytes::from(profile)),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// `/debug/pprof/heap/profiling`: begins or ends to take notes of allocations.
pub(super) fn heap_profiling(query: Query<'_>) -> Response<Body> {
    let active = query.value("activate");
    let Some(active) = active.and_then(|active| bool::from_str(&active).ok()) else {
        let usage = "activate=true or activate=false is expected\n".to_owned();
        return text(StatusCode::BAD_REQUEST, usage);
    };
    match heap::activate(active) {
        Ok(()) => text(StatusCode::OK, format!("heap profiling active: {active}\n")),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// A parameter, or what to use without it.
fn within(
    query: Query<'_>,
    name: &str,
    otherwise: u64,
    allowed: RangeInclusive<u64>,
) -> Result<u64, String> {
    let Some(given) = query.value(name) else {
        return Ok(otherwise);
    };
    let number = given.parse().ok();
    number
        .filter(|number| allowed.contains(number))
        .ok_or_else(|| {
            let (least, most) = (allowed.start(), allowed.end());
            format!("{name}={given:?} is not a number from {least} to {most}\n")
        })
}

/// What the kernel said, and what can be done about it.
fn why(error: &io::Error) -> String {
    let hint = if error.kind() == io::ErrorKind::PermissionDenied {
        "; it takes the capability PERFMON or SYS_ADMIN, or kernel.perf_event_paranoid of 2 or less, and a seccomp \
         profile that lets perf_event_open pass"
    } else {
        ""
    };
    format!("the kernel samples no processor time: {error}{hint}\n")
}

/// Samples cost time and locked memory.
static ONE_AT_A_TIME: Semaphore = Semaphore::const_new(1);
const SECONDS: RangeInclusive<u64> = 1..=300;
const HERTZ: RangeInclusive<u64> = 1..=1000;
