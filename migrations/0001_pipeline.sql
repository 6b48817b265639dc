-- The ledger of Mailrun. PostgreSQL is the truth, RabbitMQ only the conveyor:
-- everything a run needs in order to be finished can be read from these tables.
--
-- Every column has one writing component, named in its table's comment.

CREATE TYPE item_state AS ENUM ('pending', 'retrying', 'cancelled', 'unknown', 'failed', 'sent');
COMMENT ON TYPE item_state IS
    'Where an invitation stands, in order of rank: a result is applied only if its (attempt, rank) is greater.
pending: to be sent. retrying: an attempt failed for a passing reason, the next one is due. cancelled: will not be sent.
unknown: handed to the mail server, or not: the worker died before it could say. failed: out of tries, or refused for good. sent: accepted by the mail server; final.';

CREATE TYPE wanted_state AS ENUM ('running', 'paused', 'cancelled');
COMMENT ON TYPE wanted_state IS
    'What a person wants of a run. running: release its items. paused: release nothing more for now. cancelled: send nothing more, for good.';

CREATE TYPE pass_kind AS ENUM ('first', 'replay', 'cancel');
COMMENT ON TYPE pass_kind IS
    'Why the pump goes over a run. first: release every item once. replay: release failed or unknown items again. cancel: settle what nobody has begun to send.';

CREATE TABLE users (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    email      text COLLATE "C" NOT NULL UNIQUE,
    name       text,
    created_at timestamptz NOT NULL DEFAULT now(),
    emailed_at timestamptz
);
COMMENT ON TABLE users IS 'The people invited. Writer: web inserts; progress sets emailed_at.';
COMMENT ON COLUMN users.email IS 'The address in lower case, so that UNIQUE means one person.';
COMMENT ON COLUMN users.name IS 'The display name given with the address, if any.';
COMMENT ON COLUMN users.emailed_at IS 'When an invitation was first accepted by the mail server; null: not yet emailed.';

CREATE TABLE runs (
    id               uuid PRIMARY KEY,
    created_at       timestamptz NOT NULL DEFAULT now(),
    subject          text NOT NULL,
    body             text NOT NULL,
    sends_per_second integer CONSTRAINT runs_rate_is_positive CHECK (sends_per_second > 0),
    wanted           wanted_state NOT NULL DEFAULT 'running',
    total            integer NOT NULL,
    already_invited  integer NOT NULL DEFAULT 0,
    already_failed   integer NOT NULL DEFAULT 0,
    repeated         integer NOT NULL DEFAULT 0,
    invalid          integer NOT NULL DEFAULT 0,
    invalid_entries  jsonb NOT NULL DEFAULT '[]'
);
COMMENT ON TABLE runs IS 'What was asked for. Writer: web.';
COMMENT ON COLUMN runs.id IS 'UUIDv5 of the form''s token and the submitted text: the same submission names the same run, so it cannot make a second one.';
COMMENT ON COLUMN runs.sends_per_second IS 'At most so many items are released a second; null: no limit.';
COMMENT ON COLUMN runs.wanted IS 'The wanted state; cancelled is final.';
COMMENT ON COLUMN runs.total IS 'Invitations accepted: the number of the run''s items.';
COMMENT ON COLUMN runs.already_invited IS 'Submitted addresses left out because that person was invited before, or is waiting in another run.';
COMMENT ON COLUMN runs.already_failed IS 'Submitted addresses left out because they failed, or are unclear, in an earlier run, from which they can be retried.';
COMMENT ON COLUMN runs.repeated IS 'Submitted addresses that stood in the list before.';
COMMENT ON COLUMN runs.invalid IS 'Submitted entries that are no email address.';
COMMENT ON COLUMN runs.invalid_entries IS 'The first of them: [{"line", "text", "reason"}].';
CREATE INDEX runs_newest ON runs (created_at DESC, id DESC);

CREATE TABLE run_items (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id      uuid NOT NULL REFERENCES runs,
    user_id     bigint NOT NULL REFERENCES users,
    position    integer NOT NULL,
    attempt     integer NOT NULL DEFAULT 1,
    tries       smallint NOT NULL DEFAULT 1,
    replays     smallint NOT NULL DEFAULT 0,
    state       item_state NOT NULL DEFAULT 'pending',
    error       text,
    due_at      timestamptz,
    finished_at timestamptz,
    CONSTRAINT run_items_position_once UNIQUE (run_id, position)
);
COMMENT ON TABLE run_items IS 'One invitation of one run. Writer: web inserts; progress sets everything from attempt on.';
COMMENT ON COLUMN run_items.position IS 'Its place in the submitted list, from 1; the order of release.';
COMMENT ON COLUMN run_items.attempt IS 'The attempt that state speaks of, from 1.';
COMMENT ON COLUMN run_items.tries IS 'The tries used of the present budget, from 1; a replay starts a new budget.';
COMMENT ON COLUMN run_items.replays IS 'How often a person has asked for this item again.';
COMMENT ON COLUMN run_items.error IS 'Why the attempt did not succeed, in the mail server''s words.';
COMMENT ON COLUMN run_items.due_at IS 'retrying: when the next attempt is due.';
COMMENT ON COLUMN run_items.finished_at IS 'When it was settled (sent, failed, unknown or cancelled); null: open.';
-- Invariant: a person has at most one item that is not cancelled, whatever forms are submitted at the same moment.
CREATE UNIQUE INDEX run_items_one_per_person ON run_items (user_id) WHERE state <> 'cancelled';
-- What the results page lists and a replay goes over; a small part of a large table.
CREATE INDEX run_items_to_look_at ON run_items (run_id, position) WHERE state IN ('failed', 'unknown');

