//! What a query name may stand for in Kubernetes. Pure.

/// From where names are looked up: the suffixes that a pod's resolver appends, and the domain of services.
#[derive(Debug, Clone, Copy)]
pub(super) struct Viewpoint<'a> {
    /// Namespace of the client.
    pub(super) namespace: &'a str,
    /// DNS domain of the cluster.
    pub(super) cluster_domain: &'a str,
    /// Search domains of the client; `None` stands for those that Kubernetes gives to pods of the namespace.
    pub(super) search: Option<&'a [String]>,
}

/// One name that a query may mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    /// The host name to look for.
    pub(super) host: String,
    /// The query name without a search domain, if the candidate came from it.
    pub(super) stripped: Option<String>,
}

/// Everything that `query` (lower case, without the final dot) may mean, the most likely first and each once.
pub(super) fn candidates(query: &str, from: &Viewpoint<'_>) -> Vec<Candidate> {
    let mut found = Vec::new();
    add(&mut found, query, None, from);
    let own;
    let search = match from.search {
        Some(listed) => listed,
        None => {
            let domain = from.cluster_domain;
            own = [
                format!("{}.svc.{domain}", from.namespace),
                format!("svc.{domain}"),
                domain.to_owned(),
            ];
            &own[..]
        }
    };
    for domain in search {
        let stripped = query.strip_suffix(&**domain);
        let stripped = stripped.and_then(|rest| rest.strip_suffix('.'));
        if let Some(stripped) = stripped.filter(|rest| !rest.is_empty()) {
            add(&mut found, stripped, Some(stripped), from);
        }
    }
    found
}

/// A name and the services that Kubernetes' short forms make of it.
fn add(found: &mut Vec<Candidate>, name: &str, stripped: Option<&str>, from: &Viewpoint<'_>) {
    let Viewpoint {
        namespace,
        cluster_domain: domain,
        ..
    } = from;
    let mut push = |host: String| {
        if !found.iter().any(|held| held.host == host) {
            let stripped = stripped.map(str::to_owned);
            found.push(Candidate { host, stripped });
        }
    };
    push(name.to_owned());
    let labels: Vec<_> = name.split('.').collect();
    match labels[..] {
        [service] => push(format!("{service}.{namespace}.svc.{domain}")),
        [service, other] => {
            push(format!("{service}.{other}.svc.{domain}"));
            push(format!("{service}.{other}.{namespace}.svc.{domain}"));
        }
        [service, other, last] => {
            if last == "svc" {
                push(format!("{service}.{other}.svc.{domain}"));
            }
            push(format!("{name}.svc.{domain}"));
        }
        [_, _, _, "svc"] => push(format!("{name}.{domain}")),
        _ => {}
    }
}

/// `name` itself, then `*.rest` with one label after the other removed from the left.
pub(super) fn exact_then_wildcards(name: &str) -> impl Iterator<Item = (String, Match)> {
    let mut rest = name;
    let wildcards = std::iter::from_fn(move || {
        let (_, shorter) = rest.split_once('.')?;
        rest = shorter;
        Some((format!("*.{rest}"), Match::Wildcard))
    });
    std::iter::once((name.to_owned(), Match::Exact)).chain(wildcards)
}

/// How a host name was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    /// It is the name.
    Exact,
    /// It is a wildcard that covers the name.
    Wildcard,
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Viewpoint<'_> = Viewpoint {
        namespace: "shop",
        cluster_domain: "cluster.local",
        search: None,
    };

    fn hosts(query: &str) -> Vec<String> {
        let found = candidates(query, &FROM);
        found.into_iter().map(|one| one.host).collect()
    }

    #[test]
    fn short_names_expand_as_kubernetes_does() {
        assert_eq!(hosts("cart"), ["cart", "cart.shop.svc.cluster.local"]);
        assert_eq!(
            hosts("cart.web"),
            [
                "cart.web",
                "cart.web.svc.cluster.local",
                "cart.web.shop.svc.cluster.local"
            ]
        );
        assert_eq!(
            hosts("cart.web.svc"),
            [
                "cart.web.svc",
                "cart.web.svc.cluster.local",
                "cart.web.svc.svc.cluster.local"
            ]
        );
        assert_eq!(hosts("a.b.c.svc"), ["a.b.c.svc", "a.b.c.svc.cluster.local"]);
        assert_eq!(hosts("a.b.c.d.example"), ["a.b.c.d.example"]);
    }

    #[test]
    fn search_domains_are_taken_off_the_longest_first() {
        let found = candidates("cart.web.shop.svc.cluster.local", &FROM);
        let first = found
            .iter()
            .position(|one| one.host == "cart.web.svc.cluster.local");
        let first = &found[first.unwrap()];
        assert_eq!(first.stripped.as_deref(), Some("cart.web"));
        assert_eq!(found[0].stripped, None);
    }

    #[test]
    fn a_search_domain_itself_is_no_empty_name() {
        for domain in ["cluster.local", "svc.cluster.local", "xcluster.local"] {
            assert!(
                hosts(domain).iter().all(|host| !host.is_empty()),
                "{domain}"
            );
        }
        let stripped = |query| {
            candidates(query, &FROM)
                .iter()
                .any(|one| one.stripped.is_some())
        };
        assert!(!stripped("xcluster.local"), "a suffix begins at a dot");
    }

    #[test]
    fn listed_search_domains_take_the_place_of_those_of_the_namespace() {
        let listed = ["corp.example".to_owned()];
        let from = Viewpoint {
            search: Some(&listed),
            ..FROM
        };
        let found = candidates("api.corp.example", &from);
        assert!(
            found
                .iter()
                .any(|one| one.host == "api.shop.svc.cluster.local")
        );
        let cluster = candidates("api.svc.cluster.local", &from);
        assert_eq!(cluster.len(), 1, "{cluster:?}");
    }

    #[test]
    fn wildcards_go_from_near_to_far() {
        let tried: Vec<_> = exact_then_wildcards("x.y.example.com").collect();
        let names: Vec<_> = tried.iter().map(|(name, _)| &**name).collect();
        assert_eq!(
            names,
            [
                "x.y.example.com",
                "*.y.example.com",
                "*.example.com",
                "*.com"
            ]
        );
        assert_eq!((tried[0].1, tried[1].1), (Match::Exact, Match::Wildcard));
    }
}
