//! What the documents show must work.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a panic is a failed test"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

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

/// All documents, by where they are.
fn documents() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let directories = [".", "deploy", "deploy/chart", "benches"].map(|it| root.join(it));
    let files = directories
        .iter()
        .flat_map(|it| fs::read_dir(it).expect("a directory"));
    let paths = files.map(|it| it.expect("an entry").path());
    let documents = paths.filter(|path| path.extension().is_some_and(|it| it == "md"));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a document");
        (path, text)
    };
    documents.map(read).collect()
}

#[test]
fn every_row_of_a_table_has_as_many_cells_as_its_head() {
    let cells = |row: &str| row.replace("\\|", "").matches('|').count();
    let mut rows = 0;
    for (path, text) in documents() {
        let mut head = None;
        for line in text.lines() {
            if !line.starts_with('|') {
                head = None;
                continue;
            }
            let expected = *head.get_or_insert_with(|| cells(line));
            assert_eq!(cells(line), expected, "{}: {line}", path.display());
            rows += 1;
        }
    }
    assert!(rows > 300, "{rows}");
}

#[test]
fn links_between_the_documents_lead_somewhere() {
    let mut links = 0;
    for (path, text) in documents() {
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
