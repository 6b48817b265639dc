//! The faults of a run and their moments, drawn from a seed, so that a run can be repeated.

use std::{sync::LazyLock, time::Duration};

use clap::{ValueEnum, builder::PossibleValue};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use anyhow::Result;
use tokio::sync::watch::Receiver;

use super::{
    fault::{Fault, Needs, PAUSE_RUN, Reach, Weight},
    revision::Order,
    site::{Purpose, Site},
    upgrade::{Change, changes},
    watch::Stage,
};

/// Faults are injected before this share of a run is settled, so that the run is still in progress.
const LATEST: f64 = 0.9;
const UPGRADE: &str = "upgrade";
/// The form is usually submitted within this time.
const SUBMISSION_MS: u64 = 300;

/// The faults of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// One fault, several times.
    One(&'static Fault),
    /// All faults that can be combined, in any order, some simultaneously.
    Mixed,
    /// An upgrade from an older revision.
    Upgrade(Order),
}

/// A choice on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Each fault in its own run, then all of them in one.
    All,
    /// One of these runs.
    Plan(Plan),
    /// An upgrade from an older revision.
    Upgrade,
}

impl ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Self] {
        static CHOICES: LazyLock<Vec<Choice>> = LazyLock::new(|| {
            let mixed = [Choice::All, Choice::Plan(Plan::Mixed), Choice::Upgrade].into_iter();
            mixed.chain(Fault::all().map(|fault| Choice::Plan(Plan::One(fault)))).collect()
        });
        &CHOICES
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::All => Some(PossibleValue::new("all").help("Each fault in its own run, then `mixed`")),
            Self::Plan(Plan::Mixed) => Some(PossibleValue::new("mixed").help("All faults of a single node in one run")),
            Self::Plan(Plan::One(fault)) => Some(PossibleValue::new(fault.name).help(fault.help)),
            // The revision determines the order.
            Self::Plan(Plan::Upgrade(_)) => None,
            Self::Upgrade => Some(PossibleValue::new(UPGRADE).help(
                "Replace the processes of the revision --from by this program, one after another; included in `all` if --from is given",
            )),
        }
    }
}

impl Choice {
    /// The chosen runs. `order`: that of the revision to upgrade from, if given.
    pub(super) fn plans(self, order: Option<Order>) -> Vec<Plan> {
        let upgrade = order.map(Plan::Upgrade);
        match self {
            Self::All => {
                let faults = Fault::all().map(Plan::One);
                faults.chain([Plan::Mixed]).chain(upgrade).collect()
            }
            Self::Plan(plan) => vec![plan],
            Self::Upgrade => upgrade.into_iter().collect(),
        }
    }
}

/// When a fault is injected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Moment {
    /// This long after the submission, with or without a response.
    AfterPost(Duration),
    /// When this share of the run is settled.
    Settled(f64),
}

/// One occurrence of a fault.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Strike {
    pub(super) what: What,
    pub(super) moment: Moment,
    /// Seed of the fault's own random choices.
    pub(super) seed: u64,
}

/// What happens at a moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum What {
    Fault(&'static Fault),
    /// A step of an upgrade.
    Change(Change),
}

impl What {
    /// Its name in the output.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Fault(fault) => fault.name.to_owned(),
            Self::Change(change) => change.name(),
        }
    }

    /// Whether it lasts during the whole run.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.weight == Weight::Whole)
    }

    /// Whether its failure breaks a guarantee.
    pub(super) fn must_happen(&self) -> bool {
        matches!(self, Self::Change(_))
    }

    /// Carries it out: see [`Fault::strike`].
    pub(super) async fn strike(&self, site: &Site<'_>, rng: &mut StdRng, stages: &Receiver<Stage>) -> Result<()> {
        match self {
            Self::Fault(fault) => fault.strike(site, rng, stages).await,
            Self::Change(change) => change.make(site).await,
        }
    }
}

impl Plan {
    /// Its name in the report.
    pub(super) fn name(self) -> String {
        match self {
            Self::One(fault) => fault.name.to_owned(),
            Self::Mixed => "mixed".to_owned(),
            Self::Upgrade(_) => UPGRADE.to_owned(),
        }
    }

    /// What its installation is for.
    pub(super) fn purpose(self) -> Purpose {
        let needs = |what| match self {
            Self::One(fault) => fault.needs == what,
            Self::Mixed => true,
            Self::Upgrade(_) => false,
        };
        Purpose {
            name: self.name(),
            in_turn: self.is_in_turn(),
            duplicates: needs(Needs::Duplicates),
            limited: needs(Needs::RateLimit),
            upgrades: self.upgrades(),
        }
    }

    /// The maximum stall of its run outside of faults.
    pub(super) fn bound(self) -> Duration {
        match self {
            Self::One(fault) => fault.bound(),
            Self::Mixed => Fault::all().map(Fault::bound).max().unwrap_or_default(),
            // Its steps end processes cleanly.
            Self::Upgrade(_) => Fault::usual_bound(),
        }
    }

    /// Whether each fault waits until the previous one is over. A node must be back before the next one dies, otherwise two are down and the
    /// queues have no majority; an upgrade has an order.
    pub(super) fn is_in_turn(self) -> bool {
        self.needs_cluster() || self.upgrades()
    }

