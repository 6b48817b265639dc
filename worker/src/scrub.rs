//! Removes what is left of erased people outside the tables that name them: dead letters quote mail servers' replies, and a result
//! that was in progress when the person was erased may add one.

use std::{collections::HashSet, time::Duration};

use lapin::{message::Delivery, types::ShortString};
use mailrun_broker::{Broker, BrokerError, ERROR_HEADER, Publisher};
use mailrun_core::message::{ItemMessage, ResultsMessage, decode};
use mailrun_ledger::{
    in_time,
    people::{self, Finder, REPLY_ERASED},
};
use sqlx::PgPool;
use tracing::info;

use mailrun_broker::dead_letters::{Fate, header_text, to_the_tail, walk_over};

/// Why scrubbing failed. The next try starts over.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    /// PostgreSQL failed.
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    /// RabbitMQ failed.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Finishes erasing people who have no attempt in progress. Returns how many are left.
///
/// # Errors
/// If PostgreSQL or RabbitMQ fails.
pub async fn scrub(
    pool: &PgPool,
    broker: &Broker,
    publisher: &Publisher,
    limit: Duration,
) -> Result<usize, ScrubError> {
    let unscrubbed = in_time(limit, async { people::unscrubbed(&mut *pool.acquire().await?).await }).await?;
    let (in_flight, ready): (Vec<_>, Vec<_>) = unscrubbed.into_iter().partition(|person| person.in_flight);
    if ready.is_empty() {
        return Ok(in_flight.len());
    }
    let items: HashSet<i64> = ready.iter().flat_map(|person| &person.item_ids).copied().collect();
    let user_ids: Vec<i64> = ready.iter().map(|person| person.user_id).collect();
    let finder = in_time(limit, async { Finder::of(&mut *pool.acquire().await?, &user_ids).await }).await?;
    let walked = walk_over(broker, publisher, |delivery| fate(delivery, &items, &finder)).await?;
    if walked.left > 0 {
        return Ok(in_flight.len() + ready.len());
    }
    in_time(limit, async { people::mark_scrubbed(&mut *pool.acquire().await?, &user_ids).await }).await?;
    info!(people = ready.len(), dead_letters = walked.changed, "dead letters scrubbed of erased people");
    Ok(in_flight.len())
}

/// A dead dead of one of these items loses its reply. Other dead letters lose what quotes an erased address. A result that
/// could not be counted is removed: its body contains the reply.
fn fate(delivery: &Delivery, items: &HashSet<i64>, finder: &Finder) -> Fate {
    let kind = delivery.properties.kind().as_ref().map(ShortString::as_str);
    if let Ok(message) = decode::<ResultsMessage>(kind, &delivery.data)
        && message.results.iter().any(|result| items.contains(&result.item_id))
    {
        return Fate::Goes;
    }
    let Some(error) = header_text(delivery, ERROR_HEADER) else { return Fate::Stays };
    let is_about = decode::<ItemMessage>(kind, &delivery.data).is_ok_and(|item| items.contains(&item.item_id));
    let scrubbed = if is_about { Some(REPLY_ERASED.to_owned()) } else { finder.scrubbed(&error) };
    match scrubbed {
        Some(scrubbed) if scrubbed != error => {
            Fate::Becomes(Box::new(to_the_tail(delivery).header(ERROR_HEADER, &scrubbed)))
        }
        _ => Fate::Stays,
    }
}
