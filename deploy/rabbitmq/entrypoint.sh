#!/bin/bash
# Starts RabbitMQ with the users of definitions.json and the passwords of the environment.
#
# A definitions file can't refer to the environment, so each @NAME@ in it is replaced by the salted hash of the variable
# NAME. RabbitMQ loads the result at every start: a new password counts once the container is made anew.
set -euo pipefail

template=/etc/mailrun/definitions.json
definitions=/etc/rabbitmq/mailrun.definitions.json

# RabbitMQ's rabbit_password_hashing_sha256: base64(salt + sha256(salt + password)), with a salt of four bytes.
hash_of() {
    local salt digest
    salt=$(head -c 4 /dev/urandom | od -An -tx1 | tr -d ' \n')
    digest=$({ bytes "$salt"; printf '%s' "$1"; } | sha256sum | cut -d ' ' -f 1)
    bytes "$salt$digest" | base64 -w 0
}

# Hexadecimal digits to bytes.
bytes() {
    # shellcheck disable=SC2059 # the format is the data: only \x escapes
    printf "$(sed 's/../\\x&/g' <<<"$1")"
}

content=$(<"$template")
for name in RABBITMQ_ADMIN_PASSWORD RABBITMQ_WEB_PASSWORD RABBITMQ_WORKER_PASSWORD; do
    if ! [[ ${!name:-} =~ ^[A-Za-z0-9_-]{16,}$ ]]; then
        echo "$name must have at least 16 letters, digits, '-' or '_': see deploy/env.example" >&2
        exit 1
    fi
    content=${content//"@$name@"/$(hash_of "${!name}")}
    # The broker itself has no use for it.
    unset "$name"
done

umask 027
printf '%s\n' "$content" >"$definitions"
if [[ $(id -u) == 0 ]]; then
    chown rabbitmq:rabbitmq "$definitions"
fi

exec docker-entrypoint.sh rabbitmq-server
