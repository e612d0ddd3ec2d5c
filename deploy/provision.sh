#!/usr/bin/env bash
# Make the demonstration VM out of a Debian or Ubuntu; the Vagrantfile runs it, as root, from the checkout in /vagrant.
#
#   deploy/provision.sh           make it, and wait until the proxy and the registry answer
#   deploy/provision.sh --wait    only wait, as after a start
#
# dockerd and a registry of the distribution, the link between them (registry-link), and the proxy by scripts/install,
# open to all of the VM's addresses. Run again, it brings up to date what differs from the checkout, and otherwise says
# that nothing changed. For a machine of its own only: whoever reaches its port 2375 is root on it.
set -euo pipefail
umask 022 # what is made here is for other users, too

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly proxy_config=/etc/abort-proxy/config.toml
# Versions it was tried with; another one is only mentioned, as a distribution offers no choice.
readonly packages=(docker.io=20.10.24 docker-registry=2.8.2 apparmor=3.0.8 busybox-static=1.35.0
    iproute2=6.1.0 iptables=1.8.9)
# An emulated machine, or one that does much else, takes its time.
readonly patience_s=120
changed=

say() { printf 'provision: %s\n' "$*"; }
fail() {
    printf 'provision: %s\n' "$*" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || fail "run it as root"
export DEBIAN_FRONTEND=noninteractive

version_of() { dpkg-query -W -f '${db:Status-Status} ${source:Upstream-Version}' "$1" 2>/dev/null | sed -n 's/^installed //p'; }
install_packages() {
    local package missing=() options=(-o DPkg::Lock::Timeout=300 -qq -y --no-install-recommends)
    for package in "${packages[@]%%=*}"; do
        [ -n "$(version_of "$package")" ] || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        changed=yes
        say "install ${missing[*]}"
        # What is at hand needs no network; and package lists may be missing or old.
        if ! apt-get "${options[@]}" install "${missing[@]}" >/dev/null 2>&1; then
            apt-get -o DPkg::Lock::Timeout=300 -qq update
            apt-get "${options[@]}" install "${missing[@]}" >/dev/null
        fi
    fi
    # In its own package since Debian 13.
    if ! command -v docker >/dev/null; then
        changed=yes
        say "install docker-cli"
        apt-get "${options[@]}" install docker-cli >/dev/null
    fi
}

# put MODE SOURCE TARGET: sets `replaced`, empty if it was in place.
put() {
    replaced=
    if ! cmp -s "$2" "$3" || [ "$(stat -c %a "$3")" != "$1" ]; then
        say "write $3"
        mkdir -p "$(dirname "$3")"
        install -m "$1" "$2" "$3"
        replaced=yes changed=yes
    fi
}

make_registry() {
    local link='' registry=''
    put 755 "$root/deploy/vm/registry-link.sh" /usr/local/sbin/registry-link
    put 644 "$root/deploy/vm/registry-link.service" /etc/systemd/system/registry-link.service
    link+=$replaced
    put 644 "$root/deploy/vm/registry.conf" /etc/systemd/system/docker-registry.service.d/demo.conf
    registry+=$replaced
    put 644 "$root/deploy/vm/registry.yml" /etc/docker/registry/demo.yml
    registry+=$replaced
    if ! grep -qxF "198.18.0.2 registry.test" /etc/hosts; then
        changed=yes
        say "name the registry in /etc/hosts"
        echo "198.18.0.2 registry.test" >>/etc/hosts
    fi
    [ -z "$link$registry" ] || systemctl daemon-reload
    local unit
    for unit in registry-link docker-registry; do
        systemctl is-enabled --quiet "$unit" || systemctl --quiet enable "$unit"
    done
    # The registry follows its link, and a link that somebody made slow stays so where there is nothing to change.
    if [ -n "$link" ] || ! systemctl is-active --quiet registry-link; then
        changed=yes
        say "start the registry behind its link"
        systemctl restart registry-link docker-registry
    elif [ -n "$registry" ] || ! systemctl is-active --quiet docker-registry; then
        changed=yes
        say "start the registry"
        systemctl restart docker-registry
    fi
}

make_daemon() {
    put 644 "$root/deploy/vm/daemon.json" /etc/docker/daemon.json
    if ! systemctl is-active --quiet docker; then
        changed=yes
        say "start dockerd"
        systemctl start docker
    elif [ -n "$replaced" ]; then
        systemctl reload docker
    fi
}

make_proxy() {
    # A forwarded port comes in at an address of the VM's network; on loopback alone it would reach nobody.
    if ! [ -e "$proxy_config" ]; then
        changed=yes
        say "write $proxy_config"
        mkdir -p "$(dirname "$proxy_config")"
        sed 's/^listen = .*/listen = "0.0.0.0:2375"/' "$root/deploy/config.toml" >"$proxy_config"
        chmod 644 "$proxy_config"
    fi
    local said
    said=$("$root/scripts/install") || fail "scripts/install failed${said:+ after: $said}"
    printf '%s\n' "$said"
    [ "$said" = "install: nothing to do: all is in place" ] || changed=yes
}

fetch() { python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10).read()' "$1"; }
# answers WHAT COMMAND...: wait for it.
answers() {
    local what=$1
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$until_s" ] || fail "$what does not answer: $("$@" 2>&1 | tail -n 3)"
        sleep 0.5
    done
}

wait_until_up() {
    until_s=$((SECONDS + patience_s))
    answers "the proxy" fetch http://127.0.0.1:2375/version
    # A link that somebody made slow or dead is no failure.
    [ "$(registry-link)" != good ] ||
        answers "the registry" fetch http://registry.test:5000/v2/
}

case $* in
"") ;;
--wait)
    wait_until_up
    exit
    ;;
*) fail "unknown arguments '$*'; there is --wait" ;;
esac
install_packages
# In the middle of a start, what is only about to run would be taken for stopped.
systemctl is-system-running --wait >/dev/null || true # a failed unit of somebody else's is none of ours
make_registry
make_daemon
make_proxy
wait_until_up

versions=()
for package in "${packages[@]}"; do
    version=$(version_of "${package%%=*}")
    versions+=("${package%%=*} $version")
    [ "${version%%+*}" = "${package#*=}" ] || say "note: tried with ${package/=/ }, and this is $version"
done
say "$(IFS=, && printf '%s' "${versions[*]}" | sed 's/,/, /g')"
if [ -n "$changed" ]; then
    say "done; the link to the registry is $(registry-link)"
else
    say "nothing changed; the link to the registry is $(registry-link)"
fi
