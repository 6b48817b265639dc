//! The rights of each process in PostgreSQL: a role for each writer, with the columns it writes and no others.
//!
//! The table below is the whole truth: `mailrun setup` grants what it says, and takes away everything else. A test compares it
//! with the schema, so a column that a migration adds fails there until it is decided here who writes it.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, PgConnection, PgPool, error::DatabaseError};

use crate::settings::{RolesConfig, Writer};

use Writer::{FanOut, Progress, Send, Web};

/// A table, and who writes what of it. Columns are separated by spaces.
struct Table {
    name: &'static str,
    /// None: everybody reads it.
    readers: Option<&'static [Writer]>,
    /// The columns that are named when a row is inserted.
    insert: &'static [(Writer, &'static str)],
    /// The columns that are changed later. Locking a row takes the right to change one of them.
    update: &'static [(Writer, &'static str)],
    delete: &'static [Writer],
    /// The columns that the database fills in by itself: defaults, identities, generated columns.
    filled_in: &'static str,
}

const NONE: Table = Table { name: "", readers: None, insert: &[], update: &[], delete: &[], filled_in: "" };

/// Every table of the schema. The operator's commands write any of them, but for the key of the links.
const TABLES: &[Table] = &[
    Table {
        name: "users",
        insert: &[(Web, "id email erased_at scrubbed_at")],
        // Pruning keeps who was emailed. Pages erase people.
        update: &[(Progress, "emailed_at"), (FanOut, "emailed_at scrubbed_at"), (Web, "email name erased_at")],
        filled_in: "created_at",
        ..NONE
    },
    Table {
        name: "runs",
        insert: &[(Web, "id kind hidden subject body sends_per_second total")],
        update: &[
            (Web, "wanted total already_invited already_failed suppressed repeated invalid invalid_entries"),
            // With a relay that is stopped its runs are paused.
            (Send, "wanted"),
            // Pruning cancels hidden runs that nobody waits for. `restored_at` is for locking the rows of runs that are pruned:
            // what is written there goes with the row.
            (FanOut, "wanted restored_at"),
        ],
        delete: &[FanOut],
        filled_in: "created_at",
        ..NONE
    },
    Table {
        name: "run_items",
        insert: &[(Web, "run_id user_id position name typed data")],
        update: &[
            (Progress, "attempt tries replays state error due_at finished_at overtaken"),
            // Erasing a person.
            (Web, "name typed data error"),
            (FanOut, "name typed error"),
        ],
        delete: &[FanOut],
        filled_in: "id troubled active",
        ..NONE
    },
    Table {
        name: "run_passes",
        // Small hidden runs are released with their submission.
        insert: &[
            (FanOut, "run_id number kind command_id states error"),
            (Web, "run_id number kind cursor released done_at"),
        ],
        update: &[
            (
                FanOut,
                "cursor chunk_start step released next_due_at seen_at done_at looked_at drained per_second chunk_at tidied_at",
            ),
            // Erasing a person.
            (Web, "error"),
        ],
        delete: &[FanOut],
        filled_in: "created_at charged",
        ..NONE
    },
    Table {
        name: "run_progress",
        insert: &[(Web, "run_id total pending")],
        update: &[
            (
                Progress,
                "total pending retrying cancelled skipped unknown failed sent repeats started_at updated_at finished_at",
            ),
            // To lock the rows of runs that are pruned. What is written there goes with the row.
            (FanOut, "updated_at"),
            // To lock them while a replay is asked for, or suppressions are counted.
            (Web, "updated_at"),
        ],
        delete: &[FanOut],
        ..NONE
    },
    Table {
        name: "run_samples",
        insert: &[(Progress, "run_id at settled")],
        update: &[(Progress, "settled")],
        delete: &[FanOut],
        ..NONE
    },
    Table {
        name: "workers",
        insert: &[
            (FanOut, "roles host pid permits settings"),
            (Send, "roles host pid permits settings"),
            (Progress, "roles host pid permits settings"),
        ],
        update: &[
            (FanOut, "heartbeat_at stopped_at died_at in_flight rebuilds lane_reason lane_until rejected"),
            (Send, "heartbeat_at stopped_at died_at in_flight rebuilds lane_reason lane_until rejected"),
            (Progress, "heartbeat_at stopped_at died_at in_flight rebuilds lane_reason lane_until rejected"),
            // Erasing a person.
            (Web, "lane_reason"),
        ],
        delete: &[FanOut],
        filled_in: "id started_at",
        ..NONE
    },
    Table {
        name: "attempts",
        insert: &[(Send, "item_id number worker_id"), (FanOut, "item_id number worker_id")],
        // What a job withholds, in the transaction of the claim.
        update: &[(Send, "worker_id")],
        delete: &[FanOut],
        filled_in: "started_at",
        ..NONE
    },
    Table {
        name: "receipts",
        // The claims of cancelled items are made by the same statement, with an empty receipt.
        insert: &[(Send, "worker_id number item_ids attempts"), (FanOut, "worker_id number item_ids attempts")],
        delete: &[Send, FanOut],
        ..NONE
    },
    Table {
        name: "pacing",
        insert: &[(Send, "run_id next_at")],
        update: &[(Send, "next_at owed_us")],
        delete: &[FanOut],
        ..NONE
    },
    Table { name: "sending_budget", update: &[(FanOut, "next_due_at")], filled_in: "single", ..NONE },
    Table {
        name: "buried_results",
        insert: &[(Progress, "run_id item_id attempt state reason")],
        // Erasing a person.
        update: &[(Web, "reason")],
        delete: &[FanOut],
        filled_in: "buried_at",
        ..NONE
    },
    Table {
        name: "suppressions",
        insert: &[(Web, "email reason detail run_id created_at"), (Progress, "email reason detail run_id")],
        update: &[(Web, "detail")],
        // Progress takes those back that are held for review.
        delete: &[Web, Progress],
        filled_in: "number",
        ..NONE
    },
    Table {
        name: "suppression_reviews",
        insert: &[(Web, "run_id"), (Progress, "run_id")],
        update: &[(Web, "decided_at accepted")],
        delete: &[FanOut],
        filled_in: "held_at",
        ..NONE
    },
    Table {
        name: "held_suppressions",
        insert: &[(Web, "run_id email detail created_at"), (Progress, "run_id email detail created_at")],
        update: &[(Web, "email detail")],
        delete: &[Web],
        ..NONE
    },
    Table {
        name: "relay_stops",
        insert: &[(Send, "relay reason alike runs")],
        update: &[(Send, "runs alike"), (Web, "answered_at fault reason runs")],
        filled_in: "number stopped_at",
        ..NONE
    },
    // For processes of the version before jobs, beside which this one may run.
    Table {
        name: "test_sends",
        insert: &[(Web, "id email subject body")],
        update: &[(Send, "claimed_at worker_id state reason finished_at"), (Web, "reason")],
        delete: &[FanOut, Web],
        filled_in: "created_at",
        ..NONE
    },
    Table {
        name: "outbox",
        insert: &[(Web, "kind message")],
        update: &[(Web, "publish_at published_at message")],
        delete: &[FanOut],
        filled_in: "id created_at",
        ..NONE
    },
    Table {
        name: "pruned_runs",
        insert: &[(FanOut, "run_id kind")],
        // To lock them.
        update: &[(FanOut, "pruned_at")],
        delete: &[FanOut],
        ..NONE
    },
    Table {
        name: "sweeps",
        insert: &[(FanOut, "run_id driven put_back buried told_again")],
        delete: &[FanOut],
        filled_in: "id swept_at",
        ..NONE
    },
    Table {
        name: "installation",
        update: &[
            (Web, "epoch epoch_at"),
            (FanOut, "epoch epoch_at"),
            (Send, "epoch epoch_at"),
            (Progress, "epoch epoch_at"),
        ],
        filled_in: "single id restored_epoch restored_at",
        ..NONE
    },
    // What links are signed with: who has it can unsubscribe everybody.
    // Fan-out finds erased people by their tombstones, which are made with it.
    Table { name: "signing_key", readers: Some(&[Web, Send, FanOut]), filled_in: "single key", ..NONE },
    // Views of tables above, each with the same readers.
    Table { name: "live_workers", ..NONE },
    Table { name: "run_counters", ..NONE },
    // Which migrations the schema has had.
    Table {
        name: "_sqlx_migrations",
        filled_in: "version description installed_on success checksum execution_time",
        ..NONE
    },
];

