//! The files of a crate do not import each other in a circle: each can be understood by reading downwards.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const CRATES: [&str; 11] = [
    "shared/core",
    "shared/app",
    "shared/ledger",
    "shared/broker",
    "web",
    "worker",
    "cli",
    "dev/lab",
    "dev/program",
    "dev/sink",
    "dev/stack",
];

/// A module's path below the crate's root.
type Module = Vec<String>;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn module_of(file: &Path, root: &Path) -> Module {
    let relative = file.strip_prefix(root).unwrap().with_extension("");
    let mut module: Module = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if ["mod", "lib", "main"].contains(&module.last().unwrap().as_str()) {
        module.pop();
    }
    module
}

/// The code without comments, tests and strings' contents that matter here.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths of a use declaration, with groups spelled out.
fn spelled_out(tree: &str, before: &str, paths: &mut Vec<String>) {
    let (mut depth, mut start) = (0, 0);
    let mut parts = Vec::new();
    for (index, character) in tree.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[start..]);
    for part in parts.into_iter().map(str::trim).filter(|part| !part.is_empty()) {
        match part.split_once('{') {
            Some((head, rest)) => {
                spelled_out(rest.trim_end().strip_suffix('}').unwrap(), &format!("{before}{head}"), paths);
            }
            None => paths.push(format!("{before}{part}")),
        }
    }
}

/// What a file names of its own crate. What it only hands on, with `pub use`, is its face and no import.
fn named(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    let mut rest = String::new();
    for statement in code.split_inclusive(';') {
        let head = statement.rfind("use ").filter(|at| {
            let before = statement[..*at].trim_end();
            before.is_empty()
                || before.ends_with([';', '}', ']', ')'])
                || before.ends_with("pub")
                || before.ends_with('\n')
        });
        match head {
            Some(at) => {
                let is_face = statement[..at].trim_end().ends_with("pub") || statement[..at].trim_end().ends_with(')');
                if !is_face {
                    spelled_out(statement[at + 4..].trim_end_matches(';'), "", &mut paths);
                }
                rest.push_str(&statement[..at]);
            }
            None => rest.push_str(statement),
        }
    }
    let is_part = |character: char| character.is_alphanumeric() || character == '_' || character == ':';
    paths.extend(rest.split(|character| !is_part(character)).filter(|path| path.contains("::")).map(str::to_owned));
    paths
}

fn imports(modules: &BTreeMap<Module, PathBuf>, from: &Module, code: &str) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    for path in named(code) {
        let mut parts: Vec<&str> = path.split("::").map(|part| part.split_whitespace().next().unwrap_or("")).collect();
        let mut at: Module = match parts[0] {
            "crate" => Vec::new(),
            "self" | "super" => from.clone(),
            child if modules.contains_key(&[from.as_slice(), &[child.to_owned()]].concat()) => from.clone(),
            _ => continue,
        };
        while let Some(first) = parts.first().copied().filter(|part| ["crate", "self", "super"].contains(part)) {
            if first == "super" {
                at.pop();
            }
            parts.remove(0);
        }
        for part in parts {
            let below = [at.as_slice(), &[part.to_owned()]].concat();
            if !modules.contains_key(&below) {
                break;
            }
            at = below;
        }
        // A folder's own file declares what its parts share: what they take from it is no import from elsewhere.
        if !from.starts_with(&at) {
            found.insert(at);
        }
    }
    found
}

/// What can be reached from a module, itself only if there is a circle.
fn reached(graph: &BTreeMap<Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<Module> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&Module> = graph[from].iter().collect();
    while let Some(module) = next.pop() {
        if reached.insert(module.clone()) {
            next.extend(graph.get(module).into_iter().flatten());
        }
    }
    reached
}

#[test]
fn no_files_of_a_crate_import_each_other_in_a_circle() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut circles = Vec::new();
    for name in CRATES {
        let root = workspace.join(name).join("src");
        let mut files = Vec::new();
        sources(&root, &mut files);
        assert!(!files.is_empty(), "{name} has no sources");
        let modules: BTreeMap<Module, PathBuf> =
            files.into_iter().map(|file| (module_of(&file, &root), file)).collect();
        let is_test =
            |module: &Module| module.iter().any(|part| part == "tests" || part == "model" || part == "samples");
        let graph: BTreeMap<Module, BTreeSet<Module>> = modules
            .iter()
            .filter(|(module, _)| !is_test(module))
            .map(|(module, file)| (module.clone(), imports(&modules, module, &code(file))))
            .collect();
        let in_circles = graph.keys().filter(|module| reached(&graph, module).contains(*module));
        circles.extend(in_circles.map(|module| format!("{name}: {}", module.join("::"))));
    }
    assert!(circles.is_empty(), "these files import each other in circles:\n{}", circles.join("\n"));
}
