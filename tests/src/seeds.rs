//! Seeds of fuzz targets, as inputs of ordinary tests.

use std::{fs, path::Path};

/// Gives `target` each file of a directory of the repository.
///
/// # Panics
/// When there are none, or `target` panics.
pub fn replay(directory: &str, target: impl Fn(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(directory);
    let mut count = 0;
    for entry in fs::read_dir(&path).expect(directory) {
        target(&fs::read(entry.expect("an entry").path()).expect("a seed"));
        count += 1;
    }
    assert!(count > 0, "no seeds in {directory}");
}
