//! The names that traffic series keep, shared among them, and which of those are printed.

use std::{fmt, sync::Arc};

use hashbrown::{Equivalent, HashSet};
use parking_lot::Mutex;

use super::labels::{
    Kept, Label, LabelValue, Labels, OTHER, Party, Reporter, ResponseFlag, Security, ServiceName,
    UNKNOWN,
};
use crate::config::LabelProfile;

/// A label set in the form that is kept: the texts belong to all label sets of a party.
#[derive(Debug)]
#[non_exhaustive]
pub struct Names {
    /// Which side of the connection reports.
    pub reporter: Reporter,
    /// Whether the peers proved their identities.
    pub security: Security,
    /// Who opened the connection.
    pub source: Arc<Party<Kept>>,
    /// Who accepted it.
    pub destination: Arc<Party<Kept>>,
    /// The service that was addressed.
    pub service: Arc<ServiceName<Kept>>,
}

/// The parties and services of all series, each of them once.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Sets>);

#[derive(Debug, Default)]
struct Sets {
    parties: HashSet<Arc<Party<Kept>>, foldhash::quality::RandomState>,
    services: HashSet<Arc<ServiceName<Kept>>, foldhash::quality::RandomState>,
}

/// How much of a label set is given up, so that there are not too many of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fold {
    /// Nothing.
    Nothing,
    /// The names within a namespace: what is known of them becomes `other`.
    Names,
    /// Every name.
    Everything,
}

impl Names {
    /// Names with texts of their own.
    pub(super) fn of(labels: &Labels<Label<'_>>) -> Self {
        Self {
            reporter: labels.reporter,
            security: labels.security,
            source: Arc::new(labels.source.map(Label::kept)),
            destination: Arc::new(labels.destination.map(Label::kept)),
            service: Arc::new(labels.service.map(Label::kept)),
        }
    }

    /// Whether `labels` print alike.
    pub(super) fn same(&self, labels: &Labels<Label<'_>>) -> bool {
        self.reporter == labels.reporter
            && self.security == labels.security
            && *self.source == labels.source
            && *self.destination == labels.destination
            && *self.service == labels.service
    }

    /// Writes `{name="value",…}` with the labels of `profile`, in the order in which they are documented.
    pub(super) fn write(
        &self,
        profile: LabelProfile,
        flag: ResponseFlag,
        out: &mut impl fmt::Write,
    ) -> fmt::Result {
        let mut before = '{';
        for (least, name, value) in self.labels(flag) {
            if least <= profile {
                out.write_char(before)?;
                out.write_str(name)?;
                out.write_str("=\"")?;
                write_escaped(value, out)?;
                out.write_char('"')?;
                before = ',';
            }
        }
        out.write_char('}')
    }

    /// Every label with the smallest profile that has it.
    fn labels(&self, flag: ResponseFlag) -> [(LabelProfile, &'static str, &str); 27] {
        use LabelProfile::{Full, Kiali, Minimal};
        let (from, to, service) = (&self.source, &self.destination, &self.service);
        let (from_revision, to_revision) = (&from.canonical_revision, &to.canonical_revision);
        let (from_service, to_service) = (&from.canonical_service, &to.canonical_service);
        [
            (Minimal, "reporter", self.reporter.as_str()),
            (Minimal, "source_workload", from.workload.value()),
            (Kiali, "source_canonical_service", from_service.value()),
            (Kiali, "source_canonical_revision", from_revision.value()),
            (Minimal, "source_workload_namespace", from.namespace.value()),
            (Kiali, "source_principal", from.principal.value()),
            (Full, "source_app", from.app.value()),
            (Full, "source_version", from_revision.value()),
            (Kiali, "source_cluster", from.cluster.value()),
            (Minimal, "destination_service", service.hostname.value()),
            (
                Kiali,
                "destination_service_namespace",
                service.namespace.value(),
            ),
            (Kiali, "destination_service_name", service.name.value()),
            (Minimal, "destination_workload", to.workload.value()),
            (Kiali, "destination_canonical_service", to_service.value()),
            (Kiali, "destination_canonical_revision", to_revision.value()),
            (
                Minimal,
                "destination_workload_namespace",
                to.namespace.value(),
            ),
            (Kiali, "destination_principal", to.principal.value()),
            (Full, "destination_app", to.app.value()),
            (Full, "destination_version", to_revision.value()),
            (Kiali, "destination_cluster", to.cluster.value()),
            (Full, "request_protocol", "tcp"),
            (Minimal, "response_flags", flag.as_str()),
            (
                Minimal,
                "connection_security_policy",
                self.security.as_str(),
            ),
            (Full, "source_region", from.region.value()),
            (Full, "source_zone", from.zone.value()),
            (Full, "destination_region", to.region.value()),
            (Full, "destination_zone", to.zone.value()),
        ]
    }
}

impl Pool {
    /// The kept form of `labels`; a party or service that is there already is shared.
    pub(super) fn names(&self, labels: &Labels<Label<'_>>) -> Names {
        let mut sets = self.0.lock();
        Names {
            reporter: labels.reporter,
            security: labels.security,
            source: sets.party(&labels.source),
            destination: sets.party(&labels.destination),
            service: sets.service(&labels.service),
        }
    }

