//! Erasing a person. What remains is a tombstone: a keyed hash of the address, by which it is still known that nothing may be sent
//! there, and that the person was invited already. Everything else that says who it was is deleted or replaced.
//!
//! The items stay, so counters and runs don't change. Their next claim is withheld.

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

/// So that a signature made for another purpose with the same key is no tombstone.
const PURPOSE: &[u8] = b"mailrun erased person v1";
/// What stands in place of an address.
const REPLACEMENT: &str = "[erased]";
/// What stands in place of a reply that was about the person.
pub const REPLY_ERASED: &str = "the reply was erased with the person";
/// A statement that goes over all items may take so long.
pub const LONGEST: Duration = Duration::from_secs(600);

/// Makes tombstones of addresses.
#[derive(Clone)]
pub struct Tombs(Hmac<Sha256>);

impl Tombs {
    /// With the installation's key.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        Self(Hmac::new_from_slice(key).expect("a key"))
    }

    /// Reads the key.
    ///
    /// # Errors
    /// The database's.
    pub async fn read(conn: &mut PgConnection) -> sqlx::Result<Self> {
        let key = sqlx::query_scalar!("SELECT key FROM signing_key").fetch_one(conn).await?;
        Ok(Self::new(&key))
    }

    /// The tombstone of an address, as it is compared: always the same one.
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

/// Finds the addresses of erased people in texts, by their tombstones: so nobody has to keep the addresses for that.
pub struct Finder {
    tombs: Tombs,
    tombstones: HashSet<String>,
}

impl Finder {
    /// One for these people.
    ///
    /// # Errors
    /// The database's.
    pub async fn of(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<Self> {
        let tombs = Tombs::read(&mut *conn).await?;
        let names = sqlx::query_scalar::<_, String>("SELECT email FROM users WHERE id = ANY($1)").bind(user_ids);
        let names = names.fetch_all(conn).await?;
        Ok(Self { tombs, tombstones: names.iter().map(|name| hash_of(name).to_owned()).collect() })
    }

    /// The text without their addresses. None: it holds none of them.
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

/// What stands in addresses without quotes, and not around them.
fn may_be_of_address(character: char) -> bool {
    character.is_alphanumeric() || "@.!#$%&*+/=?^_{|}~-".contains(character)
}

/// The tombstone in a name: behind that of somebody who was erased more than once stands a number.
fn hash_of(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// The erased people who must not be invited again: they have got an invitation, or perhaps, or did not want any.
pub struct Blocked {
    tombs: Tombs,
    /// By tombstone, the name under which the person is in the ledger.
    names: HashMap<String, String>,
}

impl Blocked {
    /// Under which name this address is in the ledger, if it is of one of them.
    #[must_use]
    pub fn name(&self, email: &str) -> Option<&str> {
        self.names.get(&self.tombs.of(email)).map(String::as_str)
    }
}

/// Reads them. None: nobody is erased, or all of them may be invited.
///
/// # Errors
/// The database's.
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

/// What was erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    /// Whether the person was in the ledger.
    pub known: bool,
    /// Whether the address was suppressed, which its tombstone is now.
    pub suppressed: bool,
    /// Test mails to the address.
    pub tests: u64,
    /// Other rows in which the address stood: replies of mail servers, invalid entries of lists.
    pub texts: u64,
}

/// Erases a person, in one transaction. `email` is the address as it is compared.
///
/// What is being sent at this moment goes out, and dead letters have to be gone over: see [`unscrubbed`].
///
/// # Errors
/// The database's.
pub async fn erase(conn: &mut PgConnection, email: &str) -> sqlx::Result<Erased> {
    let mut tx = conn.begin().await?;
    let timeout = format!("SET LOCAL statement_timeout = {}", LONGEST.as_millis());
    sqlx::query(AssertSqlSafe(timeout)).execute(&mut *tx).await?;
    let tombstone = Tombs::read(&mut tx).await?.of(email);
    let mut erased = Erased::default();
    // Two who erase the same person wait for each other here.
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
    // The review of its run is decided later.
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

/// Replaces what mail servers replied about these people, and what lists said of them.
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

/// Replaces the address wherever else it may stand. Returns how many rows that was in.
async fn scrub(conn: &mut PgConnection, email: &str) -> sqlx::Result<u64> {
    let pattern = pattern(email, str::to_owned);
    // Within JSON, quotes and backslashes are written otherwise.
    let in_json = self::pattern(email, |text| {
        let quoted = serde_json::to_string(text).unwrap_or_default();
        quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default().to_owned()
    });
    let mut rows = 0;
    // Both are names of ours.
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

/// A regular expression of PostgreSQL for an address in both spellings of its domain, alone and not as the end or the beginning of
/// another one.
fn pattern(email: &str, write: impl Fn(&str) -> String) -> String {
    let spellings: Vec<String> = spellings(email).iter().map(|spelling| escape(&write(spelling))).collect();
    format!("(?<![[:alnum:]._%+-])({})(?![[:alnum:]-])", spellings.join("|"))
}

/// An address with its domain in ASCII and in letters.
fn spellings(email: &str) -> Vec<String> {
    let Some((local, domain)) = email.rsplit_once('@') else { return vec![email.to_owned()] };
    let mut spellings = vec![email.to_owned()];
    let other = [idna::domain_to_unicode(domain).0, idna::domain_to_ascii(domain).unwrap_or_default()];
    for domain in other.iter().filter(|other| !other.is_empty() && *other != domain) {
        spellings.push(format!("{local}@{domain}"));
    }
    spellings
}

/// Whatever is no letter and no digit stands for itself behind a backslash.
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

/// A person of whom something may be left outside the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unscrubbed {
    /// The person.
    pub user_id: i64,
    /// The person's items.
    pub item_ids: Vec<i64>,
    /// Whether an attempt at one of them is under way, whose result will say something.
    pub in_flight: bool,
}

/// The erased people of whom something may be left on `mailrun.dead`, or in results that are under way.
///
/// # Errors
/// The database's.
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

/// Notes that nothing is left of these people, and replaces what results have said of them meanwhile.
///
/// # Errors
/// The database's.
pub async fn mark_scrubbed(conn: &mut PgConnection, user_ids: &[i64]) -> sqlx::Result<()> {
    erase_items(&mut *conn, user_ids).await?;
    sqlx::query!("UPDATE users SET scrubbed_at = now() WHERE id = ANY($1)", user_ids).execute(conn).await?;
    Ok(())
}

/// Which of these people are erased.
///
/// # Errors
/// The database's.
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
    fn a_tombstone_needs_the_key_and_says_nothing_of_the_address() {
        let (mine, other) = (Tombs::new(b"key"), Tombs::new(b"another"));
        assert_eq!(mine.of("ann@x.org"), mine.of("ann@x.org"));
        assert_ne!(mine.of("ann@x.org"), other.of("ann@x.org"));
        assert_ne!(mine.of("ann@x.org"), mine.of("bob@x.org"));
        assert!(is_tombstone(&mine.of("ann@x.org")) && !mine.of("ann@x.org").contains("ann"));
        assert_eq!(mine.of("ann@x.org").len(), ERASED.len() + 64);
    }

    #[test]
    fn addresses_are_found_in_texts_by_their_tombstones() {
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
    fn a_pattern_stands_for_the_address_in_both_spellings() {
        let pattern = pattern("a+b@xn--mller-kva.example", str::to_owned);
        assert_eq!(
            pattern,
            r"(?<![[:alnum:]._%+-])(a\+b\@xn\-\-mller\-kva\.example|a\+b\@müller\.example)(?![[:alnum:]-])"
        );
    }
}
