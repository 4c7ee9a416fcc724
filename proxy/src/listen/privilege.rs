//! Proof at start that the process may do what every pod will need.

use std::io;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use super::netns::Netns;

/// A privilege that the container lacks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// Namespaces cannot be entered.
    #[error("cannot enter network namespaces; add the capability SYS_ADMIN to the container")]
    EnterNamespace(#[source] io::Error),
    /// Packets cannot be marked.
    #[error(
        "cannot mark packets with {mark:#x}; add the capability NET_ADMIN (or NET_RAW on Linux 5.17 and later) to the container"
    )]
    Mark {
        /// The mark that was tried.
        mark: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Tries what serving a pod takes: entering a namespace (our own), and `mark` on a fresh socket.
///
/// # Errors
/// [`PrivilegeError`] names the capability that is missing.
pub fn check_privileges(mark: Option<u32>) -> Result<(), PrivilegeError> {
    let own = Netns::current().map_err(PrivilegeError::EnterNamespace)?;
    setns(&*own, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| PrivilegeError::EnterNamespace(errno.into()))?;
    let Some(mark) = mark else { return Ok(()) };
    Socket::new(Domain::IPV4, Type::STREAM, None)
        .and_then(|socket| socket.set_mark(mark))
        .map_err(|source| PrivilegeError::Mark { mark, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_with_the_capabilities() {
        check_privileges(Some(1337)).unwrap();
        check_privileges(None).unwrap();
    }

    #[test]
    fn the_message_names_the_capability() {
        let denied = || io::Error::from_raw_os_error(nix::libc::EPERM);
        let enter = PrivilegeError::EnterNamespace(denied());
        assert!(enter.to_string().contains("SYS_ADMIN"));
        let mark = PrivilegeError::Mark {
            mark: 1337,
            source: denied(),
        };
        assert!(mark.to_string().contains("NET_ADMIN"));
    }
}
