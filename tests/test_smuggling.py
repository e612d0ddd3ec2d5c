"""Every byte string of the corpus, read by the codec, by the referee, and by a running proxy."""

import collections.abc
import json
import threading

import pytest

from harness import LogRecord, ProxyProcess, wait_until
from peers import Script, Upstream, Wire, connect, ok
from referee import Reading, codec_request, codec_response, h11_request, h11_response
from smuggling_corpus import REQUESTS, RESPONSES, SMUGGLED, Accept, Case, Refuse

_requests = pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.name)
_responses = pytest.mark.parametrize("case", RESPONSES, ids=lambda case: case.name)


def _check_verdict(case: Case, reading: Reading) -> None:
    match case.verdict:
        case Accept(framing, content, rest, complete):
            assert (reading.refused, reading.framing) == ("", framing)
            assert (reading.content, reading.complete, reading.rest) == (content, complete, rest)
        case Refuse(status, where):
            if where != "policy":
                assert (reading.refused, reading.status) == (where, status)


def _check_referee(case: Case, reading: Reading, referee: Reading) -> None:
    accepted = isinstance(case.verdict, Accept)
    if case.h11 == "same":
        assert bool(referee.refused) is not accepted
    else:
        assert bool(referee.refused) is (case.h11 == "refuses")
        assert accepted is (case.h11 == "refuses"), "no difference"
        assert case.why
    if accepted and not referee.refused:
        assert (referee.start, referee.minor, referee.fields) == (reading.start, reading.minor, reading.fields)
        assert (referee.content, referee.complete) == (reading.content, reading.complete)
        assert not reading.complete or reading.rest == referee.rest


@_requests
def test_request(case: Case) -> None:
    reading = codec_request(case.octets)
    _check_verdict(case, reading)
    _check_referee(case, reading, h11_request(case.octets))


@_requests
def test_request_octet_by_octet(case: Case) -> None:
    _check_verdict(case, codec_request(case.octets, range(1, len(case.octets))))


@_responses
def test_response(case: Case) -> None:
    reading = codec_response(case.octets, case.method)
    _check_verdict(case, reading)
    _check_referee(case, reading, h11_response(case.octets, case.method))


@_responses
def test_response_octet_by_octet(case: Case) -> None:
    _check_verdict(case, codec_response(case.octets, case.method, range(1, len(case.octets))))


def test_corpus_size() -> None:
    """Each name once, so that a failure names its octets; and not fewer than were collected."""
    for cases in (REQUESTS, RESPONSES):
        assert len({case.name for case in cases}) == len(cases)
        assert len({(case.octets, case.method) for case in cases}) == len(cases)
    assert len(REQUESTS) > 300
    assert len(RESPONSES) > 60


# The running proxy. One for all cases: what one of them breaks for the next is a failure too.