/// Two setups at the same moment may get into each other's way; the second look finds what the first one has made.
const TRIES: u32 = 5;
/// The lock that they take.
const SETUP_LOCK: i64 = 0x6d61_696c_726f_6c65;

/// What became of the roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// They are there, with their rights.
    Yes,
    /// They are not there, and this user may not create them. All processes use one user then.
    MayNotCreateRoles,
}

/// Creates the roles where they are missing, and grants each what its process writes, and nothing else. Repeating it changes
/// nothing.
///
/// # Errors
/// The database's.
pub async fn grant(pool: &PgPool, config: &RolesConfig) -> sqlx::Result<Granted> {
    let mut tries = 1;
    loop {
        match grant_once(pool, config).await {
            Err(error) if tries < TRIES && is_of_another_setup(&error) => tries += 1,
            result => return result,
        }
    }
}

/// An object that exists by now, or a row of the catalogue that somebody else has changed.
fn is_of_another_setup(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| ["42710", "23505", "XX000", "40001", "40P01"].contains(&code.as_ref()))
}

async fn grant_once(pool: &PgPool, config: &RolesConfig) -> sqlx::Result<Granted> {
    let mut tx = pool.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(SETUP_LOCK).execute(&mut *tx).await?;
    let may_create: bool =
        sqlx::query_scalar("SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user")
            .fetch_one(&mut *tx)
            .await?;
    for writer in Writer::ALL {
        let name = config.name(writer);
        let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)")
            .bind(&name)
            .fetch_one(&mut *tx)
            .await?;
        let statement = match (exists, config.verifier(writer)) {
            (false, _) if !may_create => return Ok(Granted::MayNotCreateRoles),
            // A role without a password exists for its rights: another user may be made a member of it.
            (false, None) => format!("CREATE ROLE {} NOLOGIN", quoted(&name)),
            (false, Some(verifier)) => format!("CREATE ROLE {} LOGIN PASSWORD {}", quoted(&name), literal(&verifier)),
            (true, Some(verifier)) => format!("ALTER ROLE {} LOGIN PASSWORD {}", quoted(&name), literal(&verifier)),
            (true, None) => continue,
        };
        execute(&mut tx, statement).await?;
    }
    let database: String = sqlx::query_scalar("SELECT current_database()::text").fetch_one(&mut *tx).await?;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()
         UNION ALL SELECT viewname::text FROM pg_views WHERE schemaname = current_schema()",
    )
    .fetch_all(&mut *tx)
    .await?;
    let schema: String = sqlx::query_scalar("SELECT current_schema()::text").fetch_one(&mut *tx).await?;
    let is_there = |table: &&Table| tables.iter().any(|name| name == table.name);
    execute(&mut tx, statements(config, &database, &schema, is_there)).await?;
    tx.commit().await?;
    Ok(Granted::Yes)
}

