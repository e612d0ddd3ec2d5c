"""Peers that vanish where it matters what had come before, what is tried next, or what is said of it.

As in ``test_networks`` the proxy runs in one network namespace and the peer in another.
"""

import collections.abc
import contextlib
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest

import harness
import netns
import peers
from conftest import Certificates
from proxy import exchange, kernel
from proxy.aborts import Abort
from proxy.limits import Limit
from proxy.vocabulary import Cause, Operation, Phase, Side
from test_networks import DEAD, DEAD_S, FOUND_S, SWITCHED, UPGRADE, _scene, _words

# An address of the far side's network that nobody has: what goes there vanishes.
_SILENT_IP = "10.77.0.3"
_HERE_IP6, _ROUTER_IP6, _BEHIND_IP6 = "fd77::1", "fd77::2", "fd77:1::1"
_POST = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\nabc"


@pytest.fixture(scope="module")
def network() -> collections.abc.Iterator[netns.Network]:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    with netns.Network() as network:
        yield network


def _ip(namespace: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", namespace, *arguments], check=True, capture_output=True)


def _segments_received(wire: peers.Wire) -> int:
    info = kernel.tcp_info(wire.sock)
    assert info is not None
    return info.segments_received


def _given_up(proxy: harness.ProxyProcess, port: int) -> bool:
    """Whether the proxy's kernel no longer has a connection to this port."""
    table = pathlib.Path(f"/proc/{proxy.worker_pids()[0]}/net/tcp").read_text()
    return all(not line.split()[2].endswith(f":{port:04X}") for line in table.splitlines()[1:])


def _await_pause(proxy: harness.ProxyProcess) -> None:
    """Wait until the proxy holds octets of a response that its client does not take, and nothing moves any more."""
    looks: list[dict[str, int]] = []

    def is_paused(request: harness.LogRecord) -> bool:
        looks.append(request["bytes"])
        return looks[-1]["upstream_read"] > looks[-1]["client_written"] and looks[-5:] == [looks[-1]] * 5

    proxy.wait_in_flight(is_paused)


# -- what had come before ---------------------------------------------------------------------------------------------


@pytest.mark.netns
@pytest.mark.parametrize("missing", [0, 5])
@pytest.mark.parametrize("limit", ["tcp_user_timeout", "peer_dead_timeout"])
def test_a_paused_client_gets_all_that_had_come_before_upstream_vanished(
    network: netns.Network, missing: int, limit: str
) -> None:
    # What a unix socket takes whose reader pauses, and some octets that the proxy then holds itself.
    first = int(pathlib.Path("/proc/sys/net/core/wmem_default").read_text()) + 27_000
    body = os.urandom(first + 12_000)
    paused = threading.Event()

    def send_all(wire: peers.Wire) -> None:
        wire.read_head()
        octets = peers.ok(body + bytes(missing))[: -missing or None]
        wire.send(octets[:first])
        assert paused.wait(peers.PATIENCE_S)
        wire.send(octets[first:])  # which the proxy leaves to its kernel
        wire.await_end()

    # The client comes by a unix socket: the user timeout would end it on TCP, too, as it pauses.
    options = ("--peer-dead-timeout", "2", *(("--tcp-user-timeout", "1") if limit == "tcp_user_timeout" else ()))
    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.there):
            upstream = stack.enter_context(peers.Upstream(send_all, host=netns.THERE_IP))
        proxy = stack.enter_context(harness.ProxyProcess(upstream.url, *options, listen="unix", namespace=network.here))
        stack.callback(network.restore)
        wire = stack.enter_context(peers.connect(proxy.address))
        wire.get()
        _await_pause(proxy)
        paused.set()
        far = upstream.wire()
        harness.wait_until(lambda: far.sent.count > len(body) and not kernel.unacknowledged_bytes(far.sock))
        network.drop()
        assert proxy.wait_in_flight()["bytes"]["upstream_read"] < len(body)
        port = int(upstream.url.rpartition(":")[2])
        harness.wait_until(lambda: _given_up(proxy, port), 8.0)
        if limit == "tcp_user_timeout":
            time.sleep(2.0)  # the pause is what is tested: it goes on for --peer-dead-timeout
        assert not proxy.requests()
        response = wire.read_response()
        assert response.body == body
        record = proxy.wait_requests(1)[0]
        harness.check_record(record)
        assert record["bytes"]["response_body"] == len(body)
        if missing:
            assert not response.whole
            assert _words(record) == ("request.abort", "upstream", "response_body", "dead_peer")
            assert record["limit"]["name"] == limit
            # The client's pause is none of it.
            assert record["limit"]["elapsed_s"] < (2.8 if limit == "tcp_user_timeout" else 7.0)
        else:
            assert record["event"] == "request.complete"


