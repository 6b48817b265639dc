-- A `sent` that arrives late wins, whatever happened since: also when its person was invited again meanwhile, because the item
-- had been cancelled or skipped. And a result that the ledger refuses is buried once, alone.

ALTER TABLE run_items ADD COLUMN overtaken boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN run_items.overtaken IS
    'Whether the person was invited again, by another item, before the news arrived that this one had been sent: then it does not count as the person''s invitation.';

-- Rewrites the table: a generated column's expression can't be changed in place.
DROP INDEX run_items_one_per_person;
ALTER TABLE run_items DROP COLUMN active;
ALTER TABLE run_items
    ADD COLUMN active boolean NOT NULL GENERATED ALWAYS AS (state NOT IN ('cancelled', 'skipped') AND NOT overtaken) STORED;
COMMENT ON COLUMN run_items.active IS 'Whether the item counts as its person''s invitation: it is neither cancelled nor skipped nor overtaken.';
-- Invariant: a person has at most one item that counts, whatever forms are submitted at the same moment.
CREATE UNIQUE INDEX run_items_one_per_person ON run_items (user_id) WHERE active;

CREATE TABLE buried_results (
    run_id    uuid NOT NULL,
    item_id   bigint NOT NULL,
    attempt   integer NOT NULL,
    state     item_state NOT NULL,
    reason    text NOT NULL,
    buried_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, item_id, attempt, state)
);
COMMENT ON TABLE buried_results IS
    'Results that the ledger refuses, or that belong to another ledger, and that are therefore on mailrun.dead: their senders repeat them, and the repetitions are dropped. Writer: progress.';
COMMENT ON COLUMN buried_results.reason IS 'Why it was refused.';
