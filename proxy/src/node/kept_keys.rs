//! Where certificates and their keys outlast the process, as configured: in memory only.

use std::{fs, io, path::Path, sync::Arc};

use cert_agent::{KeptSource, Source, TrustBundle};
use nix::sys::{
    stat::{major, minor, stat},
    statfs::{FsType, TMPFS_MAGIC, statfs},
};

use super::{StartError, trust};
use crate::config::{CertificateSource, Config};

/// The source whose certificates outlast the process, if they are to. Keys must not reach a disk: a directory elsewhere than in
/// memory is refused. A certificate is recalled for the authority that signed it and while its root is among those of `trust`.
pub(super) fn outlasting(
    config: &Config,
    source: Arc<dyn Source>,
    trust: &TrustBundle,
) -> Result<Arc<dyn Source>, StartError> {
    let Some(directory) = &config.control.kept_keys else {
        return Ok(source);
    };
    let failed = |source| StartError::Keys {
        path: directory.clone(),
        source,
    };
    if !is_in_memory(directory).map_err(failed)? {
        let reason = "not in memory: a tmpfs is needed, such as an emptyDir with medium Memory";
        return Err(failed(io::Error::other(reason)));
    }
    let authority = match &config.control.certificates {
        // It needs nobody to sign, and those of an earlier process may have had another root.
        CertificateSource::InProcess { .. } => return Ok(source),
        CertificateSource::Istio(_) => "istio",
        CertificateSource::OpenBao(_) => "openbao",
    };
    if let Some(path) = &config.tls.trust_file {
        // Now rather than a moment later. What is wrong with the file is told by who follows it.
        let _ = trust.load_file(trust::ROOT_FILE, path);
    }
    let kept = KeptSource::new(source, directory.join(authority), trust.clone());
    let kept = kept.map_err(failed)?;
    if may_be_swapped(directory) {
        tracing::warn!(
            path = %directory.display(),
            "keys are kept in memory that the system may swap to a disk: turn swap off, or mount with noswap"
        );
    }
    Ok(Arc::new(kept))
}

/// Asks for what there is of the path, so that nothing is made where it must not be.
fn is_in_memory(directory: &Path) -> io::Result<bool> {
    let mut existing = directory.ancestors().filter(|path| path.exists());
    let existing = existing.next().unwrap_or(directory);
    let kind = statfs(existing)?.filesystem_type();
    Ok([TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind))
}

/// Whether there is swap space and the file system of `directory` lets itself be swapped, as far as the kernel tells.
fn may_be_swapped(directory: &Path) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Ok(device) = stat(directory).map(|status| status.st_dev) else {
        return false;
    };
    // After a line of headings.
    let has_swap = swaps.lines().count() > 1;
    has_swap && swappable(&mounts, &format!("{}:{}", major(device), minor(device)))
}

/// Whether the mount table shows `device` as a tmpfs without `noswap`.
fn swappable(mounts: &str, device: &str) -> bool {
    let mut lines = mounts.lines();
    lines.any(|line| {
        let options = line.split_once(" - tmpfs ").map(|(mount, options)| {
            let of_device = mount.split(' ').nth(2) == Some(device);
            (of_device, options)
        });
        options.is_some_and(|(of_device, options)| {
            let mut options = options.rsplit(' ').next().unwrap_or_default().split(',');
            of_device && !options.any(|option| option == "noswap")
        })
    })
}

/// The older of the file systems in memory, which is never swapped.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_tells_whether_it_is_swapped() {
        let mounts = "\
            25 30 0:23 / /proc rw,nosuid shared:5 - proc proc rw\n\
            43 30 0:41 / /run/keys rw,relatime shared:9 - tmpfs tmpfs rw,size=1024k,noswap\n\
            44 30 0:42 / /run/other rw,relatime - tmpfs tmpfs rw,size=1024k\n\
            45 30 0:43 / /run/ram rw,relatime - ramfs none rw\n";
        let told = ["0:23", "0:41", "0:42", "0:43"].map(|device| swappable(mounts, device));
        assert_eq!(told, [false, false, true, false]);
    }

    #[test]
    fn only_memory_counts_as_memory() {
        let below = |path: &str| is_in_memory(&Path::new(path).join("not/there/yet")).unwrap();
        assert!(below("/dev/shm"));
        assert!(!below("/proc"));
    }
}
