//! Holds every import between the rooms of `proxy` against the floors that `ARCHITECTURE.md` draws.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a failure must be loud"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};

/// The rooms by floor. A room imports rooms of lower floors only.
const FLOORS: &[(u8, &[&str])] = &[
    (8, &["cli"]),
    (7, &["node"]),
    (6, &["admin", "pods"]),
    (5, &["flow", "dns"]),
    (4, &["tunnel", "relay", "listen", "resolve"]),
    (3, &["route", "policy"]),
    (2, &["mesh"]),
    (1, &["telemetry", "config", "budget"]),
];

/// Pairs of one floor of which the first may import the second.
const NEIGHBOURS: &[(&str, &str)] = &[("telemetry", "config"), ("tunnel", "relay")];

#[test]
fn every_import_goes_down() {
    let rooms = rooms();
    let forbidden: Vec<String> = imports()
        .into_iter()
        .filter(|import| !allowed(&rooms, &import.from, &import.to))
        .map(|Import { file, from, to }| format!("{}: {from} imports {to}", file.display()))
        .collect();
    assert!(
        forbidden.is_empty(),
        "against the floors:\n{}",
        forbidden.join("\n")
    );
}

#[test]
fn every_room_has_a_floor() {
    let rooms = rooms();
    let without: Vec<_> = sources()
        .iter()
        .filter_map(|file| room_of(file))
        .filter(|room| !rooms.contains_key(room.as_str()))
        .collect();
    assert!(without.is_empty(), "rooms without a floor: {without:?}");
}

#[test]
fn neighbours_know_each_other_in_one_direction() {
    let rooms = rooms();
    for (from, to) in NEIGHBOURS {
        assert_eq!(rooms[from], rooms[to], "{from} and {to} are no neighbours");
        assert!(
            !NEIGHBOURS.contains(&(to, from)),
            "{from} and {to} know each other"
        );
    }
}

#[test]
fn imports_are_found_wherever_they_stand() {
    let source = r#"
        //! crate::comment
        use crate::plain::Thing;
        use crate::{one::A, two::{B, C}, three};
        use super::sibling;
        use super::super::above::D;
        fn f() { println!("{} crate::text", crate::inline::f()); select! { x = crate::macros::g() => {} } }
        macro_rules! m { () => { $crate::foreign::x } }
        mod inner { use super::super::super::higher::E; use super::super::near; }
    "#;
    let tokens: TokenStream = source.parse().unwrap();
    let mut found = BTreeSet::new();
    scan(tokens, 2, &mut found);
    let expected = [
        "above", "higher", "inline", "macros", "one", "plain", "three", "two",
    ];
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
}

struct Import {
    file: PathBuf,
    from: String,
    to: String,
}

fn rooms() -> BTreeMap<&'static str, u8> {
    FLOORS
        .iter()
        .flat_map(|(floor, rooms)| rooms.iter().map(|room| (*room, *floor)))
        .collect()
}

fn allowed(rooms: &BTreeMap<&str, u8>, from: &str, to: &str) -> bool {
    let floor = |room| {
        rooms
            .get(room)
            .unwrap_or_else(|| panic!("{room} has no floor"))
    };
    from == to || floor(from) > floor(to) || NEIGHBOURS.contains(&(from, to))
}

fn imports() -> Vec<Import> {
    let mut imports = Vec::new();
    for file in sources() {
        let Some(from) = room_of(&file) else { continue };
        let text = fs::read_to_string(source_dir().join(&file)).unwrap();
        let tokens: TokenStream = text.parse().expect("the proxy compiles");
        let mut found = BTreeSet::new();
        scan(tokens, file.components().count(), &mut found);
        imports.extend(found.into_iter().map(|to| Import {
            file: file.clone(),
            from: from.clone(),
            to,
        }));
    }
    assert!(
        !imports.is_empty(),
        "no import found: is the path to the sources right?"
    );
    imports
}

/// All source files of the library, relative to its source directory.
fn sources() -> Vec<PathBuf> {
    let mut pending = vec![source_dir()];
    let mut files = Vec::new();
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                files.push(path.strip_prefix(source_dir()).unwrap().to_owned());
            }
        }
    }
    files
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/src")
}

/// The room that a file belongs to; none for the roots of the library and the binary.
fn room_of(file: &Path) -> Option<String> {
    let first = Path::new(file.components().next()?.as_os_str());
    let room = first.file_stem()?.to_str()?.to_owned();
    (!["lib", "main"].contains(&room.as_str())).then_some(room)
}

/// Collects the rooms named by paths from the crate root. `depth` counts the modules around
/// these tokens: so many `super` lead to the crate root as well.
fn scan(tokens: TokenStream, depth: usize, found: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) => {
                let inline_module = at >= 2 && is_ident(&tokens[at - 2], "mod");
                scan(group.stream(), depth + usize::from(inline_module), found);
            }
            TokenTree::Ident(ident) if ident == "crate" && !after_dollar(&tokens, at) => {
                collect(&tokens[at + 1..], found);
            }
            TokenTree::Ident(ident) if ident == "super" && !after_path(&tokens, at) => {
                let (ups, rest) = climb(&tokens[at..]);
                if ups == depth {
                    collect(rest, found);
                }
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

/// The first names after `crate`: of a path, or of each path in a group.
fn collect(after_root: &[TokenTree], found: &mut BTreeSet<String>) {
    let Some(next) = strip_colons(after_root).and_then(<[_]>::first) else {
        return; // `pub(crate)`
    };
    match next {
        TokenTree::Ident(room) => _ = found.insert(room.to_string()),
        TokenTree::Group(group) => {
            let inner: Vec<TokenTree> = group.stream().into_iter().collect();
            for path in
                inner.split(|token| matches!(token, TokenTree::Punct(p) if p.as_char() == ','))
            {
                if let Some(first) = path.first() {
                    found.insert(first.to_string());
                }
            }
        }
        TokenTree::Punct(_) | TokenTree::Literal(_) => panic!("a glob import of the crate root"),
    }
}

/// How many `super::` there are in a row, and what comes after the last `super`.
fn climb(mut tokens: &[TokenTree]) -> (usize, &[TokenTree]) {
    let mut ups = 0;
    loop {
        tokens = &tokens[1..];
        ups += 1;
        match strip_colons(tokens) {
            Some(rest) if rest.first().is_some_and(|it| is_ident(it, "super")) => tokens = rest,
            _ => return (ups, tokens),
        }
    }
}

fn strip_colons(tokens: &[TokenTree]) -> Option<&[TokenTree]> {
    let colon = |token: &TokenTree| matches!(token, TokenTree::Punct(p) if p.as_char() == ':');
    match tokens {
        [first, second, rest @ ..] if colon(first) && colon(second) => Some(rest),
        _ => None,
    }
}

fn is_ident(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == name)
}

fn after_dollar(tokens: &[TokenTree], at: usize) -> bool {
    at > 0 && matches!(&tokens[at - 1], TokenTree::Punct(p) if p.as_char() == '$')
}

fn after_path(tokens: &[TokenTree], at: usize) -> bool {
    at > 0 && matches!(&tokens[at - 1], TokenTree::Punct(p) if p.as_char() == ':')
}
