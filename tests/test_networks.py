"""Networks that fail: peers whose packets vanish, who pause, or who are far away, each told apart in the record.

The proxy runs in one network namespace, the peer in another, on a link that drops or delays what passes (``netns``).
"""

import collections.abc
import contextlib
import dataclasses
import pathlib
import time

import pytest

import harness
import netns
import peers
from conftest import Certificates

pytestmark = pytest.mark.netns

BODY = bytes(range(256)) * 4096
LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
UPGRADE = "Connection: Upgrade\r\nUpgrade: tcp\r\n"
DEAD_S = 1.5
DEAD = ("--peer-dead-timeout", str(DEAD_S))
# An idle peer is asked first after a second, and a lost question is noticed when the next answer is due.
FOUND_S = DEAD_S + 3.0


@pytest.fixture(scope="module")
def network() -> collections.abc.Iterator[netns.Network]:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    with netns.Network() as network:
        yield network


@dataclasses.dataclass
class Scene:
    """A proxy between two peers, one of them at the far end of the link."""

    network: netns.Network
    proxy: harness.ProxyProcess
    upstream: peers.Upstream
    wire: peers.Wire

    def abort(self, within_s: float) -> harness.LogRecord:
        """Wait for the one record. Returns: it."""
        began_at = time.monotonic()
        record = self.proxy.wait_requests(1, within_s + 2.0)[0]
        assert time.monotonic() - began_at < within_s + 2.0
        harness.check_record(record)
        return record


@contextlib.contextmanager
def _scene(
    network: netns.Network, script: peers.Script, *options: str, far: str, receive_buffer: int | None = None
) -> collections.abc.Iterator[Scene]:
    """Build the scene; ``far`` is the peer beyond the link, ``client`` or ``upstream``."""
    network.restore()
    upstream_there = far == "upstream"
    with contextlib.ExitStack() as stack:
        with netns.inside(network.there if upstream_there else network.here):
            upstream = peers.Upstream(script, host=netns.THERE_IP if upstream_there else "127.0.0.1")
            stack.enter_context(upstream)
        listen = "127.0.0.1:0" if upstream_there else f"{netns.HERE_IP}:0"
        proxy = stack.enter_context(harness.ProxyProcess(upstream.url, *options, listen=listen, namespace=network.here))
        stack.callback(network.restore)  # so that nothing waits for lost packets at the end
        with netns.inside(network.here if upstream_there else network.there):
            wire = stack.enter_context(peers.connect(proxy.address, receive_buffer=receive_buffer))
        yield Scene(network, proxy, upstream, wire)


def _verdict(record: harness.LogRecord, side: str) -> str:
    verdict = record["socket"][side]["verdict"]
    assert isinstance(verdict, str)
    return verdict


def _words(record: harness.LogRecord) -> tuple[str, ...]:
    return tuple(record[name] for name in ("event", "side", "phase", "cause"))


def _check_dead(record: harness.LogRecord, side: str) -> None:
    limit = record["limit"]
    if record["exception"] is None:  # else the kernel gave it up first
        assert limit["name"] == "peer_dead_timeout"
        assert DEAD_S <= limit["elapsed_s"] < DEAD_S + 2.0
        # What it owes is an answer to what was sent.
        assert record["operation"] == ("handshake" if record["phase"] == "tls_handshake" else "write")
    else:
        assert record["exception"]["errno"] == "ETIMEDOUT"
    assert _verdict(record, side) == "dead"


# -- dead -------------------------------------------------------------------------------------------------------------


def test_a_client_that_vanishes_in_mid_response(network: netns.Network) -> None:
    with _scene(network, peers.flood(LONG), *DEAD, far="client") as scene:
        scene.wire.get()
        scene.wire.read_exactly(100_000)
        network.drop()
        record = scene.abort(FOUND_S)
        wire = scene.upstream.wire()
        scene.upstream.settle()  # upstream was told
        assert _words(record) == ("request.abort", "client", "response_body", "dead_peer")
        _check_dead(record, "client")
        assert record["socket"]["client"]["unacked_bytes"] > 0
        assert record["bytes"]["upstream_read"] <= wire.sent.count