class _Scene:
    """A proxy, and an upstream behind it that reads with h11 and remembers what it was asked for."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.proxy = ProxyProcess(upstream.url)
        self.asked: list[Reading] = []
        self.records = 0

    def begin(self, script: Script | None = None) -> None:
        """Forget the case before."""
        self.upstream.forget()
        self.upstream.script = script or self.answer_one
        self.asked.clear()
        self.records = len(self.proxy.requests())

    def new_records(self, count: int) -> list[LogRecord]:
        """Wait for the records of this case: no more than ``count``."""
        return self.proxy.wait_requests(self.records + count)[self.records :]

    def answer_one(self, wire: Wire) -> None:
        """Read a request, answer it, and end."""
        octets = b""
        while part := wire.read():
            octets += part
            reading = h11_request(octets)
            if reading.complete or reading.refused == "body":
                self.asked.append(reading)
                break
        else:
            return
        assert isinstance(reading.start, tuple)
        answer = ok(fields=b"Connection: close\r\n")
        wire.send(answer[:-2] if reading.start[0] == b"HEAD" else answer)
        wire.end_write()
        wire.await_end()


@pytest.fixture(scope="module")
def scene() -> collections.abc.Iterator[_Scene]:
    with Upstream(lambda wire: None) as upstream:
        made = _Scene(upstream)
        with made.proxy:
            yield made


_accepted = [case for case in REQUESTS if isinstance(case.verdict, Accept) and case.verdict.complete]
_cut = [case for case in REQUESTS if isinstance(case.verdict, Accept) and not case.verdict.complete]
_refused = [case for case in REQUESTS if isinstance(case.verdict, Refuse)]
_with_rest = [case for case in RESPONSES if isinstance(case.verdict, Accept) and case.verdict.rest]


@pytest.mark.parametrize("case", _refused, ids=lambda case: case.name)
def test_refused_by_the_proxy(scene: _Scene, case: Case) -> None:
    """Answered with its status, nothing whole goes upstream, the connection ends, and there is one record."""
    assert isinstance(case.verdict, Refuse)
    in_head = case.verdict.where != "body"
    scene.begin()
    with connect(scene.proxy.address) as client:
        client.send(case.octets)
        # Behind it a request that would be served if the refused one were skipped over.
        client.send(SMUGGLED)
        response = client.read_response()
        assert (response.status, response.whole) == (case.verdict.status, True)
        assert response.get("Connection") == b"close"
        message = json.loads(response.body)["message"]
        assert client.await_end() == "fin"
        assert client.read() == b""
    (record,) = scene.new_records(1)
    assert record["event"] == ("request.reject" if in_head else "request.abort")
    assert record["status"] == case.verdict.status
    assert (record["side"], record["phase"]) == ("client", "request_head" if in_head else "request_body")
    assert record["cause"] == {405: "forbidden", 431: "limit"}.get(case.verdict.status, "protocol")
    assert record["message"] in message
    scene.upstream.settle()
    assert scene.asked == []
    if in_head:
        assert scene.upstream.wires == []
    for wire in scene.upstream.wires:
        # A head may have gone before its body turned out bad; the message it begins never ends.
        assert not h11_request(bytes(wire.received)).complete
        assert SMUGGLED not in bytes(wire.received)


@pytest.mark.parametrize("case", _accepted, ids=lambda case: case.name)
def test_accepted_by_the_proxy(scene: _Scene, case: Case) -> None:
    """What upstream reads, with another parser than ours, is the message of the corpus and no other."""
    assert isinstance(case.verdict, Accept)
    reading = codec_request(case.octets)
    assert isinstance(reading.start, tuple)
    expected = [(reading.start, case.verdict.content)]
    assert case.verdict.rest in (b"", SMUGGLED)
    if case.verdict.rest:
        expected.append(((b"GET", b"/smuggled"), b""))
    scene.begin()
    with connect(scene.proxy.address) as client:
        client.send(case.octets)
        for _ in expected:
            response = client.read_response(reading.start[0].decode())
            assert (response.status, response.whole) == (200, True)
    records = scene.new_records(len(expected))
    scene.upstream.settle()
    assert [(asked.start, asked.content) for asked in scene.asked] == expected
    assert [asked.rest for asked in scene.asked] == [b""] * len(expected)
    for record, (_, content) in zip(records, expected, strict=True):
        assert record["event"] == "request.complete"
        assert record["bytes"]["request_body"] == len(content)


@pytest.mark.parametrize("case", _cut, ids=lambda case: case.name)
def test_cut_by_the_client(scene: _Scene, case: Case) -> None:
    """The octets end inside the body: nothing makes the message whole for upstream."""
    scene.begin()
    with connect(scene.proxy.address) as client:
        client.send(case.octets)
        wire = scene.upstream.wire()
        wait_until(lambda: wire.received.count, what="the head at upstream")
    (record,) = scene.new_records(1)
    assert (record["event"], record["side"], record["cause"]) == ("request.abort", "client", "closed")
    scene.upstream.settle()
    assert scene.asked == []


def _answer_once(octets: bytes) -> Script:
    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(octets)

    return script


@_responses
def test_response_by_the_proxy(scene: _Scene, case: Case) -> None:
    """The client reads, with another parser than ours, the message of the corpus or one that can't look whole."""
    scene.begin(_answer_once(case.octets))
    with connect(scene.proxy.address) as client:
        client.send(case.method + b" / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        octets = client.read_to_end()
    seen = h11_response(octets, case.method)
    (record,) = scene.new_records(1)
    match case.verdict:
        case Accept(framing, content, _, complete):
            assert seen.start == codec_response(case.octets, case.method).start
            assert (seen.content, seen.complete, seen.rest) == (content, complete, b"")
            assert record["event"] == ("request.complete" if complete else "request.abort")
            assert record["bytes"]["response_body"] == len(content)
            if framing == "connection":
                assert client.end == "fin"
        case Refuse():
            assert seen.start == 502 or not seen.complete
            assert record["event"] == "request.abort"
            assert record["side"] == "upstream"
            assert record["cause"] in ("protocol", "limit")
    scene.upstream.settle()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while idle"])
@pytest.mark.parametrize("case", _with_rest, ids=lambda case: case.name)
def test_excess_is_nobodys_answer(scene: _Scene, case: Case, late: bool) -> None:
    """What upstream sends behind its response is not taken for the response to the next request."""
    assert isinstance(case.verdict, Accept)
    answered = threading.Event()
    excess_out = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        if len(scene.upstream.wires) > 1:
            wire.send(ok(b"fresh", b"Connection: close\r\n"))
            wire.end_write()
        elif late:
            assert isinstance(case.verdict, Accept)
            wire.send(case.octets[: -len(case.verdict.rest)])
            assert answered.wait(5)
            wire.send(case.verdict.rest)
            excess_out.set()
        else:
            wire.send(case.octets)
        wire.await_end()

    scene.begin(script)
    with connect(scene.proxy.address) as client:
        client.send(case.method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
        first = client.read_response(case.method.decode())
        assert (first.body, first.whole) == (case.verdict.content, True)
        scene.new_records(1)
        answered.set()
        if late:
            assert excess_out.wait(5)
        client.get()
        second = client.read_response()
        assert (second.status, second.body) == (200, b"fresh")
    scene.new_records(2)
    scene.upstream.settle()
    assert len(scene.upstream.wires) == 2
