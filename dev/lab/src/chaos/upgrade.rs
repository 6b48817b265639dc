//! The upgrade of a running installation: the order in which its processes are replaced.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result};
use rand::{rngs::StdRng, seq::SliceRandom as _};

use super::{
    revision::Order,
    site::{Site, senders},
};
use crate::local::own_program;

/// Time limit of the migration.
const SET_UP: Duration = Duration::from_secs(120);
/// How many processes are downgraded and upgraded again.
const PUT_BACK: usize = 3;

/// One step of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The new program's `setup`: migrations and queues.
    SetUp,
    /// Replace this process with the new program.
    Forward(String),
    /// Replace this process with the old program, on the new schema.
    Back(String),
}

/// The steps of an upgrade.
pub(super) fn changes(order: Order, rng: &mut StdRng) -> Vec<Change> {
    // As docs/upgrading.md says.
    let mut services: Vec<String> = ["progress", "fan-out"].map(str::to_owned).to_vec();
    services.extend(senders());
    services.push("web".to_owned());
    let replaced = match order {
        Order::Documented => services.into_iter().map(Change::Forward).collect(),
        Order::Any => in_any_order(services, rng),
    };
    [Change::SetUp].into_iter().chain(replaced).collect()
}

fn in_any_order(mut services: Vec<String>, rng: &mut StdRng) -> Vec<Change> {
    services.shuffle(rng);
    let back: Vec<String> = services.iter().take(PUT_BACK).cloned().collect();
    let mut turns = [services, back.clone(), back].concat();
    turns.shuffle(rng);
    let mut upgraded = HashSet::new();
    let turn = |service: String| {
        if upgraded.remove(&service) {
            return Change::Back(service);
        }
        upgraded.insert(service.clone());
        Change::Forward(service)
    };
    turns.into_iter().map(turn).collect()
}

impl Change {
    /// Its name in the output.
    pub(super) fn name(&self) -> String {
        match self {
            Self::SetUp => "setup with the new program".to_owned(),
            Self::Forward(service) => format!("{service} to the new program"),
            Self::Back(service) => format!("{service} back to the old program"),
        }
    }

    /// Carries it out.
    pub(super) async fn make(&self, site: &Site<'_>) -> Result<()> {
        match self {
            Self::SetUp => site.run(site.name(), &["setup"], SET_UP).await,
            Self::Forward(service) => site.replace(service, &own_program()?).await,
            Self::Back(service) => {
                let revision = site.revision.context("no older program")?;
                site.replace(service, &revision.program).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn keeps_the_documented_order() {
        let changes = changes(Order::Documented, &mut StdRng::seed_from_u64(7));
        let names: Vec<String> = changes.iter().map(Change::name).collect();
        let to_new = |service: &str| format!("{service} to the new program");
        let services = ["progress", "fan-out", "send-1", "send-2", "web"].map(to_new);
        assert_eq!((names[0].as_str(), &names[1..]), ("setup with the new program", &services[..]));
    }

    #[test]
    fn in_any_order_all_processes_end_with_the_new_program_and_some_are_downgraded() {
        for seed in 0..50 {
            let changes = changes(Order::Any, &mut StdRng::seed_from_u64(seed));
            assert_eq!(changes[0], Change::SetUp, "the schema comes first");
            let mut new = std::collections::BTreeMap::new();
            for change in &changes[1..] {
                let (service, is_new) = match change {
                    Change::Forward(service) => (service, true),
                    Change::Back(service) => (service, false),
                    Change::SetUp => panic!("twice"),
                };
                assert_ne!(new.insert(service, is_new).unwrap_or_default(), is_new, "{changes:?}");
            }
            assert_eq!((new.len(), new.values().all(|is_new| *is_new)), (5, true), "{changes:?}");
            let back = changes.iter().filter(|change| matches!(change, Change::Back(_))).count();
            assert_eq!(back, PUT_BACK);
        }
    }
}
