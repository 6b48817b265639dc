-- What SQL knows of item states and of workers, each in one place. Adding a state: see CONTRIBUTING.md.

CREATE VIEW live_workers AS
    SELECT id, permits, in_flight, lane_reason, lane_until, heartbeat_at
    FROM workers WHERE stopped_at IS NULL AND died_at IS NULL;
COMMENT ON VIEW live_workers IS 'The workers that have neither stopped nor been declared dead. A claim whose worker is not among them is orphaned, also if its row is gone.';

CREATE FUNCTION mailrun_unsent() RETURNS item_state[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT ARRAY['pending', 'retrying', 'cancelled', 'skipped', 'unknown', 'failed']::item_state[] $$;
COMMENT ON FUNCTION mailrun_unsent IS 'The states from which an item may still be sent. A state that a later version adds is not among them until that version adds it here.';

CREATE VIEW run_counters AS
    SELECT run_id, total, ARRAY[pending, retrying, cancelled, skipped, unknown, failed, sent] AS counts,
           pending + retrying > 0 AS is_open, started_at, updated_at, finished_at
    FROM run_progress;
COMMENT ON VIEW run_counters IS 'run_progress with its counters as an array, one for each value of item_state, in its order.';

CREATE FUNCTION mailrun_count_items(of_run uuid) RETURNS integer[] LANGUAGE sql STABLE AS
    $$ SELECT array_agg(coalesce(counted.items, 0) ORDER BY states.state)
       FROM unnest(enum_range(NULL::item_state)) AS states (state)
       LEFT JOIN (SELECT state, count(*)::integer AS items FROM run_items WHERE run_id = of_run GROUP BY state) counted
              USING (state) $$;
COMMENT ON FUNCTION mailrun_count_items IS 'How many items of a run are in each state, in the order of item_state: what run_counters has to show.';
