//! What a workload of a large mesh costs, measured with an allocator that counts.
#![expect(clippy::print_stdout, reason = "a test that measures tells what")]

use culvert::mesh::{Mesh, Report, View};
use prost::Message;
use testkit::Population;
use xds_client::{
    Batch, Extent, Kind,
    proto::{discovery::Resource, workload as pb},
};

const WORKLOADS: usize = 10_000;

/// What a control plane sends: version and name as istiod makes them.
fn push(extent: Extent, addresses: impl Iterator<Item = pb::Address>) -> Batch {
    let encoded = addresses.zip(1_u64..).map(|(address, version)| {
        let name = match address.r#type.as_ref() {
            Some(pb::address::Type::Workload(workload)) => workload.uid.clone(),
            Some(pb::address::Type::Service(one)) => format!("{}/{}", one.namespace, one.hostname),
            None => String::new(),
        };
        let version = version.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let resource = Resource::new(&name, &format!("{version:016x}"), &address);
        resource.encode_to_vec().into()
    });
    Batch::new(Kind::Address, extent, encoded.collect(), Vec::new())
}

fn put(mesh: &Mesh, batch: &Batch) -> Report {
    let report = mesh.apply(batch);
    assert_eq!(report.rejected, []);
    report
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn a_workload_costs_less_than_400_bytes_and_gives_them_back() {
    let population = Population::new(u32::try_from(WORKLOADS).expect("a small number"));
    let mesh = Mesh::new(View {
        node_name: Some("ip-10-1-2-0007.compute.internal".into()),
        network: "network-1".into(),
        cluster_id: "cluster-east-1".into(),
    });
    let services = push(Extent::Changes, population.services().map(Into::into));
    let pods = push(Extent::Changes, population.pods().map(Into::into));
    let message: usize = pods
        .resources()
        .flatten()
        .map(|one| one.encoded_len())
        .sum();
    let empty = sys::allocated();
    put(&mesh, &services);
    let with_services = sys::allocated();
    sys::forget_peak();
    put(&mesh, &pods);
    let (full, peak) = (sys::allocated(), sys::peak());
    let per_workload = (full - with_services) / WORKLOADS;
    let with_share = (full - empty) / WORKLOADS;
    println!("{per_workload} bytes per workload; {with_share} with its share of services");
    assert!(per_workload < 400, "{per_workload} bytes per workload");
    assert!(
        with_share < 400,
        "{with_share} bytes with its share of services"
    );
    // The message itself was allocated before and is not counted in either.
    println!(
        "{} bytes at the peak of {message} bytes of message",
        peak - empty
    );
    assert!(
        peak - empty < 2 * (full - empty),
        "{} bytes at the peak, {} in the end",
        peak - empty,
        full - empty
    );

    assert!(!put(&mesh, &pods).is_effective());
    let repeated = sys::allocated();
    assert!(
        repeated <= full + full / 100,
        "what is repeated takes no memory: {repeated} after {full}"
    );

    put(&mesh, &push(Extent::Everything, std::iter::empty()));
    let after = sys::allocated();
    let kept = after.saturating_sub(empty);
    println!("{kept} bytes kept by an empty mesh that was full");
    assert!(
        kept < (full - empty) / 50,
        "{kept} of {} bytes kept",
        full - empty
    );
}

/// An allocator that counts.
#[expect(unsafe_code, reason = "a global allocator is unsafe by its nature")]
mod sys {
    use std::{
        alloc::{GlobalAlloc, Layout, System},
        sync::atomic::{AtomicUsize, Ordering},
    };

    /// Bytes allocated and not freed, each allocation rounded up as jemalloc's size classes do it.
    pub(crate) fn allocated() -> usize {
        ALLOCATED.load(Ordering::Relaxed)
    }

    /// The most that was allocated since [`forget_peak`].
    pub(crate) fn peak() -> usize {
        PEAK.load(Ordering::Relaxed)
    }

    pub(crate) fn forget_peak() {
        PEAK.store(allocated(), Ordering::Relaxed);
    }

    static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
    static PEAK: AtomicUsize = AtomicUsize::new(0);

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    struct Counting;

    // SAFETY: every call goes to the system allocator unchanged.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let size = class(layout.size());
            let before = ALLOCATED.fetch_add(size, Ordering::Relaxed);
            PEAK.fetch_max(before + size, Ordering::Relaxed);
            // SAFETY: the caller keeps the contract of `alloc`.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            ALLOCATED.fetch_sub(class(layout.size()), Ordering::Relaxed);
            // SAFETY: the caller keeps the contract of `dealloc`.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    /// Four classes per doubling, sixteen bytes apart at least.
    fn class(size: usize) -> usize {
        let spacing = (size.next_power_of_two() / 8).max(16);
        size.next_multiple_of(spacing)
    }
}
