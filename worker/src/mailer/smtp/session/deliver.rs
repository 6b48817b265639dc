//! Delivers a mail: its envelope together with the message before it, together with nothing else, or one command at a time.

use std::{mem, sync::Arc, time::Duration};

use smtp_proto::{EXT_8BIT_MIME, EXT_CHUNKING, EXT_PIPELINING, EXT_SIZE};

use super::{
    super::{
        super::message::ComposedMail,
        limits::Deadline,
        reply::Reply,
        verdict::{Cause, Failure, Stage},
    },
    Session, bad_reply,
    manners::Sent,
    positive, refused,
};
use crate::attempt::Attempt;

/// How long to wait for the reply to RSET.
const RESET_TIMEOUT: Duration = Duration::from_secs(30);

impl Session {
    /// Hands a mail to the server. With pipelining, `following` may name a mail whose envelope is sent right behind this message;
    /// the connection must then be given to that mail, whose own call continues the conversation.
    ///
    /// # Errors
    /// If the server did not confirm that it accepted the mail.
    pub async fn deliver(
        &mut self,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
        following: impl FnOnce(&Self) -> Option<Arc<ComposedMail>>,
    ) -> Result<(), Failure> {
        let is_given = mem::take(&mut self.is_offered);
        if is_given {
            self.answers(Sent::Behind, deadline).await?;
        } else {
            attempt.may_proceed().await.map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
            if !self.takes(composed) {
                let why = "the mail server does not support non-ASCII characters before the @ sign (no SMTPUTF8)";
                return Err(Failure { stage: Stage::Mail, cause: Cause::Unsupported(why.into()) });
            }
            if self.sends_chunks() {
                return self.deliver_chunk(composed, attempt, deadline).await;
            }
            self.offer(composed, deadline).await?;
        }
        // The last safe moment: without the content, the server has nothing to accept. An envelope that was sent behind another message
        // may have waited for that one's reply for long: the run may be paused by now.
        let allowed = if is_given { attempt.may_proceed().await } else { attempt.may_commit() };
        allowed.map_err(|withdrawn| Failure::withdrawn(Stage::Content, withdrawn))?;
        let next = if self.pipelines() { following(self) } else { None };
        let envelope = next.as_ref().map_or_else(String::new, |next| self.envelope(next));
        let limit = || deadline.limit(Stage::Content);
        let reply = self.dialogue.message(&composed.bytes, envelope.as_bytes(), limit).await?;
        self.is_offered = next.is_some();
        positive(Stage::Content, reply)
    }

    fn pipelines(&self) -> bool {
        self.capabilities.has(EXT_PIPELINING) && self.manners.pipelining()
    }

    fn sends_chunks(&self) -> bool {
        self.capabilities.has(EXT_CHUNKING) && self.manners.chunking() && self.pipelines()
    }

    fn mail_command(&self, composed: &ComposedMail) -> String {
        let mut mail = format!("MAIL FROM:<{}>", composed.from);
        if self.capabilities.has(EXT_SIZE) {
            mail.push_str(&format!(" SIZE={}", composed.bytes.len()));
        }
        if composed.needs_utf8 {
            mail.push_str(if self.capabilities.has(EXT_8BIT_MIME) { " BODY=8BITMIME SMTPUTF8" } else { " SMTPUTF8" });
        }
        mail
    }

    /// The commands of a mail that may be sent together (RFC 2920, 3.1).
    fn envelope(&mut self, composed: &ComposedMail) -> String {
        self.mails += 1;
        format!("{}\r\nRCPT TO:<{}>\r\nDATA\r\n", self.mail_command(composed), composed.to)
    }

    /// Sends the envelope of a mail, together or one command at a time, until the server waits for the message.
    async fn offer(&mut self, composed: &ComposedMail, deadline: &Deadline) -> Result<(), Failure> {
        let limit = |stage| deadline.limit(stage);
        if self.pipelines() {
            let commands = format!("{}{}", self.reset_command(), self.envelope(composed));
            self.dialogue.send(Stage::Mail, commands.as_bytes(), limit(Stage::Mail)).await?;
            return self.answers(Sent::Alone, deadline).await;
        }
        if self.needs_reset {
            let reply = self.dialogue.command(Stage::Mail, "RSET", RESET_TIMEOUT.min(limit(Stage::Mail))).await?;
            self.was_reset(&reply)?;
        }
        self.mails += 1;
        self.needs_reset = true;
        let mail = self.mail_command(composed);
        positive(Stage::Mail, self.dialogue.command(Stage::Mail, &mail, limit(Stage::Mail)).await?)?;
        let rcpt = format!("RCPT TO:<{}>", composed.to);
        positive(Stage::Rcpt, self.dialogue.command(Stage::Rcpt, &rcpt, limit(Stage::Rcpt)).await?)?;
        go_ahead(self.dialogue.command(Stage::Data, "DATA", limit(Stage::Data)).await?)?;
        // The message ends the transaction, whatever the reply.
        self.needs_reset = false;
        Ok(())
    }

