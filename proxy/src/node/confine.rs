//! What the process gives up for good, so that whoever takes it over gets no more than it needs.

use std::io;

use nix::{
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::geteuid,
};
use rustix::thread::{
    CapabilitySet, capabilities, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Keeps the capabilities that serving pods takes, as far as they are there, and can gain no other one again.
///
/// Capabilities belong to threads, and the allocator has one of its own before `main` begins. So if there was anything to give up
/// (true), the process must start its program again, which then has nothing more to give up in any thread. Root has its
/// capabilities again after that; to anybody else they are handed on.
///
/// # Errors
/// If the kernel refuses, which it does for no reason that an operator could have.
pub fn give_up_privileges() -> io::Result<bool> {
    let mut sets = capabilities(None)?;
    let starts_again = !KEPT.contains(sets.permitted | sets.inheritable);
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        // Without SETPCAP, as in a container, this is not allowed; the bounding set is small then, and what follows forbids to
        // gain anything from it.
        let _ = remove_capability_from_bounding_set(capability);
    }
    clear_ambient_capability_set()?;
    sets.permitted &= KEPT;
    sets.effective &= KEPT;
    let handed_on = if starts_again && !geteuid().is_root() {
        sets.permitted
    } else {
        CapabilitySet::empty()
    };
    sets.inheritable = handed_on;
    set_capabilities(None, sets)?;
    for capability in handed_on.iter() {
        configure_capability_in_ambient_set(capability, true)?;
    }
    set_no_new_privs(true)?;
    Ok(starts_again)
}

/// Keeps the memory of this process, with keys and tokens in it, out of core dumps and from other processes of the same user.
///
/// # Errors
/// If the kernel refuses.
pub fn hide_memory() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

/// `setns` for the namespaces of pods that are yet to come; marks and transparent sockets in them.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_three_capabilities() {
        // Capabilities are the thread's: the others of the test are not touched.
        let sets = std::thread::spawn(|| {
            give_up_privileges().unwrap();
            assert!(!give_up_privileges().unwrap(), "nothing is left to give up");
            capabilities(None).unwrap()
        });
        let sets = sets.join().unwrap();
        assert!(KEPT.contains(sets.permitted) && KEPT.contains(sets.effective));
        assert!(sets.inheritable.is_empty());
    }
}
