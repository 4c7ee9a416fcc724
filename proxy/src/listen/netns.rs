//! A network namespace, and the short excursion into it.

use std::{
    fs::File,
    io,
    io::Write as _,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::MetadataExt as _,
    sync::{Arc, OnceLock},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, fstatfs},
};

/// An open network namespace. Holding it keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
}

/// What tells two namespaces apart: two descriptors with equal ids are the same namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl Netns {
    /// Takes over a descriptor of a namespace, for example one that the CNI agent sent.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is not a namespace file; the errors of `fstat`. The
    /// descriptor is closed then.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let kind = fstatfs(&fd)?.filesystem_type();
        // Namespace files live in nsfs; kernels before 3.19 kept them in procfs.
        if kind != NSFS_MAGIC && kind != PROC_SUPER_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is not a network namespace",
            ));
        }
        let file = File::from(fd);
        let id = NetnsId::of(&file)?;
        Ok(Self { file, id })
    }

    /// The namespace this process runs in (that of its main thread), opened once.
    ///
    /// # Errors
    /// If `/proc` does not show it.
    pub fn current() -> io::Result<Arc<Self>> {
        static HOME: OnceLock<Arc<Netns>> = OnceLock::new();
        if let Some(home) = HOME.get() {
            return Ok(Arc::clone(home));
        }
        let own = Self::from_fd(File::open("/proc/self/ns/net")?.into())?;
        Ok(Arc::clone(HOME.get_or_init(|| Arc::new(own))))
    }

    /// Which namespace this is.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` inside this namespace, on the calling thread, and comes back to
    /// [`Netns::current`]. Nothing can be awaited inside. If `work` panics the thread comes back
    /// too. When this *is* the current namespace, `work` just runs.
    ///
    /// Calls do not nest: after an inner excursion the outer one would go on at home.
    ///
    /// # Errors
    /// If the namespace cannot be entered; `work` did not run then.
    ///
    /// # Aborts
    /// If the way back fails. A worker left in the namespace of a pod would open the sockets of
    /// other pods, or of the control plane, there.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let home = Self::current()?;
        if home.id == self.id {
            return Ok(work());
        }
        setns(self, CloneFlags::CLONE_NEWNET)?;
        let _way_back = WayBack(home);
        Ok(work())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl NetnsId {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
        })
    }
}

/// Returns to the process's own namespace when dropped, or ends the process.
struct WayBack(Arc<Netns>);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(error) = setns(&*self.0, CloneFlags::CLONE_NEWNET) {
            // Straight to the descriptor: the log writer is another thread, and would be late.
            let text = format!("fatal: cannot leave the network namespace of a pod: {error}\n");
            let _ = io::stderr().write_all(text.as_bytes());
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::testing::fresh_netns;

    fn here() -> NetnsId {
        NetnsId::of(&File::open("/proc/thread-self/ns/net").unwrap()).unwrap()
    }

    #[test]
    fn comes_back_after_work_and_after_a_panic() {
        let pod = fresh_netns();
        let home = here();
        assert_ne!(pod.id(), home);
        assert_eq!(pod.enter(here).unwrap(), pod.id());
        assert_eq!(here(), home);

        let unwound =
            std::panic::catch_unwind(|| pod.enter(|| panic!("inside the excursion")).unwrap());
        assert!(unwound.is_err());
        assert_eq!(here(), home);
    }

    #[test]
    fn stays_where_it_is_for_its_own_namespace() {
        let own = Netns::current().unwrap();
        assert_eq!(own.id(), here());
        assert_eq!(own.enter(here).unwrap(), own.id());
    }

    #[test]
    fn two_descriptors_of_one_namespace_have_one_id() {
        let pod = fresh_netns();
        let again = pod.as_fd().try_clone_to_owned().unwrap();
        assert_eq!(Netns::from_fd(again).unwrap().id(), pod.id());
    }

    #[test]
    fn refuses_what_is_not_a_namespace() {
        let file = tempfile::tempfile().unwrap();
        let refused = Netns::from_fd(file.into()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        // A namespace of another kind looks right until it is entered.
        let mount = File::open("/proc/self/ns/mnt").unwrap();
        let mount = Netns::from_fd(mount.into()).unwrap();
        assert!(mount.enter(|| ()).is_err());
    }
}
