-- A run has a kind: the job that processes its items. Runs of a hidden kind are in no list and no count, and are deleted after a day.
-- Test mails, which had a table and a queue of their own, become runs of such a kind.

ALTER TABLE runs
    ADD COLUMN kind text NOT NULL DEFAULT 'invitations',
    ADD COLUMN hidden boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN runs.kind IS 'The job that processes the items; it never changes. A worker without this job leaves the items alone.';
COMMENT ON COLUMN runs.hidden IS 'In no list, count or metric; deleted after a day.';

ALTER TABLE pruned_runs ADD COLUMN kind text NOT NULL DEFAULT 'invitations';
COMMENT ON COLUMN pruned_runs.kind IS 'The kind that the run had: results of its last items may still arrive.';

DROP INDEX runs_newest;
CREATE INDEX runs_newest ON runs (created_at DESC, id DESC) WHERE NOT hidden;
CREATE INDEX runs_hidden ON runs (created_at) WHERE hidden;

ALTER TABLE run_items
    ALTER COLUMN user_id DROP NOT NULL,
    ADD COLUMN data jsonb;
COMMENT ON COLUMN run_items.user_id IS 'The person, of whom at most one item is active; null: the item is about no person in users.';
COMMENT ON COLUMN run_items.data IS 'What the job needs for this item besides the person; null: nothing, or it was erased.';

COMMENT ON COLUMN attempts.worker_id IS
    'The worker that may make the attempt. 0 and below: no worker ever will. 0: the run was cancelled; -2: the person, the run or the data was deleted; others: the job''s reason, negated.';

INSERT INTO runs (id, created_at, kind, hidden, subject, body, total)
SELECT id, created_at, 'test_mail', true, subject, body, 1 FROM test_sends;
INSERT INTO run_items (run_id, position, data, state, error, finished_at)
SELECT id, 1, jsonb_build_object('email', email),
       CASE WHEN claimed_at IS NULL THEN 'pending' WHEN state IS NULL THEN 'unknown' ELSE state::text END::item_state,
       coalesce(reason, CASE WHEN claimed_at IS NOT NULL AND state IS NULL THEN 'the worker that was sending it was upgraded' END),
       CASE WHEN claimed_at IS NOT NULL THEN coalesce(finished_at, now()) END
FROM test_sends;
INSERT INTO run_progress (run_id, total, pending, unknown, failed, sent, started_at, updated_at, finished_at)
SELECT run_id, 1, (state = 'pending')::integer, (state = 'unknown')::integer, (state = 'failed')::integer, (state = 'sent')::integer,
       now(), now(), finished_at
FROM run_items WHERE run_id IN (SELECT id FROM test_sends);
-- Released already: the items' messages are in the outbox.
INSERT INTO run_passes (run_id, number, kind, cursor, released, done_at) SELECT id, 1, 'first', 1, 1, now() FROM test_sends;
INSERT INTO outbox (kind, message)
SELECT 'mailrun.item.v2', jsonb_build_object('run_id', run_id, 'item_id', id, 'attempt', 1, 'impersonal', true)
FROM run_items WHERE state = 'pending' AND run_id IN (SELECT id FROM test_sends);
DELETE FROM outbox WHERE kind = 'mailrun.test.v1' AND published_at IS NULL;

-- The table stays for processes of the previous version, until they are upgraded; nothing else uses it.
DELETE FROM test_sends;
COMMENT ON TABLE test_sends IS 'Test mails of processes before jobs, which are hidden runs by now. Only those processes use it.';
