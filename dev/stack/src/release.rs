//! The RabbitMQ release of the private stack: the system's, or a requested one.

use std::{env, sync::OnceLock};

use clap::ValueEnum;

use super::error::StackError;

/// The environment variable used without an option; child processes inherit it.
pub(crate) const VARIABLE: &str = "MAILRUN_BROKER";

static CHOSEN: OnceLock<Release> = OnceLock::new();

/// A release of RabbitMQ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Release {
    /// The installed one.
    #[default]
    #[value(alias = "")]
    System,
    /// RabbitMQ 4, downloaded if another one is installed.
    #[value(name = "4")]
    Four,
}

impl Release {
    /// Chooses it for this process and its children. Must be called before anything uses it.
    pub fn choose(self) {
        // A second choice would come too late for what was already started.
        let _ = CHOSEN.set(self);
    }

    /// The chosen release, else that of the environment.
    pub fn chosen() -> Self {
        *CHOSEN.get_or_init(|| named().and_then(Result::ok).unwrap_or_default())
    }

    /// The value on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Four => "4",
        }
    }

    /// Fails if the environment names no release.
    pub(crate) fn check_environment() -> Result<(), StackError> {
        match named() {
            Some(Err(why)) => Err(StackError::Missing(format!("{VARIABLE} names no release of RabbitMQ: {why}."))),
            _ => Ok(()),
        }
    }

    /// Checks that the running version belongs to this release.
    pub(crate) fn check(self, version: String) -> Result<String, StackError> {
        if self.has(Some(&version)) {
            return Ok(version);
        }
        Err(StackError::NotStarted(format!("RabbitMQ {} was requested, but {version} is running.", self.name())))
    }

    /// Whether this version belongs to it.
    pub fn has(self, version: Option<&str>) -> bool {
        match self {
            Self::System => true,
            Self::Four => version.is_some_and(|version| version.starts_with("4.")),
        }
    }
}

/// The release in the environment.
fn named() -> Option<Result<Release, String>> {
    Some(Release::from_str(&env::var(VARIABLE).ok()?, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_has_its_own_versions() {
        assert!(Release::Four.has(Some("4.0.5")));
        for other in [Some("3.13.7"), Some("40.1"), None] {
            assert!(!Release::Four.has(other), "{other:?}");
        }
        assert!(Release::System.has(None));
    }

    #[test]
    fn refuses_another_release_than_the_requested_one() {
        let refused = Release::Four.check("3.10.8".to_owned()).unwrap_err().to_string();
        assert!(refused.contains("RabbitMQ 4 was requested, but 3.10.8 is running"), "{refused}");
    }
}