    /// Forgets what no series has any more.
    pub(super) fn sweep(&self) {
        let Sets { parties, services } = &mut *self.0.lock();
        parties.retain(|one| Arc::strong_count(one) > 1);
        parties.shrink_to_fit();
        services.retain(|one| Arc::strong_count(one) > 1);
        services.shrink_to_fit();
    }
}

impl Sets {
    fn party(&mut self, party: &Party<Label<'_>>) -> Arc<Party<Kept>> {
        let kept = self
            .parties
            .get_or_insert_with(party, |party| Arc::new(party.map(Label::kept)));
        Arc::clone(kept)
    }

    fn service(&mut self, service: &ServiceName<Label<'_>>) -> Arc<ServiceName<Kept>> {
        let kept = self
            .services
            .get_or_insert_with(service, |service| Arc::new(service.map(Label::kept)));
        Arc::clone(kept)
    }
}

impl Equivalent<Arc<Party<Kept>>> for Party<Label<'_>> {
    fn equivalent(&self, key: &Arc<Party<Kept>>) -> bool {
        *self == **key
    }
}

impl Equivalent<Arc<ServiceName<Kept>>> for ServiceName<Label<'_>> {
    fn equivalent(&self, key: &Arc<ServiceName<Kept>>) -> bool {
        *self == **key
    }
}

impl<'a> Labels<Label<'a>> {
    /// Without the values that `profile` does not print, so that sets which print alike are one.
    pub(super) fn limited_to(self, profile: LabelProfile) -> Self {
        let party = |party: Party<Label<'a>>| match profile {
            LabelProfile::Full => party,
            LabelProfile::Kiali => Party {
                app: Label::Absent,
                region: Label::Absent,
                zone: Label::Absent,
                ..party
            },
            LabelProfile::Minimal => Party {
                workload: party.workload,
                namespace: party.namespace,
                ..Party::default()
            },
        };
        let service = match profile {
            LabelProfile::Full | LabelProfile::Kiali => self.service,
            LabelProfile::Minimal => ServiceName {
                hostname: self.service.hostname,
                ..ServiceName::default()
            },
        };
        Self {
            source: party(self.source),
            destination: party(self.destination),
            service,
            ..self
        }
    }

    /// With `other` in the place of what `fold` gives up. What is not known stays so, except where everything goes:
    /// readers drop series with a namespace but no workload, or no cluster.
    pub(super) fn folded(self, fold: Fold) -> Self {
        let other = |label: Label<'a>| match (fold, label.value()) {
            (Fold::Nothing, _) | (Fold::Names, UNKNOWN) => label,
            (Fold::Names | Fold::Everything, _) => Label::Text(OTHER),
        };
        let place = |label: Label<'a>| match fold {
            Fold::Nothing | Fold::Names => label,
            Fold::Everything => Label::Text(OTHER),
        };
        let party = |party: Party<Label<'a>>| Party {
            namespace: place(party.namespace),
            cluster: place(party.cluster),
            ..party.map(other)
        };
        Self {
            source: party(self.source),
            destination: party(self.destination),
            service: ServiceName {
                namespace: place(self.service.namespace),
                ..self.service.map(other)
            },
            ..self
        }
    }
}

/// Writes a label value. Peers choose some of them.
fn write_escaped(mut value: &str, out: &mut impl fmt::Write) -> fmt::Result {
    while let Some((plain, rest)) = value
        .find(['\\', '"', '\n'])
        .and_then(|at| value.split_at_checked(at))
    {
        out.write_str(plain)?;
        let mut rest = rest.chars();
        match rest.next() {
            Some('\n') => out.write_str("\\n")?,
            Some(special) => {
                out.write_char('\\')?;
                out.write_char(special)?;
            }
            None => {}
        }
        value = rest.as_str();
    }
    out.write_str(value)
}
