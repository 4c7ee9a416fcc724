//! One stream: what istiod answers to what it is told.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use prost::Message as _;
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, sleep},
};
use tonic::{Status, Streaming};
use xds_client::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};

use super::{
    Command, Kind, Shared,
    record::{Sent, Stream},
};

/// A running stream. Dropping it marks its record as closed.
#[derive(Debug)]
pub(super) struct Session {
    shared: Arc<Shared>,
    /// Place of its record.
    serial: usize,
    inbound: Streaming<DeltaDiscoveryRequest>,
    commands: broadcast::Receiver<Command>,
    /// Follows the catalogue and the faults.
    changes: watch::Receiver<u64>,
    node: Option<Node>,
    subscriptions: [Option<Subscription>; 2],
    outbox: VecDeque<Outgoing>,
    /// Changes up to here are in the outbox.
    generation: u64,
    nonces: u64,
}

#[derive(Debug)]
enum Subscription {
    Wildcard,
    /// On demand: names, keys and what was sent for them.
    Named(BTreeSet<String>),
}

/// What is to be sent, built when its turn comes.
#[derive(Debug)]
enum Outgoing {
    Response(Kind, Names),
    Injected(DeltaDiscoveryResponse),
}

#[derive(Debug)]
struct Names {
    resources: Vec<String>,
    removed: Vec<String>,
    with_aliases: bool,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        serial: usize,
        inbound: Streaming<DeltaDiscoveryRequest>,
    ) -> Self {
        let (commands, mut changes) = (shared.commands.subscribe(), shared.changes.subscribe());
        changes.mark_changed();
        let generation = shared.catalogue.lock().generation();
        Self {
            shared,
            serial,
            inbound,
            commands,
            changes,
            node: None,
            subscriptions: [None, None],
            outbox: VecDeque::new(),
            generation,
            nonces: 0,
        }
    }

    /// The next response, or the end of the stream.
    pub(super) async fn next(&mut self) -> Option<Result<DeltaDiscoveryResponse, Status>> {
        loop {
            if let Some(response) = self.due() {
                let delay = self.shared.faults.lock().delay;
                sleep(delay).await;
                return Some(Ok(self.send(response)));
            }
            tokio::select! {
                biased; // what the client said goes before what has changed since
                request = self.inbound.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.take(request) {
                            return Some(Err(status));
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => return Some(Err(status)),
                },
                command = self.commands.recv() => match command.expect("a handled number of commands") {
                    Command::Inject(response) => self.outbox.push_back(Outgoing::Injected(response)),
                    Command::End(Ok(())) => return None,
                    Command::End(Err(status)) => return Some(Err(status)),
                },
                changed = self.changes.changed() => {
                    changed.expect("the sender is shared");
                    self.push();
                }
            }
        }
    }

    /// The first response that no fault holds back.
    fn due(&mut self) -> Option<Outgoing> {
        let held = self.shared.faults.lock().held.clone();
        let free = |outgoing: &Outgoing| match outgoing {
            Outgoing::Response(kind, _) => !held.contains(kind),
            Outgoing::Injected(_) => true,
        };
        let position = self.outbox.iter().position(free)?;
        self.outbox.remove(position)
    }

    fn send(&mut self, outgoing: Outgoing) -> DeltaDiscoveryResponse {
        let (response, names) = match outgoing {
            Outgoing::Response(kind, names) => self.build(kind, names),
            Outgoing::Injected(response) => {
                let names = response.resources.iter();
                let names = names.map(|bytes| name_of(bytes)).collect();
                (response, names)
            }
        };
        let sent = Sent {
            type_url: response.type_url.clone(),
            nonce: response.nonce.clone(),
            resources: names,
            removed: response.removed_resources.clone(),
            bytes: response.encoded_len(),
        };
        let done = self.outbox.is_empty().then_some(self.generation);
        self.record(|stream| {
            if let Some(kind) = Kind::of(&sent.type_url) {
                let progress = &mut stream.progress[kind as usize];
                progress.sent = Some(sent.nonce.clone());
            }
            stream.sent.push(sent);
            stream.generation = done.unwrap_or(stream.generation);
        });
        response
    }

    /// A response, and the names of its resources.
    fn build(&mut self, kind: Kind, names: Names) -> (DeltaDiscoveryResponse, Vec<String>) {
        self.nonces += 1;
        let catalogue = self.shared.catalogue.lock();
        let with_aliases = names.with_aliases;
        let resources = names.resources.into_iter().filter_map(|name| {
            let encoded = catalogue.encoded(kind, &name, with_aliases)?;
            Some((name, encoded))
        });
        let (there, resources) = resources.unzip();
        let response = DeltaDiscoveryResponse {
            system_version_info: format!("stand-in/{}", catalogue.generation()),
            resources,
            type_url: kind.url().to_owned(),
            nonce: format!("stand-in/{}/{}", self.serial, self.nonces),
            removed_resources: names.removed,
        };
        (response, there)
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let (size, limit) = (request.encoded_len(), self.shared.access.request_limit);
        if size > limit {
            return Err(Status::resource_exhausted(format!(
                "grpc: received message larger than max ({size} vs. {limit})"
            )));
        }
        self.record(|stream| stream.requests.push(request.clone()));
        if self.node.is_none() {
            self.node = Some(self.shared.access.node(request.node.as_ref())?);
        }
        let Some(kind) = Kind::of(&request.type_url) else {
            self.complain(format!("unknown type {:?}", request.type_url));
            return Ok(());
        };
        if !request.response_nonce.is_empty() {
            self.record(|stream| stream.answer(kind, &request));
            let names =
                request.resource_names_subscribe.len() + request.resource_names_unsubscribe.len();
            if names > 0 {
                self.complain("an answer that changes the subscription".to_owned());
            }
            return Ok(());
        }
        match self.subscriptions[kind as usize].take() {
            None => self.subscribe(kind, request),
            Some(subscription) => self.resubscribe(kind, subscription, &request),
        }
        Ok(())
    }

    /// The first request of a type: everything that the client does not claim to have.
    fn subscribe(&mut self, kind: Kind, request: DeltaDiscoveryRequest) {
        self.push(); // so that this answer is not followed by a part of itself
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let on_demand = star(&request.resource_names_unsubscribe);
        let claimed = request.initial_resource_versions;
        if on_demand && kind == Kind::Address {
            let mut names: BTreeSet<String> = claimed.keys().cloned().collect();
            let (asked, stale) = self.on_demand(&mut names, claimed.keys(), &claimed);
            self.subscriptions[kind as usize] = Some(Subscription::Named(names));
            if !asked.is_empty() || !stale.is_empty() {
                self.queue(kind, asked, stale, true);
            }
            return;
        }
        self.subscriptions[kind as usize] = Some(Subscription::Wildcard);
        let catalogue = self.shared.catalogue.lock();
        let fresh = |name: &String| match (catalogue.version(kind, name), claimed.get(name)) {
            (Some(version), Some(claimed)) => !version.is_empty() && version == claimed,
            _ => false,
        };
        let mut resources = catalogue.names(kind);
        resources.retain(|name| !fresh(name));
        let gone = claimed
            .keys()
            .filter(|name| !catalogue.contains(kind, name));
        let removed = gone.cloned().collect();
        drop(catalogue);
        self.queue(kind, resources, removed, false);
    }

    /// A later request without a nonce.
    fn resubscribe(
        &mut self,
        kind: Kind,
        mut subscription: Subscription,
        request: &DeltaDiscoveryRequest,
    ) {
        let asked = &request.resource_names_subscribe;
        match &mut subscription {
            Subscription::Wildcard if asked.is_empty() => {}
            Subscription::Wildcard => {
                let everything = self.shared.catalogue.lock().names(kind);
                self.queue(kind, everything, Vec::new(), false);
            }
            Subscription::Named(names) if asked.is_empty() => {
                // istiod's trap: it names all that is still subscribed as removed.
                for name in &request.resource_names_unsubscribe {
                    names.remove(name);
                }
                let rest = names.iter().cloned().collect();
                self.queue(kind, Vec::new(), rest, true);
            }
            Subscription::Named(names) => {
                let new: Vec<String> = asked
                    .iter()
                    .filter(|name| names.insert((*name).clone()))
                    .cloned()
                    .collect();
                if new.len() < asked.len() {
                    self.complain(format!("Subscribed resources check mismatch: {asked:?}"));
                }
                if !new.is_empty() {
                    let (found, missing) = self.on_demand(names, new.iter(), &HashMap::new());
                    self.queue(kind, found, missing, true);
                }
            }
        }
        self.subscriptions[kind as usize] = Some(subscription);
    }

    /// What keys stand for, the pods of the client's node included, and the keys that stand for nothing.
    fn on_demand<'k>(
        &self,
        names: &mut BTreeSet<String>,
        keys: impl Iterator<Item = &'k String>,
        claimed: &HashMap<String, String>,
    ) -> (Vec<String>, Vec<String>) {
        let catalogue = self.shared.catalogue.lock();
        let (mut found, mut missing) = (BTreeSet::new(), Vec::new());
        for key in keys {
            let meant = catalogue.find(key);
            if meant.is_empty() {
                missing.push(key.clone());
            }
            found.extend(meant);
        }
        let local = catalogue.on_node(self.node_name());
        found.extend(local.into_iter().filter(|name| !names.contains(name)));
        names.extend(found.iter().cloned());
        found.retain(|name| {
            let held = claimed.get(name).map(String::as_str);
            held.is_none_or(str::is_empty) || held != catalogue.version(Kind::Address, name)
        });
        (catalogue.in_order(Kind::Address, found), missing)
    }

    /// Sends what changed since the last time.
    fn push(&mut self) {
        let shared = Arc::clone(&self.shared);
        let catalogue = shared.catalogue.lock();
        for kind in Kind::ALL {
            let mut changed = catalogue.changed(kind, self.generation);
            let mut with_aliases = false;
            match self.subscriptions[kind as usize].as_mut() {
                None => continue,
                Some(Subscription::Wildcard) => {}
                Some(Subscription::Named(names)) => {
                    with_aliases = true;
                    let node = node_name(self.node.as_ref());
                    let local: BTreeSet<String> = catalogue.on_node(node).into_iter().collect();
                    changed.retain(|name| {
                        let aliases = catalogue.aliases(name);
                        names.contains(name)
                            || local.contains(name)
                            || aliases.iter().any(|alias| names.contains(alias))
                    });
                    names.extend(changed.iter().cloned());
                }
            }
            let (there, gone): (BTreeSet<_>, BTreeSet<_>) = changed
                .into_iter()
                .partition(|name| catalogue.contains(kind, name));
            if there.is_empty() && gone.is_empty() {
                continue;
            }
            self.outbox.push_back(Outgoing::Response(
                kind,
                Names {
                    resources: catalogue.in_order(kind, there),
                    removed: gone.into_iter().collect(),
                    with_aliases,
                },
            ));
        }
        self.generation = catalogue.generation();
        drop(catalogue);
        let idle = self.outbox.is_empty() && self.subscriptions.iter().all(Option::is_some);
        if idle {
            let generation = self.generation;
            self.record(|stream| stream.generation = generation);
        }
    }

    fn queue(
        &mut self,
        kind: Kind,
        resources: Vec<String>,
        removed: Vec<String>,
        with_aliases: bool,
    ) {
        let names = Names {
            resources,
            removed,
            with_aliases,
        };
        self.outbox.push_back(Outgoing::Response(kind, names));
    }

    fn node_name(&self) -> &str {
        node_name(self.node.as_ref())
    }

    fn complain(&self, complaint: String) {
        self.record(|stream| stream.complaints.push(complaint));
    }

    fn record(&self, change: impl FnOnce(&mut Stream)) {
        let serial = self.serial;
        self.shared
            .streams
            .send_modify(|streams| change(&mut streams[serial]));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.record(|stream| stream.ended = Some(Instant::now()));
    }
}

fn node_name(node: Option<&Node>) -> &str {
    node.and_then(|node| super::access::text(node, "NODE_NAME"))
        .unwrap_or_default()
}

fn name_of(resource: &[u8]) -> String {
    Resource::decode(resource).map_or_else(|error| error.to_string(), |resource| resource.name)
}
