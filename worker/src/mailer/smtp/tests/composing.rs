//! Which thread composes a mail.

use std::{pin::pin, task::Poll};

use futures::poll;

use super::*;

#[tokio::test]
async fn a_long_mail_is_composed_on_a_blocking_thread() {
    let mailer = mailer(&config(&["smtp://127.0.0.1:1?tls=none".into()]));
    let long = Mail { template: Arc::new(Template::new("Hello", &"a\n".repeat(50_000)).unwrap()), ..ann() };
    // If this thread composed it, the mail would be composed by now.
    let mut writing = pin!(mailer.0.compose(&long));
    assert!(poll!(&mut writing).is_pending());
    assert!(writing.await.unwrap().bytes.len() > 200_000);
    // A cheap mail is composed on this thread.
    assert!(matches!(poll!(pin!(mailer.0.compose(&ann()))), Poll::Ready(Ok(_))));
}
