//! With how little the proxy makes do, and what it gives up by itself.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    collections::BTreeSet,
    fs::Permissions,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use testkit::{
    Cluster, Mesh, Node, NodeRun, PodSpec, Proxy, ProxyOptions, stage::Pair, traffic::Behaviour,
    wait,
};

/// NET_ADMIN, NET_RAW, SYS_ADMIN.
const KEPT: u64 = 1 << 12 | 1 << 13 | 1 << 21;

/// The lines of all threads' status that begin with `key`, without it.
fn of_threads(proxy: &Proxy<'_>, key: &str) -> BTreeSet<String> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", proxy.pid())).unwrap();
    let statuses = threads.map(|thread| {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().trim().to_owned()
    });
    statuses.collect()
}

/// Checks that no thread can do or become more than it must.
fn is_confined(proxy: &Proxy<'_>) {
    let kept = format!("{KEPT:016x}");
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(of_threads(proxy, set), [kept.clone()].into(), "{set}");
    }
    let nothing = format!("{:016x}", 0);
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(of_threads(proxy, set), [nothing.clone()].into(), "{set}");
    }
    assert_eq!(of_threads(proxy, "NoNewPrivs:"), ["1".to_owned()].into());
}

/// Starts both nodes with these words before the proxy's, and has traffic of all kinds pass: to a service over HBONE, plaintext in, a
/// pod that comes later, one that goes.
async fn carries(stage: &Pair, wrapper: &[&str]) {
    let mut mesh = stage.mesh();
    let late = stage.world.node(0).pod(&PodSpec::captured("late")).unwrap();
    let plain = stage.world.node(0).pod(&PodSpec::plain("plain")).unwrap();
    mesh.pod(&late);
    mesh.write(&ProxyOptions::mesh_file(&stage.world)).unwrap();
    let options = |node: &Node| ProxyOptions::new(&stage.world, node).wrapped(wrapper);
    let pods = [&stage.web, &stage.api];
    let cluster = Cluster::run(&stage.world, options, &pods).await.unwrap();
    is_confined(cluster.proxy(0));
    let _app = stage.api.serve(8080, Behaviour::Echo).unwrap();
    let hello = b"hello";
    assert_eq!(stage.web.ask(Pair::SERVICE, hello).await.unwrap(), hello);
    let _whoami = stage.api.serve(8081, Behaviour::Whoami).unwrap();
    let seen = plain.seen_as(stage.api.at(8081)).await.unwrap();
    assert_eq!(seen.ip(), plain.ip4());
    let NodeRun { session, proxy, .. } = &cluster.nodes[0];
    assert_eq!(session.add(&late).await.unwrap(), Ok(()));
    assert_eq!(late.ask(Pair::SERVICE, hello).await.unwrap(), hello);
    assert_eq!(session.del(late.uid()).await.unwrap(), Ok(()));
    assert!(proxy.metrics().await.is_ok());
    assert!(proxy.document("/config_dump").await.is_ok());
    for NodeRun { mut proxy, .. } in cluster.nodes {
        proxy.signal(Signal::SIGTERM).unwrap();
        let end = proxy.exit(wait::SOON).await.unwrap();
        assert_eq!(end.code(), Some(0), "{end:?}");
    }
}

#[tokio::test]
async fn three_capabilities_and_a_root_that_cannot_be_written_are_enough() {
    let stage = Pair::new().unwrap();
    // Without root there is no second group.
    let groups = std::fs::read_to_string("/proc/self/gid_map").unwrap();
    let group = match groups.split_whitespace().nth(2) {
        Some("1") => "",
        _ => "--regid=1337 --clear-groups",
    };
    let narrow = format!(
        "mount -o remount,bind,ro / && ! touch /written 2>/dev/null && \
        exec setpriv {group} --bounding-set=-all,+net_admin,+net_raw,+sys_admin --inh-caps=-all --no-new-privs \"$0\" \"$@\""
    );
    carries(&stage, &["unshare", "--mount", "sh", "-c", &narrow]).await;
}

