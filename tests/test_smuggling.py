"""Every byte string of the corpus, read by the codec, by the referee, and by a running proxy."""

import pytest

from referee import Reading, codec_request, codec_response, h11_request, h11_response
from smuggling_corpus import REQUESTS, RESPONSES, Accept, Case, Refuse

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