    /// Whether the run starts with an older program.
    pub(super) fn upgrades(self) -> bool {
        matches!(self, Self::Upgrade(_))
    }

    /// Whether an unexpected end of a process is our fault.
    pub(super) fn lets_processes_live(self) -> bool {
        self.upgrades()
    }

    /// Whether its faults affect the servers, so that no other run may share them meanwhile.
    pub(super) fn is_alone(self) -> bool {
        match self {
            Self::One(fault) => fault.reach != Reach::Installation,
            Self::Mixed => true,
            Self::Upgrade(_) => false,
        }
    }

    /// Whether its run requires a RabbitMQ cluster.
    pub(super) fn needs_cluster(self) -> bool {
        matches!(self, Self::One(fault) if fault.reach == Reach::Cluster)
    }

    /// The faults of its run. The same seed yields the same ones.
    pub(super) fn strikes(self, seed: u64) -> Vec<Strike> {
        let mut rng = StdRng::seed_from_u64(seed);
        match self {
            Self::One(fault) => {
                let times = match fault.weight {
                    Weight::Whole => return vec![strike(&mut rng, fault, Moment::AfterPost(Duration::ZERO))],
                    Weight::Heavy => 2,
                    Weight::Light => rng.random_range(3..=5),
                };
                let mut strikes: Vec<Strike> = (0..times)
                    .map(|number| {
                        // One in each part of the run, at a random place in it.
                        let place = f64::from(number) + rng.random_range(0.1..0.9);
                        let moment = Moment::Settled(LATEST * place / f64::from(times));
                        strike(&mut rng, fault, moment)
                    })
                    .collect();
                if fault.strikes_the_form {
                    // The submission itself must survive it.
                    let moment = after_post(&mut rng);
                    strikes.push(strike(&mut rng, fault, moment));
                }
                strikes
            }
            Self::Upgrade(order) => {
                let mut steps: Vec<What> = changes(order, &mut rng).into_iter().map(What::Change).collect();
                if order == Order::Any {
                    // Commands of the web server, while processes of both programs run.
                    steps.insert(rng.random_range(1..steps.len()), What::Fault(&PAUSE_RUN));
                }
                let times = steps.len() as f64;
                let steps = steps.into_iter().enumerate().map(|(number, what)| {
                    let place = number as f64 + rng.random_range(0.1..0.9);
                    Strike { what, moment: Moment::Settled(LATEST * place / times), seed: rng.random() }
                });
                steps.collect()
            }
            Self::Mixed => {
                let faults = Fault::all().filter(|fault| fault.mixes());
                let strikes = faults.map(|fault| {
                    let moment = match fault.weight {
                        Weight::Whole => Moment::AfterPost(Duration::ZERO),
                        _ if fault.strikes_the_form => after_post(&mut rng),
                        _ => Moment::Settled(rng.random_range(0.02..LATEST)),
                    };
                    strike(&mut rng, fault, moment)
                });
                strikes.collect()
            }
        }
    }
}

fn after_post(rng: &mut StdRng) -> Moment {
    Moment::AfterPost(Duration::from_millis(rng.random_range(0..SUBMISSION_MS)))
}

fn strike(rng: &mut StdRng, fault: &'static Fault, moment: Moment) -> Strike {
    Strike { what: What::Fault(fault), moment, seed: rng.random() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_yields_the_same_strikes_during_the_run() {
        for plan in Choice::All.plans(Some(Order::Documented)).into_iter().chain([Plan::Upgrade(Order::Any)]) {
            for seed in 0..50 {
                let strikes = plan.strikes(seed);
                assert!(!strikes.is_empty());
                assert_eq!(strikes, plan.strikes(seed));
                let shares = strikes.iter().filter_map(|strike| match strike.moment {
                    Moment::Settled(share) => Some(share),
                    Moment::AfterPost(_) => None,
                });
                assert!(shares.into_iter().all(|share| (0.0..LATEST).contains(&share)));
            }
        }
        assert_ne!(Plan::Mixed.strikes(1), Plan::Mixed.strikes(2));
    }

    #[test]
    fn an_upgrade_requires_a_revision_and_has_ordered_steps() {
        let upgrades = |choice: Choice, order| choice.plans(order).into_iter().filter(|plan| plan.upgrades()).count();
        assert_eq!((upgrades(Choice::All, None), upgrades(Choice::All, Some(Order::Any))), (0, 1));
        assert_eq!(upgrades(Choice::Plan(Plan::Mixed), Some(Order::Any)), 0);
        for seed in 0..50 {
            let strikes = Plan::Upgrade(Order::Any).strikes(seed);
            let shares: Vec<f64> = strikes
                .iter()
                .map(|strike| match strike.moment {
                    Moment::Settled(share) => share,
                    Moment::AfterPost(_) => panic!("{strike:?}"),
                })
                .collect();
            assert!(shares.is_sorted(), "{shares:?}");
            assert_eq!(strikes[0].what, What::Change(Change::SetUp));
            assert!(strikes.iter().any(|strike| strike.what == What::Fault(&PAUSE_RUN)));
        }
    }
}
