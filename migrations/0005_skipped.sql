-- A value of an enum can't be used in the transaction that adds it, so it is added alone.
ALTER TYPE item_state ADD VALUE 'skipped' AFTER 'cancelled';
