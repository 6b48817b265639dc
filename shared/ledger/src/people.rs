//! Erases people. A tombstone remains: a keyed hash of the address. It shows that nothing may be sent to the address and that
//! the person was already invited. Everything else that identifies the person is deleted or replaced.
//!
//! The items stay, so counters and runs do not change. Their next claim is withheld.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt::Write as _,
    time::Duration,
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use mailrun_core::{
    address::{Address, ERASED},
    outcome::DELETED,
};

/// Domain separation: a signature made with the same key for another purpose is not a tombstone.
const PURPOSE: &[u8] = b"mailrun erased person v1";
/// Replaces an address.
const REPLACEMENT: &str = "[erased]";
/// Replaces a reply about an erased person.
pub const REPLY_ERASED: &str = "the reply was erased with the person";
/// The time limit of a statement that scans all items.
pub const LONGEST: Duration = Duration::from_secs(600);

/// Computes tombstones.
#[derive(Clone)]
pub struct Tombs(Hmac<Sha256>);

impl Tombs {
    /// Uses the installation's key.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        Self(Hmac::new_from_slice(key).expect("a key"))
    }

    /// Reads the key.
    pub async fn read(conn: &mut PgConnection) -> sqlx::Result<Self> {
        let key = sqlx::query_scalar!("SELECT key FROM signing_key").fetch_one(conn).await?;
        Ok(Self::new(&key))
    }

    /// The tombstone of a normalized address. Deterministic.
    #[must_use]
    pub fn of(&self, email: &str) -> String {
        let hash = self.0.clone().chain_update(PURPOSE).chain_update(email).finalize().into_bytes();
        hash.iter().fold(ERASED.to_owned(), |mut text, byte| {
            // Writing to a string can't fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

/// Finds the addresses of erased people in texts by their tombstones, so that the addresses need not be kept.
pub struct Finder {
    tombs: Tombs,
    tombstones: HashSet<String>,
}

impl Finder {
    /// A finder for these people.
    pub async fn of(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<Self> {
        let tombs = Tombs::read(&mut *conn).await?;
        let names = sqlx::query_scalar::<_, String>("SELECT email FROM users WHERE id = ANY($1)").bind(user_ids);
        let names = names.fetch_all(conn).await?;
        Ok(Self { tombs, tombstones: names.iter().map(|name| hash_of(name).to_owned()).collect() })
    }

    /// The text without their addresses. `None`: it contains none.
    #[must_use]
    pub fn scrubbed(&self, text: &str) -> Option<String> {
        let words = text.split_inclusive(|character: char| !may_be_of_address(character));
        let mut found = false;
        let scrubbed = words
            .map(|word| {
                let address =
                    word.trim_end_matches(|character: char| !may_be_of_address(character) || character == '.');
                if address.contains('@') && self.is_of_erased(address) {
                    found = true;
                    return Cow::Owned(format!("{REPLACEMENT}{}", &word[address.len()..]));
                }
                Cow::Borrowed(word)
            })
            .collect();
        found.then_some(scrubbed)
    }

    fn is_of_erased(&self, address: &str) -> bool {
        address.parse::<Address>().is_ok_and(|Address { email, .. }| self.tombstones.contains(&self.tombs.of(&email)))
    }
}

/// Whether a character occurs in unquoted addresses, and not as a delimiter around them.
fn may_be_of_address(character: char) -> bool {
    character.is_alphanumeric() || "@.!#$%&*+/=?^_{|}~-".contains(character)
}

/// The hash in a stored name. If a person was erased more than once, the name has a number after the hash.
fn hash_of(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// The erased people who must not be invited again: an invitation was or may have been sent, or they refused mail.
pub struct Blocked {
    tombs: Tombs,
    /// By tombstone: the name that replaces the address in the ledger.
    names: HashMap<String, String>,
}

impl Blocked {
    /// The name under which this address is in the ledger, if it is blocked.
    #[must_use]
    pub fn name(&self, email: &str) -> Option<&str> {
        self.names.get(&self.tombs.of(email)).map(String::as_str)
    }
}

/// Reads the blocked people. `None`: there are none.
pub async fn blocked(conn: &mut PgConnection) -> sqlx::Result<Option<Blocked>> {
    let names = sqlx::query_scalar!(
        r#"SELECT email AS "email!" FROM users u
           WHERE erased_at IS NOT NULL
             AND (emailed_at IS NOT NULL
                  OR EXISTS (SELECT FROM run_items i WHERE i.user_id = u.id AND i.active AND i.state <> 'failed'))
           UNION SELECT email FROM suppressions WHERE email LIKE 'erased:%'"#
    )
    .fetch_all(&mut *conn)
    .await?;
    if names.is_empty() {
        return Ok(None);
    }
    let names = names.into_iter().map(|name| (hash_of(&name).to_owned(), name)).collect();
    Ok(Some(Blocked { tombs: Tombs::read(conn).await?, names }))
}

/// The result of [`erase`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Whether the person was in the ledger.
    pub known: bool,
    /// Whether the address was suppressed. Its tombstone is suppressed now.
    pub suppressed: bool,
    /// Test mails to the address.
    pub tests: u64,
    /// Other rows that contained the address: replies of mail servers, invalid entries of lists.
    pub texts: u64,
}

/// Erases a person in one transaction. `email` is the normalized address.
///
/// Attempts in progress are not stopped. Dead letters must be scrubbed afterwards: see [`unscrubbed`].
pub async fn erase(conn: &mut PgConnection, email: &str) -> sqlx::Result<Erased> {
    let mut tx = conn.begin().await?;
    let timeout = format!("SET LOCAL statement_timeout = {}", LONGEST.as_millis());
    sqlx::query(AssertSqlSafe(timeout)).execute(&mut *tx).await?;
    let tombstone = Tombs::read(&mut tx).await?.of(email);
    let mut erased = Erased::default();
    // Concurrent erasures of the same person wait here.
    let user =
        sqlx::query_scalar!("SELECT id FROM users WHERE email = $1 FOR UPDATE", email).fetch_optional(&mut *tx).await?;
    if let Some(user_id) = user {
        erased.known = true;
        sqlx::query!(
            "UPDATE users SET erased_at = now(), name = NULL,
                    email = CASE WHEN EXISTS (SELECT FROM users WHERE email = $2) THEN $2 || '.' || id ELSE $2 END
             WHERE id = $1",
            user_id,
            tombstone,
        )
        .execute(&mut *tx)
        .await?;
        erase_items(&mut tx, &[user_id]).await?;
    }
    erased.suppressed = suppress_tombstone(&mut tx, email, &tombstone).await?;
    // The review of its run is still undecided.
    sqlx::query!("UPDATE held_suppressions SET email = $2, detail = NULL WHERE email = $1", email, tombstone)
        .execute(&mut *tx)
        .await?;
    erased.tests = erase_test_mails(&mut tx, email).await?;
    erased.texts = scrub(&mut tx, email).await?;
    tx.commit().await?;
    Ok(erased)
}

/// Moves a suppression to the tombstone. False: there is none.
async fn suppress_tombstone(conn: &mut PgConnection, email: &str, tombstone: &str) -> sqlx::Result<bool> {
    let moved = sqlx::query!(
        "WITH gone AS (DELETE FROM suppressions WHERE email = $1 RETURNING reason, created_at)
         INSERT INTO suppressions (email, reason, created_at) SELECT $2, reason, created_at FROM gone
         ON CONFLICT (email) DO UPDATE SET detail = NULL",
        email,
        tombstone,
    )
    .execute(&mut *conn)
    .await?;
    if moved.rows_affected() == 0 {
        return Ok(false);
    }
    sqlx::query!(
        "INSERT INTO users (email, erased_at, scrubbed_at) VALUES ($1, now(), now()) ON CONFLICT DO NOTHING",
        tombstone,
    )
    .execute(conn)
    .await?;
    Ok(true)
}

/// Replaces mail servers' replies about these people, and what lists said about them.
async fn erase_items(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<()> {
    sqlx::query!(
        "UPDATE run_items
         SET name = '', typed = NULL,
             error = CASE WHEN error = $3 THEN error WHEN error IS NOT NULL THEN $2 END
         WHERE user_id = ANY($1)",
        user_ids,
        REPLY_ERASED,
        DELETED,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Erases the recipient of test mails. Returns how many there were.
async fn erase_test_mails(conn: &mut PgConnection, email: &str) -> sqlx::Result<u64> {
    let erased = sqlx::query!(
        "UPDATE run_items i SET data = NULL, error = CASE WHEN error IS NOT NULL THEN $2 END
         FROM runs r WHERE r.id = i.run_id AND r.hidden AND i.data->>'email' = $1",
        email,
        REPLY_ERASED,
    )
    .execute(conn)
    .await?;
    Ok(erased.rows_affected())
}

/// Replaces all other occurrences of the address. Returns the number of rows.
async fn scrub(conn: &mut PgConnection, email: &str) -> sqlx::Result<u64> {
    let pattern = pattern(email, str::to_owned);
    // JSON escapes quotes and backslashes.
    let in_json = self::pattern(email, |text| {
        let quoted = serde_json::to_string(text).unwrap_or_default();
        quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default().to_owned()
    });
    let mut rows = 0;
    // Both are our own identifiers, so no quoting is needed.
    for (table, column) in [
        ("run_items", "error"),
        ("run_passes", "error"),
        ("buried_results", "reason"),
        ("workers", "lane_reason"),
        ("suppressions", "detail"),
        ("held_suppressions", "detail"),
        ("relay_stops", "reason"),
    ] {
        let statement = format!(
            "UPDATE {table} SET {column} = regexp_replace({column}, $1, '{REPLACEMENT}', 'gi') WHERE {column} ~* $1"
        );
        rows += sqlx::query(AssertSqlSafe(statement)).bind(&pattern).execute(&mut *conn).await?.rows_affected();
    }
    for (table, column) in [("runs", "invalid_entries"), ("run_items", "data"), ("outbox", "message")] {
        let statement = format!(
            "UPDATE {table} SET {column} = regexp_replace({column}::text, $1, '{REPLACEMENT}', 'gi')::jsonb
             WHERE {column}::text ~* $1"
        );
        rows += sqlx::query(AssertSqlSafe(statement)).bind(&in_json).execute(&mut *conn).await?.rows_affected();
    }
    Ok(rows)
}

/// A PostgreSQL regular expression that matches an address in both spellings of its domain, but not as a part of a longer address.
fn pattern(email: &str, write: impl Fn(&str) -> String) -> String {
    let spellings: Vec<String> = spellings(email).iter().map(|spelling| escape(&write(spelling))).collect();
    format!("(?<![[:alnum:]._%+-])({})(?![[:alnum:]-])", spellings.join("|"))
}

/// An address with its domain in ASCII and in Unicode.
fn spellings(email: &str) -> Vec<String> {
    let Some((local, domain)) = email.rsplit_once('@') else { return vec![email.to_owned()] };
    let mut spellings = vec![email.to_owned()];
    let other = [idna::domain_to_unicode(domain).0, idna::domain_to_ascii(domain).unwrap_or_default()];
    for domain in other.iter().filter(|other| !other.is_empty() && *other != domain) {
        spellings.push(format!("{local}@{domain}"));
    }
    spellings
}

/// Escapes every character that is neither a letter nor a digit.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(2 * text.len());
    for character in text.chars() {
        if character.is_ascii() && !character.is_ascii_alphanumeric() {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

/// An erased person of whom something may be left outside the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unscrubbed {
    /// The person.
    pub user_id: i64,
    /// The person's items.
    pub item_ids: Vec<i64>,
    /// Whether an attempt at one of the items is in progress, whose result may contain a reply.
    pub in_flight: bool,
}

/// The erased people of whom something may be left in `mailrun.dead` or in results in progress.
pub async fn unscrubbed(conn: &mut PgConnection) -> sqlx::Result<Vec<Unscrubbed>> {
    sqlx::query_as!(
        Unscrubbed,
        r#"SELECT u.id AS user_id, coalesce(array_agg(i.id) FILTER (WHERE i.id IS NOT NULL), '{}') AS "item_ids!",
                  coalesce(bool_or(EXISTS (
                      SELECT FROM attempts a JOIN live_workers w ON w.id = a.worker_id
                      WHERE a.item_id = i.id AND i.state <> 'sent'
                        AND (a.number > i.attempt OR (a.number = i.attempt AND i.state = 'pending')))), false) AS "in_flight!"
           FROM users u LEFT JOIN run_items i ON i.user_id = u.id
           WHERE u.erased_at IS NOT NULL AND u.scrubbed_at IS NULL
           GROUP BY u.id"#
    )
    .fetch_all(conn)
    .await
}

/// Records that nothing is left of these people, and replaces what results have said about them since the erasure.
pub async fn mark_scrubbed(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<()> {
    erase_items(&mut *conn, user_ids).await?;
    sqlx::query!("UPDATE users SET scrubbed_at = now() WHERE id = ANY($1)", user_ids).execute(conn).await?;
    Ok(())
}

/// Those of these people who are erased.
pub(super) async fn erased_of(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar!("SELECT id FROM users WHERE erased_at IS NOT NULL AND id = ANY($1)", user_ids)
        .fetch_all(conn)
        .await
}

#[cfg(test)]
mod tests {
    use mailrun_core::address::is_tombstone;

    use super::*;

    #[test]
    fn a_tombstone_depends_on_the_key_and_does_not_reveal_the_address() {
        let (mine, other) = (Tombs::new(b"key"), Tombs::new(b"another"));
        assert_eq!(mine.of("ann@x.org"), mine.of("ann@x.org"));
        assert_ne!(mine.of("ann@x.org"), other.of("ann@x.org"));
        assert_ne!(mine.of("ann@x.org"), mine.of("bob@x.org"));
        assert!(is_tombstone(&mine.of("ann@x.org")) && !mine.of("ann@x.org").contains("ann"));
        assert_eq!(mine.of("ann@x.org").len(), ERASED.len() + 64);
    }

    #[test]
    fn finds_addresses_in_texts_by_their_tombstones() {
        let tombs = Tombs::new(b"key");
        let tombstones = HashSet::from([tombs.of("ann@x.org")]);
        let finder = Finder { tombs, tombstones };
        for (text, scrubbed) in [
            ("550 5.1.1 <Ann@X.org>: user unknown", "550 5.1.1 <[erased]>: user unknown"),
            ("only ann@x.org.", "only [erased]."),
            ("ann@x.org", "[erased]"),
            ("to=ann@y.org, (ann@x.org)", "to=ann@y.org, ([erased])"),
        ] {
            assert_eq!(finder.scrubbed(text).as_deref(), Some(scrubbed));
        }
        for text in ["", "joann@x.org", "ann@x.org.uk", "ann at x.org", "@", "a@b@c"] {
            assert_eq!(finder.scrubbed(text), None, "{text}");
        }
    }

    #[test]
    fn a_pattern_matches_both_spellings_of_an_address() {
        let pattern = pattern("a+b@xn--mller-kva.example", str::to_owned);
        assert_eq!(
            pattern,
            r"(?<![[:alnum:]._%+-])(a\+b\@xn\-\-mller\-kva\.example|a\+b\@müller\.example)(?![[:alnum:]-])"
        );
    }
}
