-- The window of a run follows its throughput, so that what waits on the conveyor is a matter of time, not of items.

ALTER TABLE run_passes
    ADD COLUMN looked_at  timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN drained    integer NOT NULL DEFAULT 0,
    ADD COLUMN per_second real NOT NULL DEFAULT 0,
    ADD COLUMN chunk_at   timestamptz NOT NULL DEFAULT now();
COMMENT ON COLUMN run_passes.looked_at IS 'When the pump last measured how fast the run goes.';
COMMENT ON COLUMN run_passes.drained IS 'Items that this pass had released by then, and that were not waiting for their first attempt any more.';
COMMENT ON COLUMN run_passes.per_second IS 'Items that did so in a second, between that look and the one before.';
COMMENT ON COLUMN run_passes.chunk_at IS 'When the newest chunk was released.';

ALTER TABLE workers ADD COLUMN permits integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN workers.permits IS 'Sends that it may have in flight; 0: it does not send.';
