-- An item's state changes once or twice in its life, and a million times in a run. As long as no column of an index (or
-- of its predicate) changes with it, and its page has room, such an update touches no index at all (a HOT update).

ALTER TABLE run_items
    ADD COLUMN active   boolean NOT NULL GENERATED ALWAYS AS (state <> 'cancelled') STORED,
    ADD COLUMN troubled boolean NOT NULL GENERATED ALWAYS AS (state IN ('failed', 'unknown')) STORED,
    SET (fillfactor = 45);
COMMENT ON COLUMN run_items.active IS 'Whether the item counts as its person''s invitation: it is not cancelled.';
COMMENT ON COLUMN run_items.troubled IS 'Whether a person has to look at it: it failed, or its outcome is unknown.';

DROP INDEX run_items_one_per_person, run_items_to_look_at;
-- Invariant: a person has at most one item that is not cancelled, whatever forms are submitted at the same moment.
CREATE UNIQUE INDEX run_items_one_per_person ON run_items (user_id) WHERE active;
-- What the results page lists and a replay goes over; a small part of a large table.
CREATE INDEX run_items_to_look_at ON run_items (run_id, position) WHERE troubled;

-- emailed_at is in no index: with room on the page, setting it is a HOT update as well.
ALTER TABLE users SET (fillfactor = 45);