#[tokio::test]
async fn what_is_not_needed_is_given_up() {
    let stage = Pair::new().unwrap();
    carries(&stage, &[]).await;
}

#[tokio::test]
async fn another_user_keeps_what_it_needs_and_no_more() {
    let stage = Pair::new().unwrap();
    let mesh = ProxyOptions::mesh_file(&stage.world);
    Mesh::of(&[]).write(&mesh).unwrap();
    for path in [stage.world.directory(), &mesh] {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    // Without root there is no second user.
    let users = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    if users.split_whitespace().nth(2) == Some("1") {
        return;
    }
    let three = "-all,+net_admin,+net_raw,+sys_admin";
    for capabilities in [three.to_owned(), format!("{three},+setpcap,+chown")] {
        let inherited = format!("--inh-caps={capabilities}");
        let ambient = format!("--ambient-caps={capabilities}");
        let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let wrapper = [&["setpriv"], &user[..], &[&*inherited, &*ambient]].concat();
        let options = ProxyOptions::new(&stage.world, stage.world.node(0)).wrapped(&wrapper);
        let mut proxy = options.start(stage.world.node(0)).unwrap();
        proxy
            .log()
            .wait("the start", |line| line.raw.contains("state manager"))
            .await;
        let kept = format!("{KEPT:016x}");
        for set in ["CapEff:", "CapPrm:"] {
            assert_eq!(of_threads(&proxy, set), [kept.clone()].into(), "{set}");
        }
        assert_eq!(
            of_threads(&proxy, "Uid:"),
            ["65534\t65534\t65534\t65534".to_owned()].into()
        );
        let metrics = proxy.metrics().await.unwrap();
        assert!(metrics.sum("process_open_fds", &[]) > 0.0);
        // The next one takes the same ports.
        proxy.signal(Signal::SIGTERM).unwrap();
        proxy.exit(wait::SOON).await.unwrap();
    }
}

/// How a proxy ends that is told to dump its memory, and the dump.
async fn dumped(stage: &Pair, core_dumps: &str) -> (bool, Option<PathBuf>) {
    Mesh::of(&[])
        .write(&ProxyOptions::mesh_file(&stage.world))
        .unwrap();
    let directory = tempfile::tempdir_in(stage.world.directory())
        .unwrap()
        .keep();
    let enter = format!(
        "cd {} && ulimit -c unlimited && exec \"$0\" \"$@\"",
        directory.display()
    );
    let options = ProxyOptions::new(&stage.world, stage.world.node(0));
    let options = options
        .env("CORE_DUMPS", core_dumps)
        .wrapped(&["sh", "-c", &enter]);
    let mut proxy = options.start(stage.world.node(0)).unwrap();
    proxy
        .log()
        .wait("the start", |line| line.raw.contains("state manager"))
        .await;
    proxy.signal(Signal::SIGQUIT).unwrap();
    let end = proxy.exit(wait::SOON).await.unwrap();
    let core = std::fs::read_dir(&directory).unwrap().next();
    (end.core_dumped(), core.map(|file| file.unwrap().path()))
}

#[tokio::test]
async fn secrets_are_not_in_core_dumps() {
    let stage = Pair::new().unwrap();
    let (dumps, core) = dumped(&stage, "false").await;
    assert!(!dumps && core.is_none());
    // That the test can tell: on demand there is one.
    if std::fs::read_to_string("/proc/sys/kernel/core_pattern")
        .unwrap()
        .trim()
        == "core"
    {
        let (dumps, core) = dumped(&stage, "true").await;
        assert!(dumps && core.is_some());
    }
}

#[tokio::test]
async fn the_seccomp_profile_lists_every_system_call() {
    let stage = Pair::new().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let profile = root.join("deploy/seccomp/culvert.json");
    let run = env!("CARGO_BIN_EXE_seccomp-exec");
    carries(&stage, &[run, profile.to_str().unwrap()]).await;
}