def test_a_client_that_vanishes_while_the_answer_is_awaited(network: netns.Network) -> None:
    with _scene(network, peers.silent, *DEAD, far="client") as scene:
        scene.wire.get()
        scene.upstream.wire().received  # noqa: B018 - waits for the connection
        network.drop()
        record = scene.abort(FOUND_S)
        scene.upstream.settle()
        assert _words(record) == ("request.abort", "client", "response_head", "dead_peer")
        _check_dead(record, "client")


def test_a_client_that_vanishes_in_its_own_request(network: netns.Network) -> None:
    with _scene(network, peers.silent, *DEAD, far="client") as scene:
        scene.wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\nabc")
        harness.wait_until(lambda: scene.upstream.wire().received.octets.endswith(b"abc"))
        network.drop()
        record = scene.abort(FOUND_S)
        scene.upstream.settle()
        assert _words(record) == ("request.abort", "client", "request_body", "dead_peer")
        assert record["bytes"]["request_body"] == 3
        _check_dead(record, "client")


def test_a_client_that_vanishes_in_a_tunnel(network: netns.Network) -> None:
    with _scene(network, peers.upgrade(), *DEAD, far="client") as scene:
        scene.wire.get(extra=UPGRADE)
        scene.wire.read_head()
        scene.wire.send(b"hello")
        assert scene.wire.read_exactly(5) == b"hello"
        network.drop()
        record = scene.abort(FOUND_S)
        scene.upstream.settle()
        assert _words(record) == ("request.abort", "client", "tunnel", "dead_peer")
        _check_dead(record, "client")


def test_a_client_that_vanishes_in_its_head(network: netns.Network) -> None:
    with _scene(network, peers.silent, *DEAD, "--client-head-timeout", "60", far="client") as scene:
        scene.wire.send(b"GET / HTTP/1.1\r\nHo")
        time.sleep(0.2)  # nothing tells that the octets have come
        network.drop()
        record = scene.abort(FOUND_S)
        assert _words(record) == ("request.abort", "client", "request_head", "dead_peer")
        _check_dead(record, "client")


def test_a_client_that_vanishes_while_upstream_is_connected(network: netns.Network) -> None:
    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.here):
            port = stack.enter_context(peers.full_listener())
        options = ("--upstream-connect-timeout", "none", *DEAD)
        proxy = stack.enter_context(
            harness.ProxyProcess(
                f"http://127.0.0.1:{port}", *options, listen=f"{netns.HERE_IP}:0", namespace=network.here
            )
        )
        stack.callback(network.restore)
        with netns.inside(network.there):
            wire = stack.enter_context(peers.connect(proxy.address))
        wire.get()
        proxy.wait_in_flight()
        network.drop()
        record = proxy.wait_requests(1, FOUND_S + 2.0)[0]
        harness.check_record(record)
        assert _words(record) == ("request.abort", "client", "connect", "dead_peer")
        _check_dead(record, "client")


def test_an_upstream_that_vanishes_in_the_handshake(network: netns.Network, certificates: Certificates) -> None:
    """It has taken what opens the handshake, and falls silent without a limit of ours on that."""

    def take_hello(wire: peers.Wire) -> None:
        wire.read()
        wire.await_end()

    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.there):
            upstream = stack.enter_context(peers.Upstream(take_hello, host=netns.THERE_IP))
        options = ("--upstream-connect-timeout", "none", "--upstream-ca", certificates.ca, *DEAD)
        url = upstream.url.replace("http:", "https:")
        proxy = stack.enter_context(harness.ProxyProcess(url, *options, namespace=network.here))
        stack.callback(network.restore)
        with netns.inside(network.here):
            wire = stack.enter_context(peers.connect(proxy.address))
        wire.get()
        harness.wait_until(lambda: upstream.wire().received.count > 100)
        network.drop()
        response = wire.read_response()
        record = proxy.wait_requests(1, FOUND_S + 2.0)[0]
        harness.check_record(record)
        assert _words(record) == ("request.abort", "upstream", "tls_handshake", "dead_peer")
        assert (record["status"], record["error_type"]) == (504, "connection_timeout")
        assert response.status == 504
        _check_dead(record, "upstream")


def test_an_upstream_that_vanishes_in_a_tunnel(network: netns.Network) -> None:
    with _scene(network, peers.upgrade(), *DEAD, far="upstream") as scene:
        scene.wire.get(extra=UPGRADE)
        scene.wire.read_head()
        scene.wire.send(b"hello")
        assert scene.wire.read_exactly(5) == b"hello"
        network.drop()
        record = scene.abort(FOUND_S)
        assert _words(record) == ("request.abort", "upstream", "tunnel", "dead_peer")
        _check_dead(record, "upstream")


