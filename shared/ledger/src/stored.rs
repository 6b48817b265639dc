//! Enum values of the ledger that a later version may have written. They are read as they are, instead of failing the whole query.
//!
//! During an upgrade, older processes meet rows of the new version. The rule: a scan over many rows skips those with an unknown
//! value, messages about them wait for a worker that understands it, and the pages show the value as text. So every query reads
//! an enum as [`Stored`], unless its `WHERE` clause names the values.

use serde::{Serialize, Serializer};
use sqlx::{
    Decode, Postgres, Type,
    error::BoxDynError,
    postgres::{PgHasArrayType, PgTypeInfo, PgValueRef},
};

use mailrun_core::{item::ItemState, run::Wanted};

/// A type that the ledger stores as an enum.
pub trait InLedger: Sized {
    /// The SQL form of the type.
    type Sql: Into<Self>;
}

/// The SQL form of an enum of the core crate, which knows nothing of SQL.
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
    /// These states as statement parameters.
    #[must_use]
    pub fn all(states: &[ItemState]) -> Vec<Self> {
        states.iter().copied().map(Into::into).collect()
    }
}

/// An enum value read from the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored<T> {
    /// A value that this version knows.
    Known(T),
    /// A value of a later version, as text.
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

    /// The text, if this version does not know the value.
    #[must_use]
    pub fn later(&self) -> Option<&str> {
        match self {
            Self::Known(_) => None,
            Self::Later(word) => Some(word),
        }
    }
}

impl Stored<Wanted> {
    /// The wanted state to act on. A run with an unknown wanted state is left alone, like a paused one.
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

/// Serialized as in the ledger.
impl<T: Serialize> Serialize for Stored<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Known(value) => value.serialize(serializer),
            Self::Later(word) => word.serialize(serializer),
        }
    }
}
