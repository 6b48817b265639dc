-- What repairs itself is counted, so that somebody can ask why it had to.

ALTER TABLE workers ADD COLUMN rebuilds integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN workers.rebuilds IS 'How often its watchdog has built a consumer''s connection anew, up to the last heartbeat.';

CREATE TABLE sweeps (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id     uuid NOT NULL,
    swept_at   timestamptz NOT NULL DEFAULT now(),
    driven     bigint NOT NULL,
    put_back   bigint NOT NULL,
    buried     bigint NOT NULL,
    told_again bigint NOT NULL,
    CONSTRAINT sweeps_that_did_something CHECK (driven + put_back + buried + told_again > 0)
);
COMMENT ON TABLE sweeps IS 'What the sweeper has repaired, one row for each run and sweep in which there was something. Insert-only. Writer: sweep.';
COMMENT ON COLUMN sweeps.driven IS 'Run messages that were put back: 0 or 1.';
COMMENT ON COLUMN sweeps.put_back IS 'Item messages that were put back.';
COMMENT ON COLUMN sweeps.buried IS 'Claims of dead workers whose items became unknown.';
COMMENT ON COLUMN sweeps.told_again IS 'Items that nobody will send, for which that was told once more: their run was cancelled, or their address suppressed.';
CREATE INDEX sweeps_of_run ON sweeps (run_id);
