//! Creates and drops databases of the private PostgreSQL.

use sqlx::{AssertSqlSafe, Connection as _};

use super::{error::StackError, postgres};

/// PostgreSQL's error code for a database that exists.
const DUPLICATE_DATABASE: &str = "42P04";
/// The same, if two processes create it simultaneously.
const UNIQUE_VIOLATION: &str = "23505";

/// Creates a database, if it does not exist.
pub(crate) async fn create(port: u16, password: &str, name: &str) -> Result<(), StackError> {
    match run(port, password, format!("CREATE DATABASE {}", quoted(name))).await {
        Err(sqlx::Error::Database(error))
            if error.code().is_some_and(|code| [DUPLICATE_DATABASE, UNIQUE_VIOLATION].contains(&code.as_ref())) =>
        {
            Ok(())
        }
        other => other.map_err(|source| StackError::Database { what: format!("create the database {name}"), source }),
    }
}

/// Drops a database if it exists, ending its sessions.
pub(crate) async fn drop(port: u16, password: &str, name: &str) -> Result<(), StackError> {
    let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quoted(name));
    run(port, password, statement)
        .await
        .map_err(|source| StackError::Database { what: format!("drop the database {name}"), source })
}

async fn run(port: u16, password: &str, statement: String) -> Result<(), sqlx::Error> {
    let mut connection = postgres::connect(port, password, "postgres").await?;
    // The only part from outside is a name, and it is quoted.
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await?;
    connection.close().await
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
    }
}
