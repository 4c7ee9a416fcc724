//! Who the proxy is, as far as its surroundings tell without being asked.

use super::given;

#[test]
fn the_domain_of_the_cluster_is_that_of_the_search_list_unless_it_is_told() {
    let domain = |variables: &[(&str, &str)], search: &str| {
        let text = format!("nameserver 10.96.0.10\nsearch {search}\noptions ndots:5\n");
        let config = given(variables).file("/etc/resolv.conf", &text).config();
        config.identity.cluster_domain.to_string()
    };
    let kubernetes = "istio-system.svc.corp.example svc.corp.example corp.example eu.cloud.example";
    assert_eq!(domain(&[], kubernetes), "corp.example");
    let absolute = "istio-system.svc.corp.example. svc.corp.example. corp.example.";
    assert_eq!(domain(&[], absolute), "corp.example");
    let told = [("CLUSTER_DOMAIN", "other.example")];
    assert_eq!(domain(&told, kubernetes), "other.example");
    for elsewhere in ["eu.cloud.example", "svc.corp.example", "svc. .", "svc"] {
        assert_eq!(domain(&[], elsewhere), "cluster.local", "{elsewhere}");
    }
}
