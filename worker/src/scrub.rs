//! What is left of erased people outside the tables that name them: their dead letters quote mail servers' replies, and a result that
//! was under way when they were erased may bring one.

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

/// Why it could not be finished. The next try does it all again.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    /// PostgreSQL's.
    #[error(transparent)]
    Ledger(#[from] sqlx::Error),
    /// RabbitMQ's.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Finishes erasing people of whom nothing is being sent at this moment. Returns how many are left.
///
/// # Errors
/// A server's.
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
    let walked = walk_over(broker, publisher, |letter| fate(letter, &items, &finder)).await?;
    if walked.left > 0 {
        return Ok(in_flight.len() + ready.len());
    }
    in_time(limit, async { people::mark_scrubbed(&mut *pool.acquire().await?, &user_ids).await }).await?;
    info!(
        people = ready.len(),
        dead_letters = walked.changed,
        "nothing is left of erased people on the dead-letter queue"
    );
    Ok(in_flight.len())
}

/// A letter of one of these items loses its reply, and another one what quotes an address. A result that could not be counted goes:
/// it holds the reply in its body.
fn fate(letter: &Delivery, items: &HashSet<i64>, finder: &Finder) -> Fate {
    let kind = letter.properties.kind().as_ref().map(ShortString::as_str);
    if let Ok(message) = decode::<ResultsMessage>(kind, &letter.data)
        && message.results.iter().any(|result| items.contains(&result.item_id))
    {
        return Fate::Goes;
    }
    let Some(error) = header_text(letter, ERROR_HEADER) else { return Fate::Stays };
    let is_about = decode::<ItemMessage>(kind, &letter.data).is_ok_and(|item| items.contains(&item.item_id));
    let scrubbed = if is_about { Some(REPLY_ERASED.to_owned()) } else { finder.scrubbed(&error) };
    match scrubbed {
        Some(scrubbed) if scrubbed != error => {
            Fate::Becomes(Box::new(to_the_tail(letter).header(ERROR_HEADER, &scrubbed)))
        }
        _ => Fate::Stays,
    }
}
