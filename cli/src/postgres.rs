//! PostgreSQL's client programs, such as pg_dump.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Debian's folder with one subfolder per version.
const VERSIONS: &str = "/usr/lib/postgresql";

/// Finds a program of PostgreSQL: in the newest version, because an older pg_dump refuses a newer server, or else on the path.
#[must_use]
pub fn postgres_program(name: &str) -> Option<PathBuf> {
    let on_path =
        || env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|file| file.is_file());
    newest(Path::new(VERSIONS), name).or_else(on_path)
}

fn newest(versions: &Path, name: &str) -> Option<PathBuf> {
    let versions = fs::read_dir(versions).ok()?.filter_map(|entry| {
        let folder = entry.ok()?.path();
        let version: u32 = folder.file_name()?.to_str()?.parse().ok()?;
        Some((version, folder.join("bin").join(name)))
    });
    versions.filter(|(_, program)| program.is_file()).max().map(|(_, program)| program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_newest_version_that_has_the_program() {
        let dir = tempfile::tempdir().unwrap();
        for version in ["9", "15", "common"] {
            let bin = dir.path().join(version).join("bin");
            fs::create_dir_all(&bin).unwrap();
            fs::write(bin.join("pg_dump"), "").unwrap();
        }
        fs::write(dir.path().join("9/bin/psql"), "").unwrap();
        assert_eq!(newest(dir.path(), "pg_dump"), Some(dir.path().join("15/bin/pg_dump")));
        assert_eq!(newest(dir.path(), "psql"), Some(dir.path().join("9/bin/psql")));
        assert_eq!(newest(dir.path(), "none"), None);
    }
}