# -- quiet ------------------------------------------------------------------------------------------------------------


@pytest.mark.netns
def test_a_quiet_tunnel_outlives_a_stall_and_no_longer_one(network: netns.Network) -> None:
    dead_s = 3.0
    with _scene(network, peers.upgrade(), "--peer-dead-timeout", str(dead_s), far="client") as scene:
        scene.wire.get(extra=UPGRADE)
        scene.wire.read_head()
        scene.wire.send(b"hello")
        assert scene.wire.read_exactly(5) == b"hello"
        time.sleep(1.8)  # the next probe is due in whole seconds
        network.drop()
        time.sleep(1.0)  # the stall is what is tested
        before = _segments_received(scene.wire)
        network.restore()
        harness.wait_until(lambda: _segments_received(scene.wire) > before, what="a probe")
        scene.wire.send(b"again")
        assert scene.wire.read_exactly(5) == b"again"
        network.drop()
        record = scene.abort(dead_s + 3.0)
        assert _words(record) == ("request.abort", "client", "tunnel", "dead_peer")
        assert record["limit"]["name"] == "peer_dead_timeout"
        assert dead_s <= record["limit"]["elapsed_s"] < dead_s + 2.0


# -- several addresses ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _two_addresses(network: netns.Network) -> collections.abc.Iterator[str]:
    """Give upstream a name with two addresses, of which the first says nothing. Yields: it."""
    directory = pathlib.Path("/etc/netns", network.here)  # ip netns exec puts what it holds into /etc
    directory.mkdir(parents=True)
    try:
        (directory / "hosts").write_text(f"{_SILENT_IP} twin.test\n{netns.THERE_IP} twin.test\n")
        yield "twin.test"
    finally:
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):  # another namespace has its own
            directory.parent.rmdir()


@pytest.mark.netns
@pytest.mark.parametrize("second", ["listens", "refuses"])
def test_an_address_that_says_nothing_leaves_time_for_the_next(network: netns.Network, second: str) -> None:
    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.there):
            upstream = stack.enter_context(peers.Upstream(peers.answer_all(peers.ok(b"hello")), host=netns.THERE_IP))
        if second == "refuses":
            upstream.stop_listening()
        name = stack.enter_context(_two_addresses(network))
        url = upstream.url.replace(netns.THERE_IP, name)
        proxy = stack.enter_context(
            harness.ProxyProcess(url, "--upstream-connect-timeout", "1", namespace=network.here)
        )
        with netns.inside(network.here):
            wire = stack.enter_context(peers.connect(proxy.address))
        wire.get()
        response = wire.read_response()
        record = proxy.wait_requests(1)[0]
        harness.check_record(record)
        assert record["duration_s"] >= 0.5  # the share of the first
        assert response.status == record["status"]
        if second == "listens":
            assert response.body == b"hello"
            assert record["event"] == "request.complete"
            assert record["upstream"] == upstream.name
        else:
            assert _words(record) == ("request.abort", "upstream", "connect", "refused")
            assert response.status == 502


# -- what routers, firewalls and routes say ---------------------------------------------------------------------------


@contextlib.contextmanager
def _route_ends(network: netns.Network, kind: str) -> collections.abc.Iterator[None]:
    _ip(network.here, "route", "add", kind, f"{netns.THERE_IP}/32")
    try:
        yield
    finally:
        _ip(network.here, "route", "delete", kind, f"{netns.THERE_IP}/32")


@contextlib.contextmanager
def _behind_a_router(network: netns.Network) -> collections.abc.Iterator[None]:
    """Let an address be behind the far side, as seen from here."""
    _ip(network.here, "address", "add", f"{_HERE_IP6}/64", "dev", "tun0", "nodad")
    _ip(network.there, "address", "add", f"{_ROUTER_IP6}/64", "dev", "tun0", "nodad")
    _ip(network.there, "address", "add", f"{_BEHIND_IP6}/128", "dev", "lo", "nodad")
    _ip(network.here, "route", "add", f"{_BEHIND_IP6}/128", "dev", "tun0")
    try:
        yield
    finally:
        _ip(network.here, "address", "flush", "dev", "tun0", "scope", "global", "to", f"{_HERE_IP6}/64")
        _ip(network.there, "address", "flush", "dev", "tun0", "scope", "global", "to", f"{_ROUTER_IP6}/64")
        _ip(network.here, "-6", "route", "flush", f"{_BEHIND_IP6}/128")


