-- Suppressions that can be listed and paged, test sends, and an outbox for more than run messages.

ALTER TABLE suppressions ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY;
CREATE UNIQUE INDEX suppressions_by_number ON suppressions (number);
COMMENT ON COLUMN suppressions.number IS 'The order in which they came, and a name for pages'' addresses, which must not hold an email address.';
COMMENT ON TABLE suppressions IS
    'Addresses that nobody writes to any more. Insert-only: the first reason stays, until an operator deletes the row. Writer: web and the command line (progress for an address that was refused while sending).';

COMMENT ON COLUMN runs.id IS 'UUIDv5 of the form''s token, the submitted list, subject and text: the same submission names the same run, so it cannot make a second one.';

ALTER TABLE outbox ADD COLUMN kind text NOT NULL DEFAULT 'mailrun.run.v1';
COMMENT ON TABLE outbox IS 'Messages to publish, written in the transaction that makes them true. Writer: web inserts; its relay marks.';
COMMENT ON COLUMN outbox.kind IS 'The type of the message, with its version; it says which queue the message is for.';
COMMENT ON COLUMN outbox.message IS 'The message''s body.';

CREATE TYPE test_state AS ENUM ('sent', 'failed', 'unknown');
COMMENT ON TYPE test_state IS
    'What became of a test. sent: accepted by the mail server. failed: not sent. unknown: handed to the mail server, and the answer was lost.';

CREATE TABLE test_sends (
    id          uuid PRIMARY KEY,
    email       text NOT NULL,
    subject     text NOT NULL,
    body        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    claimed_at  timestamptz,
    worker_id   bigint,
    state       test_state,
    reason      text,
    finished_at timestamptz,
    CONSTRAINT test_sends_claimed_by_somebody CHECK ((claimed_at IS NULL) = (worker_id IS NULL)),
    CONSTRAINT test_sends_finished_in_a_state CHECK ((finished_at IS NULL) = (state IS NULL))
);
COMMENT ON TABLE test_sends IS
    'Single mails that the writer of an invitation sends to look at it. Nobody counts as invited by one. Writer: web inserts; send sets everything from claimed_at on. Deleted after a day.';
COMMENT ON COLUMN test_sends.email IS 'Where it goes, in lower case; it need not be one of users.';
COMMENT ON COLUMN test_sends.subject IS 'The invitation''s subject, with its placeholders.';
COMMENT ON COLUMN test_sends.body IS 'The invitation''s text, with its placeholders.';
COMMENT ON COLUMN test_sends.claimed_at IS 'When a worker took it, which happens once: so it goes out at most once. Null: it waits.';
COMMENT ON COLUMN test_sends.worker_id IS 'The worker that took it; if that one dies before finished_at is set, nobody knows whether it went out.';
COMMENT ON COLUMN test_sends.state IS 'What became of it; null: not known yet.';
COMMENT ON COLUMN test_sends.reason IS 'Why it was not sent, in the mail server''s words.';
COMMENT ON COLUMN test_sends.finished_at IS 'When that was known.';
CREATE INDEX test_sends_oldest ON test_sends (created_at);
