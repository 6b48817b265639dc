-- Identifies a ledger and its age, so that a shared broker and a restored backup are detected.

CREATE TABLE installation (
    single         boolean PRIMARY KEY DEFAULT true CHECK (single),
    id             uuid NOT NULL DEFAULT gen_random_uuid(),
    epoch          bigint NOT NULL DEFAULT 1,
    epoch_at       timestamptz NOT NULL DEFAULT now(),
    restored_epoch bigint NOT NULL DEFAULT 0,
    restored_at    timestamptz
);
COMMENT ON TABLE installation IS 'This installation; one row. Writers: every process begins epochs; the command restored writes the rest.';
COMMENT ON COLUMN installation.id IS 'Marks the virtual host that this ledger works on. A backup keeps it.';
COMMENT ON COLUMN installation.epoch IS 'Raised by each start of a process and once a minute while one runs. Messages carry it: one of a later epoch shows that the ledger was restored from a backup.';
COMMENT ON COLUMN installation.epoch_at IS 'When the present epoch began.';
COMMENT ON COLUMN installation.restored_epoch IS 'The epoch that began with the last restore; messages of earlier epochs are stale. 0: never restored.';
COMMENT ON COLUMN installation.restored_at IS 'When a restore was last declared with mailrun restored. Null: never.';
INSERT INTO installation DEFAULT VALUES;

ALTER TABLE runs ADD COLUMN restored_at timestamptz;
COMMENT ON COLUMN runs.restored_at IS
    'When the ledger was restored from a backup that holds the run: its failed items may have been sent since the backup, so retrying them is confirmed first. Null: accepted since the last restore. Writer: the command restored.';
