# Creates a Debian 13 with RabbitMQ in the folder given as the argument, unless it exists. Run by root.
set -eu
export LC_ALL=C
exec 2>&1
tree=$1

# Child processes inherit the lock: the next caller waits until the last of them has ended.
exec 9> "$tree.lock"
flock 9
if [ -d "$tree" ]; then exit 0; fi
new=$tree.new
trap 'rm -rf --one-file-system "$new"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The mirror of this machine's own packages is near, but may lack this release.
everybodys=http://deb.debian.org/debian
near=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' |
    sed 's,/*$,,' | grep '^http' | grep -vxF "$everybodys" | sort -u || true)
for mirror in $near "$everybodys"; do
    rm -rf --one-file-system "$new"
    # In a mount namespace, so that nothing stays mounted below the folder, however this ends.
    if unshare --mount debootstrap --force-check-gpg --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --variant=minbase --include=rabbitmq-server trixie "$new" "$mirror"; then
        rm -rf "$new"/var/cache/apt/* "$new"/var/lib/apt/lists/*
        mv "$new" "$tree"
        exit 0
    fi
done
exit 1
