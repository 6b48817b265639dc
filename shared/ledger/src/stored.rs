//! Values of the ledger's enums that a later version may have written: read as they are, instead of failing the whole query.
//!
//! While an installation is upgraded, older processes meet rows of the new ones. The rule: a walk over many rows skips those
//! whose word this version does not know, messages about them wait for a worker that understands it, and the pages show the
//! word. So every query that reads an enum reads it as [`Stored`], unless its `WHERE` names the words.

use serde::{Serialize, Serializer};
use sqlx::{
    Decode, Postgres, Type,
    error::BoxDynError,
    postgres::{PgHasArrayType, PgTypeInfo, PgValueRef},
};

use mailrun_core::{item::ItemState, run::Wanted};

/// A type that stands in the ledger as an enum.
pub trait InLedger: Sized {
    /// The same values as PostgreSQL's type has them.
    type Sql: Into<Self>;
}

/// The ledger's form of an enum of the core, which knows nothing of SQL.
macro_rules! sql_enum {
    ($(#[$doc:meta])* $name:ident = $core:ident as $sql:literal { $($value:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
        #[sqlx(type_name = $sql, rename_all = "snake_case")]
        #[expect(missing_docs, reason = "the core documents each")]
        pub enum $name {
            $($value),*
        }

        impl From<$core> for $name {
            fn from(value: $core) -> Self {
                match value {
                    $($core::$value => Self::$value),*
                }
            }
        }

        impl From<$name> for $core {
            fn from(value: $name) -> Self {
                match value {
                    $($name::$value => Self::$value),*
                }
            }
        }

        impl InLedger for $core {
            type Sql = $name;
        }
    };
}

sql_enum! {
    /// `item_state`
    SqlState = ItemState as "item_state" { Pending, Retrying, Cancelled, Skipped, Unknown, Failed, Sent }
}

sql_enum! {
    /// `wanted_state`
    SqlWanted = Wanted as "wanted_state" { Running, Paused, Cancelled }
}

impl SqlState {
    /// These states, for a statement.
    #[must_use]
    pub fn all(states: &[ItemState]) -> Vec<Self> {
        states.iter().copied().map(Into::into).collect()
    }
}

/// A value of an enum of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored<T> {
    /// This version knows it.
    Known(T),
    /// A later version's word.
    Later(String),
}

impl<T> Stored<T> {
    /// The value, if this version knows it.
    #[must_use]
    pub fn known(self) -> Option<T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Later(_) => None,
        }
    }

    /// The word, if this version does not know it.
    #[must_use]
    pub fn later(&self) -> Option<&str> {
        match self {
            Self::Known(_) => None,
            Self::Later(word) => Some(word),
        }
    }
}

impl Stored<Wanted> {
    /// What to do about a run. If the word is a later version's, the run is left alone, like a paused one.
    #[must_use]
    pub fn acted_on(self) -> Wanted {
        self.known().unwrap_or(Wanted::Paused)
    }
}

impl<T: InLedger<Sql: Type<Postgres>>> Type<Postgres> for Stored<T> {
    fn type_info() -> PgTypeInfo {
        T::Sql::type_info()
    }

    fn compatible(info: &PgTypeInfo) -> bool {
        T::Sql::compatible(info)
    }
}

impl<T: InLedger<Sql: PgHasArrayType>> PgHasArrayType for Stored<T> {
    fn array_type_info() -> PgTypeInfo {
        T::Sql::array_type_info()
    }

    fn array_compatible(info: &PgTypeInfo) -> bool {
        T::Sql::array_compatible(info)
    }
}

impl<'r, T: InLedger<Sql: Decode<'r, Postgres>>> Decode<'r, Postgres> for Stored<T> {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        let word = <&str as Decode<Postgres>>::decode(value.clone())?;
        Ok(T::Sql::decode(value).map_or_else(|_| Self::Later(word.to_owned()), |value| Self::Known(value.into())))
    }
}

/// The word, as the ledger has it.
impl<T: Serialize> Serialize for Stored<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Known(value) => value.serialize(serializer),
            Self::Later(word) => word.serialize(serializer),
        }
    }
}
