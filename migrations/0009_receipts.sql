-- What a sender's mail server has accepted is written down with the sender's next claim: so a permit is free again without
-- waiting for RabbitMQ, and a worker that is killed leaves unknown only what it was handing over at that moment.

CREATE TABLE receipts (
    worker_id bigint NOT NULL,
    number    bigint NOT NULL,
    item_ids  bigint[] NOT NULL,
    attempts  integer[] NOT NULL,
    PRIMARY KEY (worker_id, number),
    CONSTRAINT receipts_of_attempts CHECK (cardinality(item_ids) = cardinality(attempts))
) WITH (toast_tuple_target = 8160);
COMMENT ON TABLE receipts IS
    'Attempts that a mail server has accepted, and whose results the ledger may not know yet. A row is written with a claim, and deleted when the results are applied; what a dead worker leaves goes with its row in workers. Writer: send. Rows of usual size are not compressed: they do not live for long.';
COMMENT ON COLUMN receipts.worker_id IS 'Who claimed the attempts.';
COMMENT ON COLUMN receipts.number IS 'Counts the worker''s receipts.';
COMMENT ON COLUMN receipts.item_ids IS 'The items.';
COMMENT ON COLUMN receipts.attempts IS 'The number of each item''s attempt.';

COMMENT ON COLUMN workers.in_flight IS 'Permits in use, at the last heartbeat: attempts of which nothing but the claim is on disk.';
COMMENT ON COLUMN sweeps.told_again IS 'Items whose end was told once more: nobody will send them, since their run was cancelled or their address suppressed, or their worker had sent them and died.';
