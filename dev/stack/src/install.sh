# Installs the packages named as arguments without starting or enabling any of their services.
# Mailrun runs its own private instances; the system's services are the machine owner's business.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.d/mailrun-install.conf
mark='# Written by mailrun while it installs packages; safe to delete.'
units='rabbitmq-server.service epmd.service epmd.socket postgresql.service'

clean_up() {
    # Only what this script wrote: an existing policy stays.
    for file in "$policy" "$cluster"; do
        if [ -f "$file" ] && grep -qF "$mark" "$file"; then rm -f "$file"; fi
    done
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

known() {
    [ -e "/lib/systemd/system/$1" ] || [ -e "/usr/lib/systemd/system/$1" ] || [ -e "/etc/systemd/system/$1" ]
}

# A policy that answers 101 forbids maintainer scripts to start a service.
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\n%s\nexit 101\n' "$mark" > "$policy"
    chmod 755 "$policy"
fi
# Without this, PostgreSQL's package creates an unused cluster.
case " $* " in *' postgresql '*)
    mkdir -p "${cluster%/*}"
    printf '%s\ncreate_main_cluster = false\n' "$mark" > "$cluster"
esac

new_units=''
for unit in $units; do
    known "$unit" || new_units="$new_units $unit"
done

install() {
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

# The package lists of a fresh container are empty, and those of an old machine name files that no longer exist.
listed=yes
for package in "$@"; do
    apt-cache policy "$package" | grep -q 'Candidate: [^(]' || listed=no
done
if [ "$listed" = no ] || ! install "$@"; then
    apt-get -o DPkg::Lock::Timeout=300 update
    install "$@"
fi

if [ -d /run/systemd/system ]; then
    for unit in $new_units; do
        if known "$unit"; then systemctl disable --quiet "$unit" || true; fi
    done
fi
