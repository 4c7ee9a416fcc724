//! What the documents show must work.

use std::{fs, path::Path};

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

/// The text of a heading as links name it.
fn anchor(heading: &str) -> String {
    let kept = |character: &char| character.is_alphanumeric() || " -_".contains(*character);
    let text: String = heading
        .trim_start_matches('#')
        .trim()
        .chars()
        .filter(kept)
        .collect();
    text.to_lowercase().replace(' ', "-")
}

#[test]
fn links_between_the_documents_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let documents = [".", "deploy", "deploy/chart", "benches"].map(|it| root.join(it));
    let documents = documents
        .iter()
        .flat_map(|it| fs::read_dir(it).expect("a directory"));
    let paths = documents.map(|it| it.expect("an entry").path());
    let mut links = 0;
    for path in paths.filter(|path| path.extension().is_some_and(|it| it == "md")) {
        let text = fs::read_to_string(&path).expect("a document");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().expect("a directory").join(file),
            };
            assert!(target.exists(), "{}: {link}", path.display());
            if !place.is_empty() {
                let text = fs::read_to_string(&target).expect("a document");
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let there = headings.any(|heading| anchor(heading) == place);
                assert!(there, "{}: {link}", path.display());
            }
        }
    }
    assert!(links > 30, "{links}");
}
