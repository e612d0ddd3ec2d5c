"""What strangers try that is no row of the table of scenarios: peers whose timing, order or octets are against the
proxy. Whatever they do, each request that began ends in one record, and nothing of one message gets into another.
"""

import collections.abc
import select
import socket
import struct

import pytest

import harness
from harness import ProxyProcess
from peers import Upstream, answer_all, connect, ok
from proxy.aborts import Abort
from proxy.config import load_settings
from proxy.upstream import upstream_pool
from proxy.vocabulary import Cause, Phase, Side

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
RESET = struct.pack("ii", 1, 0)


def get(target: str = "/", extra: str = "") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: t\r\n{extra}\r\n".encode()


def post(body: bytes, extra: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + body


@pytest.fixture(scope="module")
def scene() -> collections.abc.Iterator[tuple[Upstream, ProxyProcess]]:
    with Upstream(answer_all(ok())) as upstream, ProxyProcess(upstream.url) as proxy:
        yield upstream, proxy


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """Not counted here after each test: the upstream of all tests has connections that are kept between them."""


def records_of(proxy: ProxyProcess, request_ids: list[bytes]) -> list[harness.LogRecord]:
    """Wait for the records of these requests. Returns: them, one for each."""
    wanted = [request_id.decode() for request_id in request_ids]
    harness.wait_until(lambda: {r["request_id"] for r in proxy.requests()} >= set(wanted), what="the records")
    found = [record for record in proxy.requests() if record["request_id"] in wanted]
    assert len(found) == len(wanted)
    for record in found:
        harness.check_record(record)
    return found


# -- upstream resets --------------------------------------------------------------------------------------------------


def test_an_upstream_that_resets_between_connect_and_first_look() -> None:
    """The connect succeeds, and the reset comes before the socket is asked for anything: a reset, and no bug."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = load_settings(["--upstream", f"http://127.0.0.1:{listener.getsockname()[1]}"], {})
        pool = upstream_pool(settings, None)
        connection = pool.lease()

        def reset_then_go_on(fd: int, events: int, at_most_s: float | None) -> bool:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            accepted.close()
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            assert poller.poll(5000)
            with socket.socket(fileno=socket.dup(fd)) as sock:
                # A connect that was looked at before the reset came finds no error; here asking for it takes it away.
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return True

        with pytest.raises(Abort) as caught:
            connection.open(reset_then_go_on)
        pool.close()
    abort = caught.value
    assert (abort.side, abort.phase, abort.cause) == (Side.UPSTREAM, Phase("connect"), Cause("reset"))
    assert (abort.status, abort.error_type) == (502, "connection_terminated")


def test_an_upstream_that_resets_whatever_it_accepts_is_never_our_own_bug() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)  # those it accepts inherit it
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        with ProxyProcess(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy:
            for _ in range(200):
                with connect(proxy.address) as wire:
                    wire.send(get())
                    listener.accept()[0].close()
                    assert wire.read_response().status == 502
            records = proxy.wait_requests(200)
    for record in records:
        harness.check_record(record)
        assert (record["side"], record["cause"]) == ("upstream", "reset")
        assert record["phase"] in ("connect", "response_head")
