-- The settings of a worker that have to be the same in all of them: a worker that starts compares its own with those of live workers.

ALTER TABLE workers ADD COLUMN settings jsonb;
COMMENT ON COLUMN workers.settings IS 'What the worker was started with of the settings that have to agree; null: a version before this column.';
