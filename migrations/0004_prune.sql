-- Old runs are deleted at once, their items after that in bounded steps: so items may outlive their run.
--
-- Without the foreign keys, taking in a list takes half the time: each check reads, locks and rewrites a person's row.
-- An item is only ever inserted by a join with users, in the transaction that inserts its run, and no user is deleted.
ALTER TABLE run_items
    DROP CONSTRAINT run_items_run_id_fkey,
    DROP CONSTRAINT run_items_user_id_fkey;

CREATE TABLE pruned_runs (
    run_id    uuid PRIMARY KEY,
    pruned_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE pruned_runs IS 'Runs that are deleted, while their items and claims still have to be. Writer: prune.';
