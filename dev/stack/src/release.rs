//! Which RabbitMQ the private stack starts: the system's, or one of a release that somebody asks for.

use std::{env, sync::OnceLock};

use clap::ValueEnum;

use super::{
    error::StackError,
    packages::{RABBITMQ, ensure_packages},
    rabbitmq::Programs,
    tree::Tree,
};

/// The variable that says it where no option does; a process that is started inherits it.
pub(crate) const VARIABLE: &str = "MAILRUN_BROKER";

static CHOSEN: OnceLock<Release> = OnceLock::new();

/// A release of RabbitMQ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Release {
    /// Whichever is installed.
    #[default]
    #[value(alias = "")]
    System,
    /// RabbitMQ 4, fetched where another one is installed.
    #[value(name = "4")]
    Four,
}

impl Release {
    /// Chooses it for this process and those that it starts. To be called before anything asks for it.
    pub fn choose(self) {
        // A second choice would come too late for what was started by then.
        let _ = CHOSEN.set(self);
    }

    /// The one that was chosen; else the one that the environment names.
    pub fn chosen() -> Self {
        *CHOSEN.get_or_init(|| named().and_then(Result::ok).unwrap_or_default())
    }

    /// As the command line has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Four => "4",
        }
    }

    /// Makes sure that its programs are there. `report` gets a line for each step.
    pub(crate) async fn ensure(self, report: impl Fn(&str)) -> Result<(), StackError> {
        if let Some(Err(why)) = named() {
            return Err(StackError::Missing(format!("{VARIABLE} names no release of RabbitMQ: {why}.")));
        }
        match self {
            Self::System => ensure_packages(&[RABBITMQ], report).await,
            Self::Four if Programs::of_system().is_some_and(|programs| self.has(programs.version().as_deref())) => {
                Ok(())
            }
            Self::Four => Tree::ensure(report).await,
        }
    }

    /// The version that runs, if it belongs to this release.
    pub(crate) fn check(self, version: String) -> Result<String, StackError> {
        if self.has(Some(&version)) {
            return Ok(version);
        }
        Err(StackError::NotStarted(format!("RabbitMQ {} was asked for, and {version} runs.", self.name())))
    }

    /// Whether this version belongs to it.
    pub fn has(self, version: Option<&str>) -> bool {
        match self {
            Self::System => true,
            Self::Four => version.is_some_and(|version| version.starts_with("4.")),
        }
    }
}

/// What the environment names.
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
    fn a_release_that_is_asked_for_and_does_not_run_is_told() {
        let refused = Release::Four.check("3.10.8".to_owned()).unwrap_err().to_string();
        assert!(refused.contains("RabbitMQ 4 was asked for, and 3.10.8 runs"), "{refused}");
    }
}
