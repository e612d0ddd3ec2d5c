"""Bodies of many chunks, small ones and large ones that pass from socket to socket unread: what arrives, and what the
record says of it, where the stream is whole, where it is cut, and where it is wrong.
"""

import collections.abc
import random
import threading

import h11
import pytest

import harness
import peers
from harness import LogRecord, ProxyProcess
from peers import Upstream, Wire, chunk, connect

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"
SIZES = (1, 7, 100, 4096, 16 * 1024 - 1, 16 * 1024, 32 * 1024, 32 * 1024, 32 * 1024, 64 * 1024, 131072, 300_000)
SEEDS = range(4)
# Of a peer that stops reading: left to itself, the kernel may take in all there is.
BUFFER = 512 * 1024


def body(choose: random.Random, total: int, *, plain: bool = False) -> bytes:
    """Returns: a body in chunks of many sizes, large ones in runs, with extensions, leading zeros and a trailer."""
    parts = []
    size, count = 0, 0
    while total > 0:
        if not count:
            size, count = choose.choice(SIZES), choose.choice((1, 1, 5, 40))
        count -= 1
        content = choose.randbytes(size)
        line = choose.choice((b"%x", b"%X", b"%08x")) % size
        if not plain and choose.random() < 0.05:
            line += choose.choice((b";a", b";a=b", b';a="\xff;b"'))
        parts.append(line + b"\r\n" + content + b"\r\n")
        total -= size
    return b"".join(parts) + choose.choice((b"0\r\n\r\n", b"00\r\n\r\n", b"0\r\nX-Sum: 7\r\n\r\n"))


def content_of(octets: bytes) -> int:
    """Returns: the octets of content in a response, or in the first part of one, as h11 counts them."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("Host", "t")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(octets)
    content = 0
    while not isinstance(event := reader.next_event(), type) and not isinstance(event, h11.EndOfMessage):
        if isinstance(event, h11.Data):
            content += len(event.data)
    return content


def in_pieces(choose: random.Random, octets: bytes) -> collections.abc.Iterator[bytes]:
    """Give the octets in pieces of many sizes."""
    at = 0
    while at < len(octets):
        size = choose.choice((1, 3, 40, 32 * 1024, 32 * 1024 + 8, 200_000, 1_000_000))
        yield octets[at : at + size]
        at += size


def sole_record(proxy: ProxyProcess) -> LogRecord:
    """Wait for the only record of a proxy. Returns: it, checked."""
    (record,) = proxy.wait_requests(1, 10)
    harness.check_record(record)
    return record


@pytest.mark.parametrize("seed", SEEDS)
def test_a_download_arrives_as_it_was_sent(seed: int) -> None:
    choose = random.Random(seed)
    octets = body(choose, 12_000_000)
    pieces = list(in_pieces(choose, octets))

    def script(wire: Wire) -> None:
        wire.read_request()
        for piece in [HEAD, *pieces]:
            wire.send(piece)
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(GET)
        head = wire.read_head()
        assert wire.read_exactly(len(octets)) == octets
        record = sole_record(proxy)
    assert record["event"] == "request.complete"
    assert record["bytes"]["response_body"] == content_of(HEAD + octets)
    assert record["bytes"]["upstream_read"] == len(HEAD) + len(octets)
    assert record["bytes"]["client_written"] == len(head) + len(octets)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_upload_arrives_as_it_was_sent(seed: int) -> None:
    choose = random.Random(seed)
    octets = body(choose, 12_000_000)
    got = []

    def script(wire: Wire) -> None:
        wire.read_head()
        got.append(wire.read_exactly(len(octets)))
        wire.send(peers.ok())
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        for piece in [POST, *in_pieces(choose, octets)]:
            wire.send(piece)
        assert wire.read_response("POST").status == 200
        record = sole_record(proxy)
    assert got == [octets]
    assert record["event"] == "request.complete"
    assert record["bytes"]["request_body"] == content_of(HEAD + octets)
    assert record["bytes"]["client_read"] == len(POST) + len(octets)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_record_of_a_reader_that_stops_counts_content_alone(seed: int) -> None:
    """The client's socket took some octets, the pipe holds more: what the record calls content is in the former."""
    choose = random.Random(seed)
    octets = body(choose, 30_000_000)
    with (
        Upstream(peers.answer(HEAD + octets)) as upstream,
        ProxyProcess(upstream.url, "--client-write-timeout", "0.5s") as proxy,
        connect(proxy.address, receive_buffer=BUFFER) as wire,
    ):
        wire.send(GET)
        head = wire.read_head()
        wire.read_exactly(choose.randrange(3_000_000))
        record = sole_record(proxy)
    assert (record["side"], record["cause"]) == ("client", "timeout")
    written = record["bytes"]["client_written"] - len(head)
    assert 0 < written < len(octets)
    assert record["bytes"]["response_body"] == content_of(HEAD + octets[:written])
    assert record["bytes"]["upstream_read"] - len(HEAD) > written