@contextlib.contextmanager
def _router_prohibits(network: netns.Network) -> collections.abc.Iterator[None]:
    """Let the far side answer "administratively prohibited" for the address behind it."""
    _ip(network.there, "address", "delete", f"{_BEHIND_IP6}/128", "dev", "lo")
    _ip(network.there, "-6", "route", "add", "prohibit", f"{_BEHIND_IP6}/128")
    try:
        yield
    finally:
        _ip(network.there, "-6", "route", "delete", "prohibit", f"{_BEHIND_IP6}/128")


@pytest.mark.netns
@pytest.mark.parametrize(("kind", "number"), [("prohibit", "EACCES"), ("blackhole", "EINVAL"), ("router", "EACCES")])
def test_whatever_a_router_or_a_route_says_of_a_connection_that_stood(
    network: netns.Network, kind: str, number: str
) -> None:
    """The kernel gives up with that word, and it is no sign that upstream was not reached."""
    options = ("--tcp-user-timeout", "1", "--peer-dead-timeout", "20")
    network.restore()
    with contextlib.ExitStack() as stack:
        if kind == "router":
            stack.enter_context(_behind_a_router(network))
        with netns.inside(network.there):
            host = _BEHIND_IP6 if kind == "router" else netns.THERE_IP
            upstream = stack.enter_context(peers.Upstream(peers.silent, host=host))
        proxy = stack.enter_context(harness.ProxyProcess(upstream.url, *options, namespace=network.here))
        with netns.inside(network.here):
            wire = stack.enter_context(peers.connect(proxy.address))
        wire.send(_POST)
        harness.wait_until(lambda: upstream.wire().received.octets.endswith(b"abc"))
        stack.callback(network.restore)
        if kind != "router":
            network.drop()  # the octets are to be sent again, which is when the kernel finds no route
            wire.send(b"def")
            proxy.wait_in_flight(lambda request: request["bytes"]["request_body"] == 6)
        with _router_prohibits(network) if kind == "router" else _route_ends(network, kind):
            if kind == "router":
                wire.send(b"def")
            response = wire.read_response()
            record = proxy.wait_requests(1)[0]
        harness.check_record(record)
        assert _words(record) == ("request.abort", "upstream", "request_body", "dead_peer")
        assert record["exception"]["errno"] == number
        assert (response.status, record["status"], record["error_type"]) == (502, 502, "connection_terminated")
        assert record["limit"]["name"] == "tcp_user_timeout"
        assert record["socket"]["upstream"]["verdict"] == "dead"


@pytest.mark.netns
def test_the_own_address_that_goes_away_is_found_in_time(network: netns.Network) -> None:
    """Octets are in flight that are older than what was heard last, and what the kernel sends again never goes out."""
    speak = threading.Event()

    def tick(wire: peers.Wire) -> None:
        wire.read_head()
        wire.send(SWITCHED)
        assert speak.wait(peers.PATIENCE_S)
        wire.send(b"tick")
        wire.await_end()

    with _scene(network, tick, *DEAD, far="upstream") as scene:
        scene.wire.get(extra=UPGRADE)
        scene.wire.read_head()
        network.drop("there")
        scene.wire.send(b"abc")
        scene.proxy.wait_in_flight(lambda request: request["bytes"]["request_body"] == 3)
        speak.set()
        assert scene.wire.read_exactly(4) == b"tick"
        address = f"{netns.HERE_IP}/24"
        _ip(network.here, "address", "delete", address, "dev", "tun0")
        try:
            record = scene.abort(FOUND_S)
        finally:
            _ip(network.here, "address", "add", address, "dev", "tun0")
        assert _words(record) == ("request.abort", "upstream", "tunnel", "dead_peer")
        assert record["limit"]["name"] == "peer_dead_timeout"
        assert DEAD_S <= record["limit"]["elapsed_s"] < DEAD_S + 2.0
        assert record["socket"]["upstream"]["unacked_bytes"] == 3
        assert record["socket"]["upstream"]["verdict"] == "dead"


