#!/usr/bin/env bash
# The link to the registry in the demonstration VM: say how it is, or make it good, slow, lossy or dead. As root.
#
#   registry-link                 say how it is
#   registry-link good            as fast as the machine
#   registry-link slow 2mbit      that much each way; 200kbit, 5mbit, or any other rate of tc(8)
#   registry-link lossy 5%        that share of the packets is lost, each way
#   registry-link dead            packets vanish without a word, as behind a firewall that drops
#   registry-link up | down       make it (good), take it away; registry-link.service does so
#
# The registry is in a network namespace of its own; between it and dockerd is a pair of virtual interfaces.
set -euo pipefail

# Addresses for trials (RFC 2544), which no real network has.
readonly near=198.18.0.1 far=198.18.0.2
readonly near_hardware=02:00:c6:12:00:01 far_hardware=02:00:c6:12:00:02
readonly nobody=02:00:c6:12:00:ff
readonly namespace=registry interface=registry0
readonly state=/run/registry-link

fail() {
    printf 'registry-link: %s\n' "$*" >&2
    exit 1
}

# Neighbours are fixed, so that no ARP is needed: with a lost one, the kernel would tell that the registry is unreachable.
neighbours() {
    ip neighbour replace "$far" lladdr "$1" dev "$interface" nud permanent
    ip -n "$namespace" neighbour replace "$near" lladdr "$2" dev eth0 nud permanent
}
reachable() { neighbours "$far_hardware" "$near_hardware"; }
# From one state to the next nothing may get through that neither lets through: there is no moment without a queue.
queues() { tc qdisc replace dev "$interface" root "$@" && tc -n "$namespace" qdisc replace dev eth0 root "$@"; }
no_queues() {
    tc qdisc delete dev "$interface" root 2>/dev/null || true # there is none: just as well
    tc -n "$namespace" qdisc delete dev eth0 root 2>/dev/null || true
}
good() {
    no_queues
    reachable
    echo good >"$state"
}

up() {
    down
    ip netns add "$namespace"
    ip link add "$interface" address "$near_hardware" type veth \
        peer name eth0 address "$far_hardware" netns "$namespace"
    ip address add "$near/30" dev "$interface"
    ip -n "$namespace" address add "$far/30" dev eth0
    ip -n "$namespace" link set lo up
    ip -n "$namespace" link set eth0 up
    ip link set "$interface" up
    good
}
down() {
    [ ! -e "/run/netns/$namespace" ] || ip netns delete "$namespace"
    # A process left in the namespace would keep its end of the pair.
    ip link delete "$interface" 2>/dev/null || true # gone with the namespace
    rm -f "$state"
}

if [ $# = 0 ]; then
    if ! [ -e "$state" ]; then
        echo down
        exit
    fi
    cat "$state"
    exit
fi
[ "$(id -u)" = 0 ] || fail "run it as root (sudo registry-link $*)"
case $1 in
up | down) ;;
good | slow | lossy | dead) [ -e "$state" ] || fail "the link is down (systemctl start registry-link)" ;;
*)
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac

case $1-$# in
up-1) up ;;
down-1) down ;;
good-1) good ;;
slow-2)
    # Some 200 ms of queue, and no more at once than a few packets.
    queues tbf rate "$2" burst 8kb latency 200ms || fail "slow takes a rate such as 200kbit or 2mbit, not '$2'"
    reachable
    echo "slow $2" >"$state"
    ;;
lossy-2)
    queues netem loss "$2" || fail "lossy takes a share such as 5%, and a kernel with sch_netem; not '$2'"
    reachable
    echo "lossy $2" >"$state"
    ;;
dead-1)
    # Frames to a hardware address that nobody has: sent, and taken by none. Needs nothing of the kernel.
    neighbours "$nobody" "$nobody"
    echo dead >"$state"
    ;;
slow-1 | lossy-1) fail "$1 takes a figure: slow 2mbit, lossy 5%" ;;
*) fail "$1 takes no more than that" ;;
esac
case $1 in up | down) ;; *) cat "$state" ;; esac
