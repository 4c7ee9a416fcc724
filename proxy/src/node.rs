//! The composition root: builds the parts of the proxy, owns its tasks, starts and stops them.

mod available;
mod error;

use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};

use crate::config::Config;
pub use available::check_available;
pub use error::StartError;

/// Runs the proxy until SIGTERM or SIGINT asks it to stop.
///
/// # Errors
/// [`StartError`] if it cannot start; nothing is left running then.
pub fn run(config: &Config) -> Result<(), StartError> {
    check_available(&config.control)?;
    let control = runtime(Builder::new_current_thread().thread_name("control"))?;
    let _data = runtime(
        Builder::new_multi_thread()
            .thread_name("data")
            .worker_threads(config.runtime.worker_threads),
    )?;
    control.block_on(stop_signal()).map_err(StartError::Signals)
}

fn runtime(builder: &mut Builder) -> Result<Runtime, StartError> {
    builder.enable_all().build().map_err(StartError::Runtime)
}

async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
