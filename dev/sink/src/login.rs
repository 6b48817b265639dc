//! SASL logins of mail clients: PLAIN, LOGIN and XOAUTH2.

/// A user and a password or bearer token.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user's name.
    pub user: String,
    /// The password or token.
    pub secret: String,
}

impl Login {
    /// RFC 4616: an authorization identity, the user and the password, separated by NUL.
    pub(super) fn from_plain(response: &str) -> Option<Self> {
        let mut parts = response.split('\0');
        let (_identity, user, secret) = (parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then(|| Self { user: user.to_owned(), secret: secret.to_owned() })
    }

    /// `user=…^Aauth=Bearer …^A^A`
    pub(super) fn from_xoauth2(response: &str) -> Option<Self> {
        let (user, rest) = response.strip_prefix("user=")?.split_once('\x01')?;
        let secret = rest.strip_prefix("auth=Bearer ")?.strip_suffix("\x01\x01")?;
        Some(Self { user: user.to_owned(), secret: secret.to_owned() })
    }
}

impl std::fmt::Debug for Login {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_plain_and_xoauth2() {
        let login = Login { user: "ann".into(), secret: "let me in".into() };
        assert_eq!(Login::from_plain("\0ann\0let me in").as_ref(), Some(&login));
        assert_eq!(Login::from_plain("somebody\0ann\0let me in").as_ref(), Some(&login));
        assert_eq!(Login::from_xoauth2("user=ann\x01auth=Bearer let me in\x01\x01").as_ref(), Some(&login));
        assert!(!format!("{login:?}").contains("let me in"));
    }

    #[test]
    fn refuses_malformed_responses() {
        for response in ["", "ann", "\0ann", "\0ann\0pass\0word"] {
            assert_eq!(Login::from_plain(response), None, "{response:?}");
        }
        for response in ["", "user=ann", "user=ann\x01auth=Basic x\x01\x01", "user=ann\x01auth=Bearer x"] {
            assert_eq!(Login::from_xoauth2(response), None, "{response:?}");
        }
    }
}