def test_an_upstream_that_vanishes_before_its_answer(network: netns.Network) -> None:
    with _scene(network, peers.silent, *DEAD, far="upstream") as scene:
        scene.wire.get()
        harness.wait_until(lambda: b"\r\n\r\n" in scene.upstream.wire().received.octets)
        network.drop()
        response = scene.wire.read_response()
        record = scene.abort(FOUND_S)
        assert _words(record) == ("request.abort", "upstream", "response_head", "dead_peer")
        _check_dead(record, "upstream")
        assert response.status == record["status"]
        assert response.status in (502, 504)


def test_an_upstream_that_vanishes_in_mid_answer(network: netns.Network) -> None:
    with _scene(network, peers.answer_and_wait(LONG + b"abcd"), *DEAD, far="upstream") as scene:
        scene.wire.get()
        scene.wire.read_head()
        scene.wire.read_exactly(4)
        network.drop()
        assert scene.wire.await_end() == "fin"
        record = scene.abort(FOUND_S)
        assert _words(record) == ("request.abort", "upstream", "response_body", "dead_peer")
        assert record["bytes"]["response_body"] == 4
        _check_dead(record, "upstream")


def test_an_upstream_that_vanishes_in_mid_request(network: netns.Network) -> None:
    def read_slowly(wire: peers.Wire) -> None:
        while wire.read(4096):
            time.sleep(0.005)

    with _scene(network, read_slowly, *DEAD, far="upstream") as scene:
        network.slow(rate=2_000_000)
        scene.wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000000\r\n\r\n")
        scene.wire.send(BODY)
        harness.wait_until(lambda: scene.upstream.wire().received.count > 20_000)
        network.drop()
        scene.wire.send_until_answered(BODY * 100)
        response = scene.wire.read_response()
        record = scene.abort(FOUND_S)
        assert _words(record) == ("request.abort", "upstream", "request_body", "dead_peer")
        _check_dead(record, "upstream")
        assert response.status in (502, 504)


def test_an_upstream_beyond_a_broken_route(network: netns.Network) -> None:
    with _scene(network, peers.silent, "--upstream-connect-timeout", "0.3", far="upstream") as scene:
        network.drop()
        scene.wire.get()
        assert scene.wire.read_response().status == 504
        record = scene.abort(2.0)
        assert _words(record) == ("request.abort", "upstream", "connect", "timeout")
        assert record["limit"]["name"] == "upstream_connect_timeout"
        assert record["upstream"] is None


def test_the_user_timeout_ends_a_client_that_vanished_sooner(network: netns.Network) -> None:
    options = ("--tcp-user-timeout", "0.5", "--peer-dead-timeout", "20")
    with _scene(network, peers.flood(LONG), *options, far="client") as scene:
        scene.wire.get()
        scene.wire.read_exactly(100_000)
        network.drop()
        record = scene.abort(4.0)
        assert _words(record) == ("request.abort", "client", "response_body", "dead_peer")
        assert record["limit"]["name"] == "tcp_user_timeout"
        assert 0.3 <= record["limit"]["elapsed_s"] < 3.0
        assert record["exception"]["errno"] == "ETIMEDOUT"


def test_the_kernels_own_verdict_is_no_option_of_ours() -> None:
    """Where the kernel counts few retransmissions it gives a peer up long before ``--peer-dead-timeout``."""
    with netns.Network() as network:
        with netns.inside(network.here):
            pathlib.Path("/proc/sys/net/ipv4/tcp_retries2").write_text("3")
        with _scene(network, peers.flood(LONG), far="client") as scene:
            scene.wire.get()
            scene.wire.read_exactly(100_000)
            network.drop()
            record = scene.abort(20.0)
            assert _words(record) == ("request.abort", "client", "response_body", "dead_peer")
            assert record["exception"]["errno"] == "ETIMEDOUT"
            assert record["limit"] is None
            assert "peer_dead_timeout" not in record["message"]


# -- paused -----------------------------------------------------------------------------------------------------------


