-- The comments of two migrations that were written side by side, in one.

COMMENT ON TABLE users IS 'The people invited. Writer: web inserts; progress and prune set emailed_at; setup merges people of one mailbox; erasing sets email, name and erased_at; fan_out sets scrubbed_at.';
COMMENT ON COLUMN users.email IS 'The mailbox: in NFC and lower case, with the domain in ASCII form and without invisible characters, so that UNIQUE means one person. Of a person who was erased: `erased:` and a keyed hash of it, so that it is still known that nothing more may be sent there.';
COMMENT ON COLUMN suppressions.email IS 'The mailbox, as in users; it need not be of one of them. Of a person who was erased: the same as there.';
