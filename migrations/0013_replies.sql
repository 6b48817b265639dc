-- Suppressions that wait for a person, and relays that were stopped because of refusals that nobody could explain.

-- Which run's recipient an address was, if a mail server said that it does not exist: so that what a run has suppressed can be held
-- or undone.
ALTER TABLE suppressions ADD COLUMN run_id uuid;
COMMENT ON COLUMN suppressions.run_id IS 'The run in which a mail server said that the address does not exist; null: it came otherwise.';
CREATE INDEX suppressions_by_run ON suppressions (run_id) WHERE run_id IS NOT NULL;

-- A run that would suppress an unusual share of its recipients. From then on its suppressions are held.
CREATE TABLE suppression_reviews (
    run_id     uuid PRIMARY KEY,
    held_at    timestamptz NOT NULL DEFAULT now(),
    decided_at timestamptz,
    accepted   boolean,
    CONSTRAINT suppression_reviews_decided CHECK ((decided_at IS NULL) = (accepted IS NULL))
);
COMMENT ON TABLE suppression_reviews IS 'Runs whose suppressions are held until a person decides. Writer: progress and web insert; web and the command line decide.';
COMMENT ON COLUMN suppression_reviews.held_at IS 'When the share of suppressions became unusual.';
COMMENT ON COLUMN suppression_reviews.decided_at IS 'When a person decided; null: not yet.';
COMMENT ON COLUMN suppression_reviews.accepted IS 'True: the addresses do not exist, and later ones of this run are suppressed at once. False: they are dropped, and so are later ones.';

CREATE TABLE held_suppressions (
    run_id     uuid NOT NULL REFERENCES suppression_reviews ON DELETE CASCADE,
    email      text NOT NULL,
    detail     text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, email)
);
COMMENT ON TABLE held_suppressions IS 'Addresses that would be suppressed, and are not until their run''s review is decided. Writer: as for suppression_reviews.';
COMMENT ON COLUMN held_suppressions.email IS 'The address, in lower case.';
COMMENT ON COLUMN held_suppressions.detail IS 'In the mail server''s words.';

CREATE TYPE relay_fault AS ENUM ('us', 'them');
COMMENT ON TYPE relay_fault IS 'Whose fault refusals were. us: the relay refused the sender, and the recipients are tried again. them: each recipient was refused for a reason of its own.';

CREATE TABLE relay_stops (
    number      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    relay       text NOT NULL,
    stopped_at  timestamptz NOT NULL DEFAULT now(),
    reason      text NOT NULL,
    alike       text[] NOT NULL,
    runs        uuid[] NOT NULL,
    answered_at timestamptz,
    fault       relay_fault,
    CONSTRAINT relay_stops_answered CHECK ((answered_at IS NULL) = (fault IS NULL))
);
-- Several workers may meet the same refusals.
CREATE UNIQUE INDEX relay_stops_one_open ON relay_stops (relay) WHERE answered_at IS NULL;
COMMENT ON TABLE relay_stops IS 'Relays that are stopped because many refusals could not be explained. Writer: send inserts; web and the command line answer.';
COMMENT ON COLUMN relay_stops.relay IS 'The relay, as host:port.';
COMMENT ON COLUMN relay_stops.reason IS 'What was counted, and the relay''s words.';
COMMENT ON COLUMN relay_stops.alike IS 'What the refusals have in common. If they were the recipients'' fault, such refusals are not counted any more.';
COMMENT ON COLUMN relay_stops.runs IS 'The runs that were paused with it; they go on with the answer.';