def test_a_reader_that_pauses_for_longer_than_any_patience_lives(network: netns.Network) -> None:
    body = BODY * 8
    with _scene(
        network, peers.answer(peers.ok(body)), "--peer-dead-timeout", "2", far="client", receive_buffer=16384
    ) as scene:
        scene.wire.get()
        scene.wire.read_head()
        time.sleep(6.0)  # the pause is what is tested
        assert scene.wire.read_exactly(len(body)) == body
        record = scene.proxy.wait_requests(1)[0]
        assert record["event"] == "request.complete"
        assert record["bytes"]["response_body"] == len(body)


def test_a_reader_that_pauses_is_called_paused(network: netns.Network) -> None:
    options = ("--client-write-timeout", "1.5", "--peer-dead-timeout", "2")
    with _scene(network, peers.flood(LONG), *options, far="client", receive_buffer=16384) as scene:
        scene.wire.get()
        scene.wire.read_head()
        record = scene.abort(10.0)
        assert _words(record) == ("request.abort", "client", "response_body", "timeout")
        assert record["limit"]["name"] == "client_write_timeout"
        assert _verdict(record, "client") == "paused"
        assert record["socket"]["client"]["notsent_bytes"] > 0
        assert record["socket"]["client"]["rwnd_limited_s"] > 1.0


def test_a_reader_that_pauses_and_then_dies_is_dead(network: netns.Network) -> None:
    with _scene(network, peers.flood(LONG), *DEAD, far="client", receive_buffer=16384) as scene:
        scene.wire.get()
        scene.wire.read_head()
        time.sleep(3.0)  # paused for twice the time, and alive
        assert not scene.proxy.requests()
        network.drop()
        record = scene.abort(FOUND_S + 1.0)
        assert _words(record) == ("request.abort", "client", "response_body", "dead_peer")
        _check_dead(record, "client")


def test_an_idle_peer_on_a_good_network_is_never_dead(network: netns.Network) -> None:
    with _scene(network, peers.upgrade(), "--peer-dead-timeout", "0.5", far="client") as scene:
        scene.wire.get(extra=UPGRADE)
        scene.wire.read_head()
        time.sleep(3.5)  # three keepalive probes are asked and answered
        scene.wire.send(b"hello")
        assert scene.wire.read_exactly(5) == b"hello"


# -- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["client", "upstream"])
def test_a_slow_and_lossy_link_completes(network: netns.Network, far: str) -> None:
    body = BODY[:300_000]
    with _scene(network, peers.answer(peers.ok(body)), "--peer-dead-timeout", "3", far=far) as scene:
        network.slow(rate=150_000, delay_s=0.1, loss=0.02)
        scene.wire.get()
        response = scene.wire.read_response()
        assert response.body == body
        record = scene.proxy.wait_requests(1, 15.0)[0]
        assert record["event"] == "request.complete"


def test_a_deadline_on_a_slow_link_says_so(network: netns.Network) -> None:
    with _scene(network, peers.flood(LONG), "--client-write-deadline", "2", far="client") as scene:
        network.slow(rate=60_000, delay_s=0.4)
        scene.wire.get()
        scene.wire.await_end()
        record = scene.abort(5.0)
        assert _words(record) == ("request.abort", "client", "response_body", "deadline")
        assert _verdict(record, "client") == "slow_network"
        assert record["socket"]["client"]["rtt_s"] > 0.5


def test_a_dead_client_under_tls(network: netns.Network, certificates: Certificates) -> None:
    options = ("--tls-cert", certificates.server, "--tls-key", certificates.server, *DEAD)
    network.restore()
    with contextlib.ExitStack() as stack:
        with netns.inside(network.here):
            upstream = stack.enter_context(peers.Upstream(peers.flood(CHUNKED, peers.chunk(bytes(50000)))))
        proxy = stack.enter_context(
            harness.ProxyProcess(upstream.url, *options, listen=f"{netns.HERE_IP}:0", namespace=network.here)
        )
        stack.callback(network.restore)
        with netns.inside(network.there):
            wire = stack.enter_context(peers.connect(proxy.address, certificates.client_context()))
        wire.get()
        wire.read_exactly(100_000)
        network.drop()
        record = proxy.wait_requests(1, FOUND_S + 2.0)[0]
        harness.check_record(record)
        assert _words(record) == ("request.abort", "client", "response_body", "dead_peer")
        _check_dead(record, "client")
