-- The message says what its list says: the name and the spelling of an address belong to the item. People are compared by
-- mailbox; `mailrun setup` turns the addresses of older ledgers into mailboxes and merges people who turn out to be one.

-- Both are added without rewriting the table, and cost nothing where they are null.
ALTER TABLE run_items
    ADD COLUMN name  text,
    ADD COLUMN typed text;
COMMENT ON COLUMN run_items.name IS 'The name that the list gave, empty if it gave none. Null: the item is older than this column, and users.name counts.';
COMMENT ON COLUMN run_items.typed IS 'The address as the list wrote it, which pages show and mail goes to. Null: it is the mailbox itself.';
COMMENT ON COLUMN run_items.overtaken IS
    'Whether another item counts as the person''s invitation: the person was invited again before the news arrived that this one had been sent, or two people turned out to be one mailbox. An overtaken item is not sent any more.';

COMMENT ON TABLE users IS 'The people invited. Writer: web inserts; progress sets emailed_at; setup merges people of one mailbox.';
COMMENT ON COLUMN users.email IS 'The mailbox: in NFC and lower case, with the domain in ASCII form and without invisible characters, so that UNIQUE means one person.';
COMMENT ON COLUMN users.name IS 'Not written any more: the name of items that are older than run_items.name.';
COMMENT ON COLUMN suppressions.email IS 'The mailbox, as in users; it need not be of one of them.';
COMMENT ON COLUMN test_sends.email IS 'Where it goes: a mailbox, as in users; it need not be of one of them.';
