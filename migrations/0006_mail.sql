-- What real mail needs: people not to write to, a state for those who were left out, rate limits that hold while attempts
-- are repeated, and the reason why nothing is sent at the moment.

COMMENT ON TYPE item_state IS
    'Where an invitation stands, in order of rank: a result is applied only if its (attempt, rank) is greater.
pending: to be sent. retrying: an attempt failed for a passing reason, the next one is due. cancelled: will not be sent. skipped: will not be sent, the address was suppressed by then.
unknown: handed to the mail server, or not: nobody was told. failed: out of tries, or refused for good. sent: accepted by the mail server; final.';

CREATE TYPE suppression_reason AS ENUM ('unsubscribed', 'complained', 'bounced', 'asked');
COMMENT ON TYPE suppression_reason IS
    'Why nobody is to write to an address. unsubscribed: its owner followed the link in a mail. complained: its owner called a mail spam. bounced: a mail server said that there is no such address. asked: an operator added it.';

CREATE TABLE suppressions (
    email      text COLLATE "C" PRIMARY KEY,
    reason     suppression_reason NOT NULL,
    detail     text,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE suppressions IS
    'Addresses that nobody writes to any more. Insert-only: the first reason stays, until an operator deletes the row. Writer: web (progress for an address that was refused while sending).';
COMMENT ON COLUMN suppressions.email IS 'In lower case, as in users; it need not be of one of them.';
COMMENT ON COLUMN suppressions.detail IS 'In the mail server''s or the operator''s words.';

ALTER TABLE runs ADD COLUMN suppressed integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN runs.suppressed IS 'Submitted addresses left out because they are suppressed.';

-- Rewrites the table: a generated column's expression can't be changed in place.
DROP INDEX run_items_one_per_person;
ALTER TABLE run_items DROP COLUMN active;
ALTER TABLE run_items
    ADD COLUMN active boolean NOT NULL GENERATED ALWAYS AS (state NOT IN ('cancelled', 'skipped')) STORED;
COMMENT ON COLUMN run_items.active IS 'Whether the item counts as its person''s invitation: it is neither cancelled nor skipped.';
-- Invariant: a person has at most one item that counts, whatever forms are submitted at the same moment.
CREATE UNIQUE INDEX run_items_one_per_person ON run_items (user_id) WHERE active;

ALTER TABLE run_progress
    ADD COLUMN skipped integer NOT NULL DEFAULT 0,
    ADD COLUMN repeats integer NOT NULL DEFAULT 0,
    DROP CONSTRAINT run_progress_adds_up,
    DROP CONSTRAINT run_progress_not_negative;
ALTER TABLE run_progress
    ADD CONSTRAINT run_progress_adds_up
        CHECK (total = pending + retrying + cancelled + skipped + unknown + failed + sent),
    ADD CONSTRAINT run_progress_not_negative
        CHECK (least(pending, retrying, cancelled, skipped, unknown, failed, sent) >= 0);
COMMENT ON COLUMN run_progress.repeats IS 'Attempts that had to be made again by themselves: they count towards the rate limit.';

COMMENT ON COLUMN attempts.worker_id IS 'Who carries it out; nobody ever will if it is 0 (the run was cancelled) or -1 (the address was suppressed).';

ALTER TABLE run_passes ADD COLUMN charged integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN run_passes.charged IS 'How many of the run''s repeats the rate budget has been charged with.';

CREATE TABLE sending_budget (
    single      boolean PRIMARY KEY DEFAULT true CHECK (single),
    next_due_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE sending_budget IS 'The rate budget of the whole installation: one row. Writer: fan_out.';
COMMENT ON COLUMN sending_budget.next_due_at IS 'The next item of any run may be released from this moment on.';
INSERT INTO sending_budget DEFAULT VALUES;

CREATE TABLE signing_key (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    key  bytea NOT NULL
);
COMMENT ON TABLE signing_key IS 'What unsubscribe links are signed with: made once, so that links in mails that went out years ago still work. Writer: this migration.';
-- Two random UUIDs: 244 bits from the system's generator.
INSERT INTO signing_key (key) SELECT sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea);

ALTER TABLE workers
    ADD COLUMN lane_reason text,
    ADD COLUMN lane_until  timestamptz;
COMMENT ON COLUMN workers.lane_reason IS 'Why it sends nothing at the moment, in the mail server''s words; null: it sends.';
COMMENT ON COLUMN workers.lane_until IS 'When it tries again.';