CREATE TABLE run_passes (
    run_id        uuid NOT NULL REFERENCES runs,
    number        integer NOT NULL,
    kind          pass_kind NOT NULL,
    command_id    uuid CONSTRAINT run_passes_command_once UNIQUE,
    states        item_state[] NOT NULL DEFAULT '{}',
    error         text,
    cursor        integer NOT NULL DEFAULT 0,
    chunk_start   integer NOT NULL DEFAULT 0,
    step          integer NOT NULL DEFAULT 0,
    released      integer NOT NULL DEFAULT 0,
    next_due_at   timestamptz NOT NULL DEFAULT now(),
    created_at    timestamptz NOT NULL DEFAULT now(),
    seen_at       timestamptz NOT NULL DEFAULT now(),
    done_at       timestamptz,
    PRIMARY KEY (run_id, number)
);
COMMENT ON TABLE run_passes IS 'The pump''s place in a run: one row a pass, the highest number is the present one. Writer: fan_out.';
COMMENT ON COLUMN run_passes.command_id IS 'The command that asked for this pass, so that its duplicate starts no second one; null for the first pass.';
COMMENT ON COLUMN run_passes.states IS 'replay: the states asked for.';
COMMENT ON COLUMN run_passes.error IS 'replay: only items with this error; null: all.';
COMMENT ON COLUMN run_passes.cursor IS 'Items up to this position are released.';
COMMENT ON COLUMN run_passes.chunk_start IS 'The cursor before the newest chunk.';
COMMENT ON COLUMN run_passes.step IS 'The step that comes next; a message for another step is stale.';
COMMENT ON COLUMN run_passes.released IS 'Items released by this pass.';
COMMENT ON COLUMN run_passes.next_due_at IS 'The rate budget: the next item may be released from this moment on.';
COMMENT ON COLUMN run_passes.seen_at IS 'When a message last drove this pass: the sweeper puts one back if it is long ago.';
COMMENT ON COLUMN run_passes.done_at IS 'When the pass had gone over the whole run.';

CREATE TABLE run_progress (
    run_id      uuid PRIMARY KEY REFERENCES runs,
    total       integer NOT NULL,
    pending     integer NOT NULL,
    retrying    integer NOT NULL DEFAULT 0,
    cancelled   integer NOT NULL DEFAULT 0,
    unknown     integer NOT NULL DEFAULT 0,
    failed      integer NOT NULL DEFAULT 0,
    sent        integer NOT NULL DEFAULT 0,
    started_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    -- Invariant: the counters cannot drift from the total.
    CONSTRAINT run_progress_adds_up
        CHECK (total = pending + retrying + cancelled + unknown + failed + sent),
    CONSTRAINT run_progress_not_negative
        CHECK (least(pending, retrying, cancelled, unknown, failed, sent) >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE run_progress IS 'The counters behind the progress bar: each equals a count(*) over run_items at every commit. Writer: web inserts; progress updates.';
COMMENT ON COLUMN run_progress.started_at IS 'When the run was accepted, or was begun again by a replay.';
COMMENT ON COLUMN run_progress.updated_at IS 'When a counter last moved.';
COMMENT ON COLUMN run_progress.finished_at IS 'When nothing was open any more; null: something is.';

-- What the sweeper looks at: few rows, and an index that the counters' updates leave alone.
CREATE INDEX run_progress_unfinished ON run_progress (run_id) WHERE finished_at IS NULL;

CREATE TABLE run_samples (
    run_id  uuid NOT NULL REFERENCES runs,
    at      timestamptz NOT NULL,
    settled integer NOT NULL,
    PRIMARY KEY (run_id, at)
);
COMMENT ON TABLE run_samples IS 'The progress of a run over time, a row a second while it moves. Writer: progress.';
COMMENT ON COLUMN run_samples.at IS 'The second, truncated.';
COMMENT ON COLUMN run_samples.settled IS 'Items neither pending nor retrying at the end of that second.';

CREATE TABLE workers (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    roles        text NOT NULL,
    host         text NOT NULL,
    pid          integer NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    in_flight    integer NOT NULL DEFAULT 0
);
COMMENT ON TABLE workers IS 'The worker processes, past and present. Writer: each its own row.';
COMMENT ON COLUMN workers.heartbeat_at IS 'The newest sign of life; one that is too old means dead.';
COMMENT ON COLUMN workers.stopped_at IS 'When it ended in good order, leaving no claim open; null: it runs, or died.';
COMMENT ON COLUMN workers.in_flight IS 'Claims not yet reported, at the last heartbeat.';

CREATE TABLE attempts (
    item_id    bigint NOT NULL,
    number     integer NOT NULL,
    worker_id  bigint NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (item_id, number)
);
COMMENT ON TABLE attempts IS
    'The claims: a row here is the right to carry out that attempt, or to cancel it. Insert-only; the primary key is the fence. Writer: send (fan_out for a cancelled run).
No foreign keys: this is the hottest table, and a row is only ever inserted by a join with run_items.';

COMMENT ON COLUMN attempts.worker_id IS 'Who carries it out; 0: nobody ever will, the run was cancelled.';

CREATE TABLE outbox (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message      jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    publish_at   timestamptz NOT NULL DEFAULT now(),
    published_at timestamptz
);
COMMENT ON TABLE outbox IS 'Run messages to publish, written in the transaction that makes them true. Writer: web inserts; its relay marks.';
COMMENT ON COLUMN outbox.message IS 'A RunMessage, for the queue mailrun.runs.';
COMMENT ON COLUMN outbox.publish_at IS 'Not before this moment.';
COMMENT ON COLUMN outbox.published_at IS 'When the broker had confirmed it.';
CREATE INDEX outbox_unpublished ON outbox (publish_at, id) WHERE published_at IS NULL;