def test_the_record_of_a_reader_of_http_1_0_that_stops_counts_what_it_took() -> None:
    """It gets no chunks: all that its socket took behind the head is content."""
    octets = body(random.Random(0), 30_000_000)
    with (
        Upstream(peers.answer(HEAD + octets)) as upstream,
        ProxyProcess(upstream.url, "--client-write-timeout", "0.5s") as proxy,
        connect(proxy.address, receive_buffer=BUFFER) as wire,
    ):
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        head = wire.read_head()
        record = sole_record(proxy)
    assert (record["side"], record["cause"]) == ("client", "timeout")
    written = record["bytes"]["client_written"] - len(head)
    assert 0 < written < content_of(HEAD + octets)
    assert record["bytes"]["response_body"] == written


@pytest.mark.parametrize("seed", SEEDS)
def test_the_record_of_an_upstream_that_stops_reading_counts_content_alone(seed: int) -> None:
    choose = random.Random(seed)
    octets = body(choose, 30_000_000)

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read_exactly(choose.randrange(3_000_000))
        stopped.wait(10)

    stopped = threading.Event()
    with (
        Upstream(script, receive_buffer=BUFFER) as upstream,
        ProxyProcess(upstream.url, "--upstream-write-timeout", "0.5s") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send_until_answered(POST + octets)
        assert wire.read_response("POST").status == 504
        stopped.set()
        record = sole_record(proxy)
        head = upstream.wire().received.octets.find(b"\r\n\r\n") + 4
    assert (record["side"], record["cause"]) == ("upstream", "timeout")
    written = record["bytes"]["upstream_written"] - head
    assert 0 < written < len(octets)
    assert record["bytes"]["request_body"] == content_of(HEAD + octets[:written])


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_upstream_that_ends_too_early(seed: int, end: str) -> None:
    """What had been read goes to the client first, and the record counts it."""
    choose = random.Random(seed)
    octets = body(choose, 6_000_000)
    cut = choose.randrange(len(octets) - 100)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(HEAD + octets[:cut])
        read.wait(10)
        if end == "reset":
            wire.reset()

    read = threading.Event()
    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(GET)
        wire.read_head()
        assert wire.read_exactly(cut) == octets[:cut]
        read.set()
        assert wire.read_to_end() == b""
        record = sole_record(proxy)
    assert (record["side"], record["phase"]) == ("upstream", "response_body")
    assert record["cause"] == ("reset" if end == "reset" else "closed")
    assert record["bytes"]["response_body"] == content_of(HEAD + octets[:cut])
    assert record["bytes"]["upstream_read"] == len(HEAD) + cut


LARGE = chunk(b"x" * 32768)
WRONG = {
    "no size": b"zz\r\n",
    "a bare line feed": b"8000\n" + b"x" * 32768 + b"\r\n",
    "a sign": b"+8000\r\n" + b"x" * 32768 + b"\r\n",
    "a prefix": b"0x8000\r\n" + b"x" * 32768 + b"\r\n",
    "a space": b"8000 \r\n" + b"x" * 32768 + b"\r\n",
    "an underscore": b"80_00\r\n" + b"x" * 32768 + b"\r\n",
    "too long": b"0" * 20 + b"8000\r\n" + b"x" * 32768 + b"\r\n",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_line_behind_large_chunks_is_not_passed_on(wrong: bytes) -> None:
    octets = LARGE * 100
    with (
        Upstream(peers.answer(HEAD + octets + wrong)) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(GET)
        wire.read_head()
        got = wire.read_to_end()
        record = sole_record(proxy)
    assert octets.startswith(got)
    assert (record["side"], record["cause"]) == ("upstream", "protocol")
    assert record["bytes"]["response_body"] >= content_of(HEAD + got)


@pytest.mark.parametrize("excess", [b"GARBAGE\r\n", b"\n8000\r\n", b"\r8000\r\n", b"00\r\n"])
def test_a_chunk_longer_than_its_size_among_large_ones(excess: bytes) -> None:
    octets = LARGE * 100 + b"8000\r\n" + b"x" * 32768
    with (
        Upstream(peers.silent) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send_until_answered(POST + octets + excess + LARGE)
        assert wire.read_response("POST").status == 400
        record = sole_record(proxy)
        upstream.settle()
        got = upstream.wire().received.octets
    assert (record["side"], record["phase"], record["cause"]) == ("client", "request_body", "protocol")
    assert excess not in got[-len(excess) - 20 :]


@pytest.mark.parametrize("over", [0, 1])
def test_the_bound_on_a_body_among_large_chunks(over: int) -> None:
    octets = LARGE * 100 + b"0\r\n\r\n"
    bound = 100 * 32768 - over

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read_until(b"0\r\n\r\n")
        wire.send(peers.ok())
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--max-body-size", str(bound)) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send_until_answered(POST + octets)
        response = wire.read_response("POST")
        record = sole_record(proxy)
    if over:
        assert response.status == 413
        assert (record["cause"], record["limit"]["name"]) == ("limit", "max_body_size")
        assert record["bytes"]["request_body"] <= bound
    else:
        assert response.status == 200
        assert record["event"] == "request.complete"
