-- What RabbitMQ rejects is shown; dead letters are taken off their queue beside the runs; people can be erased.

ALTER TABLE workers ADD COLUMN rejected text;
COMMENT ON COLUMN workers.rejected IS 'The queues for which RabbitMQ rejects its messages at present, and why; null: it takes all of them.';

ALTER TABLE run_passes ADD COLUMN tidied_at timestamptz;
COMMENT ON COLUMN run_passes.tidied_at IS 'replay: when the dead letters that it has sent on their way again were taken off their queue.';
-- Those of before were taken off by the step that ended them.
UPDATE run_passes SET tidied_at = done_at WHERE kind = 'replay';
CREATE INDEX run_passes_to_tidy ON run_passes (run_id) WHERE kind = 'replay' AND done_at IS NOT NULL AND tidied_at IS NULL;

ALTER TABLE users
    ADD COLUMN erased_at   timestamptz,
    ADD COLUMN scrubbed_at timestamptz;
COMMENT ON TABLE users IS 'The people invited. Writer: web inserts; progress sets emailed_at; erasing a person sets email, name and erased_at.';
COMMENT ON COLUMN users.email IS 'The address in lower case, so that UNIQUE means one person. Of a person who was erased: `erased:` and a keyed hash of the address, so that it is still known that nothing more may be sent there.';
COMMENT ON COLUMN users.erased_at IS 'When the person was erased; null: not erased.';
COMMENT ON COLUMN users.scrubbed_at IS 'When nothing was left of the erased person on mailrun.dead, nor in results that were under way at that time; null: a worker for fan-out still has to see to that.';
CREATE INDEX users_erased ON users (id) WHERE erased_at IS NOT NULL;
COMMENT ON COLUMN suppressions.email IS 'In lower case, as in users; it need not be of one of them. Of a person who was erased: the same as there.';
