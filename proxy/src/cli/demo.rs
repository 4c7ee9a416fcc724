//! `culvert demo`: hands over to the demonstration, a program of its own.
//!
//! It needs the test kit (namespaces as pods, a stand-in for the CNI agent), which has no place
//! in the binary that is shipped.

use std::{ffi::OsString, io, os::unix::process::CommandExt as _, path::PathBuf, process};

/// Why the demonstration did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// It is not installed.
    #[error(
        "the demonstration is a program of its own, and {path} does not exist; \
         in a checkout of the project, `make demo` builds and runs it",
        path = .0.display()
    )]
    Absent(PathBuf),
    /// It is there but does not start.
    #[error("cannot run {path}", path = .path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// This program cannot tell where it is.
    #[error("cannot find the directory of this program, where culvert-demo would be")]
    Whereabouts(#[source] io::Error),
}

/// Becomes the `culvert-demo` that lies beside this executable, so it only returns on failure.
#[must_use]
pub fn demo(arguments: Vec<OsString>) -> DemoError {
    let path = match std::env::current_exe() {
        Ok(own) => own.with_file_name("culvert-demo"),
        Err(error) => return DemoError::Whereabouts(error),
    };
    let source = process::Command::new(&path).args(arguments).exec();
    if source.kind() == io::ErrorKind::NotFound {
        DemoError::Absent(path)
    } else {
        DemoError::Run { path, source }
    }
}