# -- whose verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_ack_s", "last_data_recv_s", "elapsed_s", "named"),
    [
        (1.0, 90.0, 1.0, False),  # few retransmissions (tcp_retries2)
        (2.9, 90.0, 2.9, False),
        (6.0, 90.0, 6.0, True),  # the probes, which follow --peer-dead-timeout
        (7.5, 90.0, 7.5, True),
        (90.0, 7.5, 7.5, True),  # data that acknowledges nothing new
        (11.5, 11.5, 11.5, False),
        (900.0, 950.0, 900.0, False),  # the usual retransmissions
        (900.0, 1.0, 1.0, False),
    ],
)
def test_a_verdict_of_the_kernel_names_the_limit_that_it_fits(
    last_ack_s: float, last_data_recv_s: float, elapsed_s: float, named: bool
) -> None:
    limit = Limit("peer_dead_timeout", 4.0, "flag")
    abort = Abort(Side.CLIENT, Phase.RESPONSE_BODY, Operation.WRITE, Cause.DEAD_PEER, limit=limit)
    exchange._time_verdict(abort, {"last_ack_s": last_ack_s, "last_data_recv_s": last_data_recv_s}, 0.0)
    assert abort.elapsed_s == elapsed_s
    assert abort.limit is (limit if named else None)


def test_a_verdict_that_had_to_wait_for_a_paused_client_is_as_old_as_it_is() -> None:
    limit = Limit("peer_dead_timeout", 4.0, "flag")
    abort = Abort(Side.UPSTREAM, Phase.RESPONSE_BODY, Operation.READ, Cause.DEAD_PEER, limit=limit)
    exchange._time_verdict(abort, {"last_ack_s": 906.0, "last_data_recv_s": 950.0}, 900.0)
    assert (abort.elapsed_s, abort.limit) == (6.0, limit)


def test_a_verdict_of_the_kernel_keeps_the_user_timeout_and_what_is_known_already() -> None:
    user = Limit("tcp_user_timeout", 4.0, "flag")
    own = Limit("peer_dead_timeout", 4.0, "flag")
    rows: tuple[tuple[Limit, float | None, dict[str, object] | None, float | None], ...] = (
        (user, None, {"last_ack_s": 900.0, "last_data_recv_s": 950.0}, 900.0),
        (own, 4.1, {"last_ack_s": 900.0, "last_data_recv_s": 950.0}, 4.1),  # PeerPulse's verdict
        (own, None, {"last_ack_s": None, "last_data_recv_s": None}, None),
        (own, None, None, None),
    )
    for limit, before_s, evidence, after_s in rows:
        abort = Abort(
            Side.CLIENT, Phase.RESPONSE_BODY, Operation.WRITE, Cause.DEAD_PEER, limit=limit, elapsed_s=before_s
        )
        exchange._time_verdict(abort, evidence, 0.0)
        assert (abort.limit, abort.elapsed_s) == (limit, after_s)


# -- upstream ---------------------------------------------------------------------------------------------------------


@pytest.mark.netns
def test_an_upstream_that_never_gets_what_opens_the_handshake(
    network: netns.Network, certificates: Certificates
) -> None:
    """With octets in flight the kernel asks by sending them again, for a quarter of an hour."""
    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.there):
            upstream = stack.enter_context(peers.Upstream(peers.silent, host=netns.THERE_IP))
        options = ("--upstream-connect-timeout", "none", "--upstream-ca", certificates.ca, *DEAD)
        url = upstream.url.replace("http:", "https:")
        proxy = stack.enter_context(harness.ProxyProcess(url, *options, namespace=network.here))
        stack.callback(network.restore)
        with netns.inside(network.here):
            wire = stack.enter_context(peers.connect(proxy.address))
        network.narrow(200)
        wire.get()
        response = wire.read_response()
        record = proxy.wait_requests(1)[0]
        harness.check_record(record)
        assert _words(record) == ("request.abort", "upstream", "tls_handshake", "dead_peer")
        assert record["operation"] == "handshake"
        assert record["limit"]["name"] == "peer_dead_timeout"
        assert DEAD_S <= record["limit"]["elapsed_s"] < DEAD_S + 2.0
        assert (response.status, record["status"], record["error_type"]) == (504, 504, "connection_timeout")
        assert record["upstream"] == upstream.name
        assert record["socket"]["upstream"]["unacked_bytes"] > 200
        assert record["socket"]["upstream"]["verdict"] == "dead"