async fn execute(conn: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    // Everything in it that is not ours is quoted.
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await.map(drop)
}

/// All rights anew: none, then those of the table.
fn statements(config: &RolesConfig, database: &str, schema: &str, is_there: impl Fn(&&Table) -> bool) -> String {
    let (database, schema) = (quoted(database), quoted(schema));
    let all: Vec<String> = Writer::ALL.iter().map(|writer| quoted(&config.name(*writer))).collect();
    let all = all.join(", ");
    let mut sql = format!(
        "REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {all};
         REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM {all};
         GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {all};
         GRANT USAGE ON SCHEMA {schema} TO {all};"
    );
    let mut add = |rights: &str, table: &str, writer| {
        let role = quoted(&config.name(writer));
        // Writing to a string can't fail.
        let _ = write!(sql, "\nGRANT {rights} ON {schema}.{} TO {role};", quoted(table));
    };
    let columns = |names: &str| names.split(' ').map(quoted).collect::<Vec<_>>().join(", ");
    for table in TABLES.iter().filter(is_there) {
        for writer in Writer::PROCESSES {
            if table.readers.is_none_or(|readers| readers.contains(&writer)) {
                add("SELECT", table.name, writer);
            }
        }
        for (writer, names) in table.insert {
            add(&format!("INSERT ({})", columns(names)), table.name, *writer);
        }
        for (writer, names) in table.update {
            add(&format!("UPDATE ({})", columns(names)), table.name, *writer);
        }
        for writer in table.delete {
            add("DELETE", table.name, *writer);
        }
        let is_ours = table.readers.is_none() && !table.name.starts_with('_');
        add(if is_ours { "SELECT, INSERT, UPDATE, DELETE" } else { "SELECT" }, table.name, Writer::Operator);
    }
    let (web, operator) = (quoted(&config.name(Web)), quoted(&config.name(Writer::Operator)));
    // New people get their ids before they are inserted.
    let _ = write!(sql, "\nGRANT USAGE ON SEQUENCE {schema}.users_id_seq TO {web};");
    let _ = write!(sql, "\nGRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA {schema} TO {operator};");
    // A worker with several roles has the rights of each.
    let parts: Vec<String> = Writer::WORKERS.iter().map(|writer| quoted(&config.name(*writer))).collect();
    let _ = write!(sql, "\nGRANT {} TO {};", parts.join(", "), quoted(&config.name(Writer::Worker)));
    sql
}