    fn reset_command(&self) -> &'static str {
        if self.needs_reset { "RSET\r\n" } else { "" }
    }

    /// A server that refuses RSET cannot take another mail on this connection.
    fn was_reset(&mut self, reply: &Reply) -> Result<(), Failure> {
        self.needs_reset = !reply.is_positive();
        if self.needs_reset {
            let cause = Cause::Lost(format!("RSET was refused: {reply}"));
            return Err(Failure { stage: Stage::Mail, cause });
        }
        Ok(())
    }

    /// Reads the replies to an envelope that was sent together: all of them, whatever the first one says (RFC 2920, 3.1).
    async fn answers(&mut self, sent: Sent, deadline: &Deadline) -> Result<(), Failure> {
        let result = self.read_answers(deadline).await;
        match &result {
            Err(failure) if !failure.leaves_a_connection() => self.manners.failed(sent, failure),
            _ => self.manners.answered(sent),
        }
        result
    }

    async fn read_answers(&mut self, deadline: &Deadline) -> Result<(), Failure> {
        if self.needs_reset {
            let reply = self.dialogue.listen(Stage::Mail, RESET_TIMEOUT.min(deadline.limit(Stage::Mail))).await?;
            self.was_reset(&reply)?;
        }
        let mut refusal = None;
        for stage in [Stage::Mail, Stage::Rcpt, Stage::Data] {
            let reply = self.next_reply(stage, deadline, &mut refusal).await?;
            if is_out_of_step(&reply) {
                self.manners.mishandles(stage);
                return Err(bad_reply(stage, &reply));
            }
            let is_last = reply.code == 421;
            if refusal.is_some() && stage == Stage::Data && reply.code == 354 {
                self.end_empty_message(deadline).await;
                break;
            }
            let judged = if stage == Stage::Data { go_ahead(reply) } else { positive(stage, reply) };
            if let Err(failure) = judged {
                self.needs_reset = true;
                if refusal.is_none() {
                    if is_last || !matches!(failure.cause, Cause::Refused(_)) {
                        return Err(failure);
                    }
                    refusal = Some(failure);
                }
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    /// The next of several replies. If the connection fails after a refusal, the refusal is the better reason.
    async fn next_reply(
        &mut self,
        stage: Stage,
        deadline: &Deadline,
        refusal: &mut Option<Failure>,
    ) -> Result<Reply, Failure> {
        let reply = self.dialogue.listen(stage, deadline.limit(stage)).await;
        self.is_lost |= reply.is_err();
        reply.map_err(|failure| refusal.take().unwrap_or(failure))
    }

    /// The server wants the message of a mail without a recipient: it gets an empty one, which it has to refuse (RFC 2920, 3.1).
    async fn end_empty_message(&mut self, deadline: &Deadline) {
        let ended = self.dialogue.command(Stage::Data, ".", deadline.limit(Stage::Data)).await;
        self.needs_reset = false;
        self.is_lost = ended.is_err();
    }

    /// Sends a mail in one go, and then reads all replies.
    async fn deliver_chunk(
        &mut self,
        composed: &ComposedMail,
        attempt: &Attempt,
        deadline: &Deadline,
    ) -> Result<(), Failure> {
        attempt.may_commit().map_err(|withdrawn| Failure::withdrawn(Stage::Mail, withdrawn))?;
        self.mails += 1;
        let reset = self.needs_reset;
        let mut bytes = format!(
            "{}{}\r\nRCPT TO:<{}>\r\nBDAT {} LAST\r\n",
            self.reset_command(),
            self.mail_command(composed),
            composed.to,
            composed.bytes.len()
        )
        .into_bytes();
        bytes.extend_from_slice(&composed.bytes);
        self.needs_reset = true;
        self.dialogue.send(Stage::Content, &bytes, deadline.limit(Stage::Content)).await?;
        // From here on the server has all it needs, so a lost connection leaves the outcome unknown.
        let content = |failure: Failure| Failure { stage: Stage::Content, ..failure };
        if reset {
            let reply = self.dialogue.listen(Stage::Content, deadline.limit(Stage::Content)).await?;
            self.was_reset(&reply).map_err(content)?;
            self.needs_reset = true;
        }
        let mut refusal = None;
        for stage in [Stage::Mail, Stage::Rcpt, Stage::Content] {
            let reply = self.next_reply(Stage::Content, deadline, &mut refusal).await?;
            let is_last = reply.code == 421;
            if let Err(failure) = positive(stage, reply)
                && refusal.is_none()
            {
                match failure.cause {
                    Cause::Refused(_) if is_last => return Err(failure),
                    Cause::Refused(_) => refusal = Some(failure),
                    _ => return Err(content(failure)),
                }
            }
        }
        self.needs_reset = refusal.is_some();
        refusal.map_or(Ok(()), Err)
    }
}

/// Whether a reply is about the order of the commands: the server does not follow the pipelining that it offers.
fn is_out_of_step(reply: &Reply) -> bool {
    let text = reply.lines.join(" ").to_lowercase();
    reply.code >= 500 && (text.contains("pipelin") || text.contains("synchroni"))
}

/// The reply to DATA.
fn go_ahead(reply: Reply) -> Result<(), Failure> {
    match reply.code {
        354 => Ok(()),
        400.. => Err(refused(Stage::Data, reply)),
        _ => Err(bad_reply(Stage::Data, &reply)),
    }
}
