//! What the documents show must work.

#[test]
fn the_mesh_in_the_readme_is_accepted() {
    let readme = include_str!("../../README.md");
    let example = readme
        .split_once("```yaml\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .expect("the README shows a mesh file")
        .0;
    let document = xds_client::local::parse(example).expect("the example is well-formed");
    assert!(document.rejected.is_empty(), "{:?}", document.rejected);
    assert_eq!((document.addresses.len(), document.policies.len()), (2, 1));
}
