//! What a control plane may tell, and a client of the SOCKS5 port, for the fuzzer, and for the test that replays its seeds.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use futures_util::FutureExt as _;
use prost::Message as _;
use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use xds_client::{Batch, Extent, Kind, proto::discovery::DeltaDiscoveryResponse};

use super::socks5::negotiate;
use crate::{
    mesh::{Mesh, State, View, Workload},
    policy::{self, Connection},
    route::{self, Authority, InboundQuery, LoopGuard, OutboundQuery},
};

/// A response of the control plane: it is applied, and then every workload calls every address of the mesh.
///
/// # Panics
/// When a resource makes a difference a second time.
pub fn push(bytes: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else {
        return;
    };
    let mesh = Mesh::new(View {
        node_name: Some("node-0".into()),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
    });
    let url = &response.type_url;
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.type_url() == url) else {
        return;
    };
    let DeltaDiscoveryResponse {
        resources,
        removed_resources: removed,
        ..
    } = response;
    // Of several resources, one may be told twice, differently.
    let is_one = resources.len() == 1 && removed.is_empty();
    let batch = Batch::new(kind, Extent::Everything, resources, removed);
    let _report = mesh.apply(&batch);
    call_all(&mesh.read());
    if is_one {
        assert!(!mesh.apply(&batch).is_effective(), "a second time");
    }
}

/// Everybody calls everybody, as far as they are few.
fn call_all(state: &State) {
    let mut targets: Vec<IpAddr> = vec![[10, 0, 0, 9].into()];
    let workloads: Vec<&Arc<Workload>> = state.workloads().take(FEW).collect();
    for workload in &workloads {
        targets.extend(workload.addresses().iter().take(2));
    }
    for service in state.services().take(FEW) {
        targets.extend(service.vips().iter().take(2).map(|vip| vip.ip));
    }
    for source in &workloads {
        for target in &targets {
            call(state, source, SocketAddr::new(*target, 80));
        }
    }
}

/// `source` calls, and is called as if it were what is called.
fn call(state: &State, source: &Arc<Workload>, to: SocketAddr) {
    let ip = source.addresses().first();
    let ip = ip.copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let ask = OutboundQuery {
        source,
        source_ip: ip,
        destination: to,
        avoid: &[],
    };
    let guard = LoopGuard::default();
    let decided = route::outbound(state, &guard, &ask, &mut SmallRng::seed_from_u64(1));
    let _ = format!("{decided:?}");
    let ask = InboundQuery {
        local: source,
        local_ip: ip,
        authority: &Authority::address(to.ip(), to.port()),
        forwarded_host: None,
        localhost_app_tunnel: true,
    };
    let _ = route::inbound(state, &guard, &ask);
    let connection = Connection {
        source: SocketAddr::new(ip, 40000),
        destination: to,
        identity: source.identity(),
    };
    let _ = policy::authorize(state, source, &connection).is_allowed();
}

const FEW: usize = 12;

/// A client of the SOCKS5 port sends these bytes, of which the first 4 KiB count, and ends.
///
/// # Panics
/// When the server waits for more than there is, or takes a byte from behind a request.
pub fn socks5(bytes: &[u8]) {
    let sent = bytes.get(..MOST).unwrap_or(bytes);
    let talk = async {
        let (mut client, mut server) = duplex(MOST);
        client.write_all(sent).await?;
        client.shutdown().await?;
        let wanted = negotiate(&mut server, &None).await;
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await?;
        assert!(sent.ends_with(&rest), "{wanted:?} left {rest:?}");
        io::Result::Ok(())
    };
    assert!(talk.now_or_never().is_some(), "waits after the end");
}

const MOST: usize = 4096;

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_are_harmless() {
        testkit::seeds::replay("proxy/fuzz/seeds/mesh", super::push);
        testkit::seeds::replay("proxy/fuzz/seeds/socks5", super::socks5);
    }
}