/// The columns of a schema that nobody is named for, or that are named and do not exist, in words: for the test that compares
/// this table with the schema. `schema` holds each table with each of its columns.
#[must_use]
pub fn differences(schema: &[(String, String)]) -> Vec<String> {
    let named: Vec<(&str, &str)> = TABLES
        .iter()
        .flat_map(|table| {
            let written = table.insert.iter().chain(table.update).map(|(_, columns)| *columns);
            let columns = written.chain([table.filled_in]).flat_map(str::split_whitespace);
            columns.map(|column| (table.name, column))
        })
        .collect();
    let exists = |&(table, column): &(&str, &str)| schema.iter().any(|known| known.0 == table && known.1 == column);
    let is_named = |known: &&(String, String)| named.contains(&(known.0.as_str(), known.1.as_str()));
    let missing = schema.iter().filter(|known| !is_named(known)).map(|(table, column)| {
        format!("the column {table}.{column} has no writer: say in shared/ledger/src/grants.rs which process writes it")
    });
    let gone = named.iter().filter(|named| !exists(named)).map(|(table, column)| {
        format!("the column {table}.{column} does not exist: take it out of shared/ledger/src/grants.rs")
    });
    missing.chain(gone).collect()
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_without_a_writer_is_named() {
        let column = |table: &str, column: &str| (table.to_owned(), column.to_owned());
        let found = differences(&[column("users", "shoe_size"), column("users", "email")]);
        assert!(found[0].contains("users.shoe_size has no writer"), "{}", found[0]);
        assert!(found.iter().any(|text| text.contains("users.name does not exist")), "{found:?}");
        assert!(!found.iter().any(|text| text.contains("users.email ")), "{found:?}");
    }

    #[test]
    fn every_right_is_taken_before_some_are_given() {
        let sql = statements(&RolesConfig::default(), "a\"b", "public", |_| true);
        assert!(sql.starts_with("REVOKE ALL ON ALL TABLES"), "{sql}");
        assert!(sql.contains("ON DATABASE \"a\"\"b\""), "{sql}");
        assert!(sql.contains(r#"GRANT UPDATE ("emailed_at") ON "public"."users" TO "mailrun_progress";"#), "{sql}");
        assert!(!sql.contains(r#""signing_key" TO "mailrun_progress""#), "{sql}");
    }
}
