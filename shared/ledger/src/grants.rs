//! The privileges of each process in PostgreSQL: one role for each writer, limited to the columns it writes.
//!
//! The table below is the only definition. `mailrun setup` grants what it lists and revokes everything else. A test compares it
//! with the schema: a column added by a migration fails there until this table says which process writes it.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, PgConnection, PgPool, error::DatabaseError};

use crate::settings::{RolesConfig, Writer};

use Writer::{FanOut, Progress, Send, Web};

/// A table and its writers. Columns are separated by spaces.
struct Table {
    name: &'static str,
    /// `None`: all roles read it.
    readers: Option<&'static [Writer]>,
    /// The columns named in inserts.
    insert: &'static [(Writer, &'static str)],
    /// The columns that are updated. Locking a row requires the right to update one of them.
    update: &'static [(Writer, &'static str)],
    delete: &'static [Writer],
    /// The columns that the database fills in: defaults, identities, generated columns.
    filled_in: &'static str,
}

const NONE: Table = Table { name: "", readers: None, insert: &[], update: &[], delete: &[], filled_in: "" };

/// All tables of the schema. The operator's commands may write all of them except the signing key.
const TABLES: &[Table] = &[
    Table {
        name: "users",
        insert: &[(Web, "id email erased_at scrubbed_at")],
        // Pruning records who was emailed. The pages erase people.
        update: &[(Progress, "emailed_at"), (FanOut, "emailed_at scrubbed_at"), (Web, "email name erased_at")],
        filled_in: "created_at",
        ..NONE
    },
    Table {
        name: "runs",
        insert: &[(Web, "id kind hidden subject body sends_per_second total")],
        update: &[
            (Web, "wanted total already_invited already_failed suppressed repeated invalid invalid_entries"),
            // Stopping a relay pauses its runs.
            (Send, "wanted"),
            // Pruning cancels hidden runs that have become useless. `restored_at` is listed only to lock the rows of pruned
            // runs, which are deleted.
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
            // Only to lock the rows of pruned runs, which are deleted.
            (FanOut, "updated_at"),
            // Only to lock the rows while a replay is requested or suppressions are counted.
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
        // Attempts that a job withholds right after their claim.
        update: &[(Send, "worker_id")],
        delete: &[FanOut],
        filled_in: "started_at",
        ..NONE
    },
    Table {
        name: "receipts",
        // Fan-out claims cancelled items by the same statement, with an empty receipt.
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
        // Progress removes suppressions that are held for review.
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
    // For processes of the version before jobs, which may run beside this one.
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
        // Only to lock the rows.
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
    // The key that signs links: it can unsubscribe every recipient. Fan-out needs it to recognise erased people by their
    // tombstones.
    Table { name: "signing_key", readers: Some(&[Web, Send, FanOut]), filled_in: "single key", ..NONE },
    // Views of the tables above, with the same readers.
    Table { name: "live_workers", ..NONE },
    Table { name: "run_counters", ..NONE },
    // The migrations applied to the schema.
    Table {
        name: "_sqlx_migrations",
        filled_in: "version description installed_on success checksum execution_time",
        ..NONE
    },
];

/// Concurrent setups may conflict. A retry finds what the other one has created.
const TRIES: u32 = 5;
/// The advisory lock of setups.
const SETUP_LOCK: i64 = 0x6d61_696c_726f_6c65;

/// The result of [`grant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// The roles exist and have their privileges.
    Yes,
    /// The roles are missing and this user may not create them. All processes then share one user.
    MayNotCreateRoles,
}

/// Creates missing roles, and grants each exactly what its process writes. Idempotent.
pub async fn grant(pool: &PgPool, config: &RolesConfig) -> sqlx::Result<Granted> {
    let mut tries = 1;
    loop {
        match grant_once(pool, config).await {
            Err(error) if tries < TRIES && is_of_another_setup(&error) => tries += 1,
            result => return result,
        }
    }
}

/// The object exists by now, or another setup has changed the same catalogue row.
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
            // A role without a password only holds privileges: another user may be made a member of it.
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
    // All foreign parts of the statement are quoted.
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await.map(drop)
}

/// The statements that revoke all privileges and grant those of the table.
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
    // The role of a worker with several roles has the privileges of each.
    let parts: Vec<String> = Writer::WORKERS.iter().map(|writer| quoted(&config.name(*writer))).collect();
    let _ = write!(sql, "\nGRANT {} TO {};", parts.join(", "), quoted(&config.name(Writer::Worker)));
    sql
}

/// The differences between the table and a schema, as text: columns without a writer, and columns that do not exist. `schema` lists
/// each table with each of its columns. For a test.
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
    fn all_privileges_are_revoked_before_any_is_granted() {
        let sql = statements(&RolesConfig::default(), "a\"b", "public", |_| true);
        assert!(sql.starts_with("REVOKE ALL ON ALL TABLES"), "{sql}");
        assert!(sql.contains("ON DATABASE \"a\"\"b\""), "{sql}");
        assert!(sql.contains(r#"GRANT UPDATE ("emailed_at") ON "public"."users" TO "mailrun_progress";"#), "{sql}");
        assert!(!sql.contains(r#""signing_key" TO "mailrun_progress""#), "{sql}");
    }
}
