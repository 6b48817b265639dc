#!/usr/bin/env bash
# What each choice of the schema is worth, in bytes of WAL per item: the table in performance.md.
#
#     ITEMS=200000 cargo run -- with-database -- bash docs/schema.sh
#
# Each row is the schema with one choice undone: people and items are inserted, then claimed and marked as sent.
set -euo pipefail
cd "$(dirname "$0")/.."
items=${ITEMS:-50000}

ask() { psql --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 "$@"; }

# measure NAME BATCH DDL: BATCH is the number of items that a transaction claims and settles. With "claim in the item" as the name's
# beginning, the claim is an update of the item instead of a row.
measure() {
    local name=$1 batch=$2 ddl=$3 database=schema_worth
    ask "$DATABASE_URL" -c "DROP DATABASE IF EXISTS $database WITH (FORCE)" -c "CREATE DATABASE $database" 2>/dev/null
    local url=${DATABASE_URL%/*}/$database claim="
        INSERT INTO attempts (item_id, number, worker_id) SELECT id, 1, 1 FROM run_items WHERE id BETWEEN low AND high"
    for file in migrations/*.sql; do ask "$url" --file "$file"; done
    if [[ $name == "claim in the item"* ]]; then
        ask "$url" -c "ALTER TABLE run_items ADD COLUMN claimed_by bigint, ADD COLUMN claimed_at timestamptz"
        claim="UPDATE run_items SET claimed_by = 1, claimed_at = now() WHERE id BETWEEN low AND high"
    fi
    # No other process writes, and no page is written whole: none is older than the last checkpoint.
    ask "$url" -c "$ddl" -c "
        ALTER TABLE run_items SET (autovacuum_enabled = false);
        ALTER TABLE users SET (autovacuum_enabled = false);
        ALTER TABLE attempts SET (autovacuum_enabled = false);" -c "
        INSERT INTO runs (id, subject, body, total) VALUES ('00000000-0000-0000-0000-000000000001', '', '', $items);
        INSERT INTO run_progress (run_id, total, pending)
            VALUES ('00000000-0000-0000-0000-000000000001', $items, $items);" -c "
        CREATE PROCEDURE settle() LANGUAGE plpgsql AS \$\$
        DECLARE low bigint; high bigint; changed integer;
        BEGIN
            FOR low IN SELECT generate_series(1, $items, $batch) LOOP
                high := low + $batch - 1;
                $claim;
                COMMIT;
                UPDATE run_items SET state = 'sent', finished_at = now() WHERE id BETWEEN low AND high;
                GET DIAGNOSTICS changed = ROW_COUNT;
                UPDATE users SET emailed_at = now() WHERE id BETWEEN low AND high;
                UPDATE run_progress SET pending = pending - changed, sent = sent + changed, updated_at = now();
                COMMIT;
            END LOOP;
        END \$\$;" -c CHECKPOINT
    ask "$url" --set synchronous_commit=on --field-separator ' ' <<SQL | {
        SELECT pg_current_wal_insert_lsn() AS begin \gset
        INSERT INTO users (email) SELECT 'guest-' || number || '@example.org' FROM generate_series(1, $items) AS number;
        INSERT INTO run_items (run_id, user_id, position)
            SELECT '00000000-0000-0000-0000-000000000001', id, id FROM users ORDER BY id;
        SELECT pg_current_wal_insert_lsn() AS inserted \gset
        CALL settle();
        SELECT pg_current_wal_insert_lsn() AS settled \gset
        SELECT pg_stat_force_next_flush();
        SELECT round((:'inserted'::pg_lsn - :'begin') / $items), round((:'settled'::pg_lsn - :'inserted') / $items),
               round((:'settled'::pg_lsn - :'begin') / $items),
               (SELECT 100 * n_tup_hot_upd / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'run_items');
SQL
        # The first line is that of the flush, an empty one.
        read -r _ || true
        read -r taken settled together hot
        printf '| %s | %s | %s | %s | %s %% |\n' "$name" "$taken" "$settled" "$together" "$hot"
    }
    ask "$DATABASE_URL" -c "DROP DATABASE $database WITH (FORCE)"
}

echo '| schema | insert | claim and result | together | HOT updates of items |'
echo '|---|---|---|---|---|'
measure 'as it is' 200 ''
measure 'no room on the pages' 200 'ALTER TABLE run_items SET (fillfactor = 100)'
measure 'an index on the state of items' 200 'CREATE INDEX ON run_items (state)'
measure 'an index on when people were mailed' 200 'CREATE INDEX ON users (emailed_at)'
measure 'foreign keys' 200 'ALTER TABLE run_items ADD FOREIGN KEY (run_id) REFERENCES runs, ADD FOREIGN KEY (user_id) REFERENCES users;
    ALTER TABLE attempts ADD FOREIGN KEY (item_id) REFERENCES run_items'
measure 'one item in a transaction' 1 ''
measure 'claim in the item' 200 ''
measure 'claim in the item, and no room' 200 'ALTER TABLE run_items SET (fillfactor = 100)'