@pytest.mark.netns
def test_a_kept_connection_that_a_nat_forgot_is_tried_again_on_a_fresh_one(network: netns.Network) -> None:
    with _scene(network, peers.answer_all(peers.ok(b"hello")), *DEAD, far="upstream") as scene:
        scene.wire.get("/1")
        assert scene.wire.read_response().body == b"hello"
        network.forget(scene.upstream.wire().sock.getpeername()[1])
        scene.wire.get("/2")
        response = scene.wire.read_response()
        assert (response.status, response.body) == (200, b"hello")
        assert b"/2" in scene.upstream.wire(1).received.octets
        record = scene.proxy.wait_requests(2)[1]
        harness.check_record(record)
        assert record["event"] == "request.complete"
        (attempt,) = record["attempts"]
        assert attempt["cause"] == "dead_peer"
        assert record["duration_s"] >= DEAD_S


@pytest.mark.netns
def test_a_head_that_is_awaited_while_the_request_is_under_way_is_told_so(network: netns.Network) -> None:
    """The request was sent only as far as the proxy's own kernel."""
    with _scene(network, peers.silent, "--upstream-head-timeout", "0.5", far="upstream") as scene:
        network.slow(rate=20_000)
        scene.wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
        assert scene.wire.read_response().status == 504
        record = scene.abort(3.0)
        assert _words(record) == ("request.abort", "upstream", "response_head", "timeout")
        assert record["limit"]["name"] == "upstream_head_timeout"
        unacknowledged = record["socket"]["upstream"]["unacked_bytes"]
        assert unacknowledged > 0
        assert f"the request was sent ({unacknowledged:,} bytes unacknowledged)" in record["message"]


# -- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.netns
def test_a_client_that_vanishes_in_its_own_request_with_an_answer_in_flight(network: netns.Network) -> None:
    """It owed octets of its body, and the proxy asked for them by what it wrote itself."""

    def encourage(wire: peers.Wire) -> None:
        wire.read_until(b"abc")
        network.drop()
        gone.set()
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        wire.await_end()

    gone = threading.Event()
    with _scene(network, encourage, *DEAD, "--tcp-user-timeout", "60", far="client") as scene:
        scene.wire.send(_POST)
        record = scene.abort(FOUND_S)
        scene.upstream.settle()
        assert gone.is_set()
        assert _words(record) == ("request.abort", "client", "request_body", "dead_peer")
        assert record["limit"]["name"] == "peer_dead_timeout"
        assert record["bytes"]["request_body"] == 3


@contextlib.contextmanager
def _tls_proxy(
    network: netns.Network, certificates: Certificates, *options: str
) -> collections.abc.Iterator[tuple[harness.ProxyProcess, peers.Wire]]:
    """Yields: a proxy that speaks TLS, and a connection from the far side on which nothing has been said."""
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    network.restore()
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(
            harness.ProxyProcess(
                "http://127.0.0.1:9", *tls, *options, listen=f"{netns.HERE_IP}:0", namespace=network.here
            )
        )
        stack.callback(network.restore)
        with netns.inside(network.there):
            wire = stack.enter_context(peers.connect(proxy.address))
        yield proxy, wire


@pytest.mark.netns
def test_a_client_that_vanishes_in_its_handshake(network: netns.Network, certificates: Certificates) -> None:
    with _tls_proxy(network, certificates, *DEAD) as (proxy, wire):
        wire.send(b"\x16\x03\x01\x02\x00\x01")
        proxy.wait_connections(1)
        network.drop()
        record = proxy.wait_for(lambda record: record["event"] == "connection.abort", FOUND_S + 2.0)
        assert tuple(record[name] for name in ("side", "phase", "cause")) == ("client", "tls_handshake", "dead_peer")
        assert record["limit"]["name"] == "peer_dead_timeout"
        assert DEAD_S <= record["limit"]["elapsed_s"] < DEAD_S + 2.0
        assert record["socket"]["client"]["verdict"] == "dead"


@pytest.mark.netns
def test_a_tls_client_that_vanishes_without_a_word_is_no_abort(
    network: netns.Network, certificates: Certificates
) -> None:
    with _tls_proxy(network, certificates, "--peer-dead-timeout", "1", "--log-level", "debug") as (proxy, _):
        proxy.wait_connections(1)
        network.drop()
        record = proxy.wait_for(lambda record: record["event"].startswith("connection."), 10.0)
        assert record["event"] == "connection.close"
        proxy.wait_connections(0)
        assert not [record for record in proxy.records() if record["event"] == "connection.abort"]
