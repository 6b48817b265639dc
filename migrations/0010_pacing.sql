-- Rate limits are kept where attempts are claimed, so that retries and dead letters that are moved by hand are paced too.

CREATE TABLE pacing (
    run_id  uuid PRIMARY KEY,
    next_at timestamptz NOT NULL,
    owed_us bigint NOT NULL DEFAULT 0,
    CONSTRAINT pacing_owed_not_negative CHECK (owed_us >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE pacing IS
    'The meters of rate limits: one row for each limited run, and one for the installation. A claim reserves send times in them, in its own transaction. Writer: send; prune deletes those of pruned runs.';
COMMENT ON COLUMN pacing.run_id IS 'The run; the nil UUID: the whole installation.';
COMMENT ON COLUMN pacing.next_at IS 'The next free send time.';
COMMENT ON COLUMN pacing.owed_us IS 'Unused time that is still to be made up for, in microseconds.';

COMMENT ON COLUMN run_passes.next_due_at IS 'The next item may be released from this moment on. Release runs somewhat ahead of the rate limit, which the claims keep.';
COMMENT ON COLUMN run_passes.charged IS 'Not used any more.';
COMMENT ON TABLE sending_budget IS 'How far the whole installation has released items: one row. Release runs somewhat ahead of the rate limit, which the claims keep (pacing). Writer: fan_out.';
COMMENT ON COLUMN runs.sends_per_second IS 'At most so many attempts are begun a second; null: no limit.';
