-- Whether a worker lives is found out by watching whether its heartbeat changes, and not by comparing clocks: PostgreSQL's may be
-- set forward or back by hours.

ALTER TABLE workers ADD COLUMN died_at timestamptz;
COMMENT ON TABLE workers IS 'The worker processes, past and present. Writer: each its own row; died_at: whichever process finds it out.';
COMMENT ON COLUMN workers.heartbeat_at IS 'The newest heartbeat. Others watch whether it changes; what time it says does not matter.';
COMMENT ON COLUMN workers.died_at IS
    'When another process found that the heartbeat had not changed for heartbeat.dead_after_ms. Final: a worker that finds itself declared dead ends. Null: it lives, or stopped in good order.';

CREATE FUNCTION mailrun_is_recent(at timestamptz, seconds double precision) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN at > clock_timestamp() - make_interval(secs => seconds) AND at < clock_timestamp() + interval '5 seconds';
COMMENT ON FUNCTION mailrun_is_recent IS
    'Whether a moment lies within the last so many seconds. One that lies in the future was written before the clock was set back, and is not recent: whatever waits for it to pass would wait for hours.';
