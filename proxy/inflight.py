"""What each request in flight is and how far it has come, in memory that outlives the worker process.

A worker that is killed (``kill -9``, out of memory, a crash of the interpreter) can't write the records of its
requests. So it keeps what the main process needs to write them: one slot for each client connection. What the record
says is decided in ``record``.

Invariant: a slot is written by the one thread that holds the connection, and read by the main process only when the
worker has ended.
"""

import dataclasses
import mmap
import struct
import threading

from .head import MOST_REMEMBERED, RequestHead
from .vocabulary import Phase

# A slot is a row of structures, each right behind the one before, and two texts.
# First whether a request is in flight, and when its first byte came; phase, status (0: none), announced length of the
# body of its response (-1: none); six counts as in the field "bytes", and its id.
_STATE = struct.Struct("=B7xdBxH4xq6Q128s")
# Within it, what changes while the request runs.
_STAGE_AT, _STAGE = 16, struct.Struct("=BxH4xq")
_COUNTS_AT, _COUNTS = _STAGE_AT + _STAGE.size, struct.Struct("=6Q")
# What is the same in one request after the other: the announced length of its body (-1: none), and the sizes of
# upstream, of method, and of the text in which these two and the target stand one behind the other.
_HEAD_AT, _HEAD = _STATE.size, struct.Struct("=qHHH")
# Of the connection: the sizes of its id, and of the text in which it and the client stand.
_CONNECTION_AT, _CONNECTION = _HEAD_AT + _HEAD.size, struct.Struct("=HH")
_CONNECTION_TEXT_AT = _CONNECTION_AT + _CONNECTION.size
# The text of the head takes what is left.
_HEAD_TEXT_AT = 400
_ROOM = 1024
# The slots of a worker stand behind the number of those that were made, which has the room of one.
_MADE = struct.Struct("=Q")
_MOST_METHOD = 128
# Memory that all slots of all workers may take, if each was used. Requests on connections beyond it are counted where a
# worker dies, and not described.
_MOST_MEMORY = 256 * 1024 * 1024
_PHASES = tuple(Phase)
_NUMBERS = {phase: number for number, phase in enumerate(_PHASES)}
_HEAD_PHASE = _NUMBERS[Phase.REQUEST_HEAD]
_CONNECT_PHASE = _NUMBERS[Phase.CONNECT]
_ANSWER_PHASE = _NUMBERS[Phase.RESPONSE_HEAD]


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """A request that was in flight when its worker died. None: its head had not told it yet, or there was none."""

    connection_id: str
    client: str
    first_at: float  # on the monotonic clock, which all processes share
    phase: Phase
    status: int | None
    request_id: str | None
    upstream: str | None
    method: bytes | None
    target: bytes | None  # secrets masked, and cut where it is long
    expected_request: int | None
    expected_response: int | None
    client_read: int
    client_written: int
    upstream_read: int
    upstream_written: int
    request_body: int
    response_body: int


class Slot:
    """Where one client connection keeps account of its request in flight."""

    __slots__ = ("_at", "_counts_at", "_head", "_head_size", "_memory", "_upstream", "is_shared")

    def __init__(self, memory: mmap.mmap | bytearray, at: int, *, is_shared: bool) -> None:
        """``at`` is where in ``memory`` it begins."""
        self._memory = memory
        self._at = at
        self._counts_at = at + _COUNTS_AT
        self.is_shared = is_shared
        self._head: RequestHead | None = None  # what the text speaks of
        self._head_size = 0
        self._upstream = ""

    def hold(self, connection_id: str, client: str) -> None:
        """A connection takes this slot."""
        memory, at = self._memory, self._at
        name = client.encode("utf-8", "surrogateescape")
        text = (connection_id.encode("ascii") + name)[: _HEAD_TEXT_AT - _CONNECTION_TEXT_AT]
        _CONNECTION.pack_into(memory, at + _CONNECTION_AT, len(connection_id), len(text))
        memory[at + _CONNECTION_TEXT_AT : at + _CONNECTION_TEXT_AT + len(text)] = text

    def begin(self, first_at: float, read: int) -> None:
        """A request has begun, and its head is waited for; ``read`` octets of it have come."""
        _STATE.pack_into(self._memory, self._at, 1, first_at, _HEAD_PHASE, 0, -1, read, 0, 0, 0, 0, 0, b"")

    def describe(
        self,
        first_at: float,
        head: RequestHead,
        request_id: bytes,
        upstream: str,
        read: int,
        written: int,
        content: int,
    ) -> None:
        """Its head has been read, and ``read`` octets of its body; upstream (empty while there is none) is about to
        get ``written``, of which ``content`` are content.
        """
        memory, at = self._memory, self._at
        known = self._head
        if head is not known or upstream != self._upstream:
            # A slot outlives its connections: a large head would stay with it for good.
            self._head = head if head.size <= MOST_REMEMBERED else None
            self._head_size = head.size
            if (
                known is None
                or upstream != self._upstream
                or head.target != known.target
                or head.method != known.method
                or head.section.content_length != known.section.content_length
            ):
                self._upstream = upstream
                self._describe_head(head, upstream)
        phase = _ANSWER_PHASE if upstream else _CONNECT_PHASE
        _STATE.pack_into(
            memory, at, 1, first_at, phase, 0, -1, self._head_size + read, 0, 0, written, content, 0, request_id
        )

    def _describe_head(self, head: RequestHead, upstream: str) -> None:
        memory, at = self._memory, self._at
        name = upstream.encode("utf-8", "surrogateescape")
        words = b"%b%b" % (name, head.method[:_MOST_METHOD])
        target = head.masked_target()
        room = _ROOM - _HEAD_TEXT_AT - len(words)
        if len(target) > room:
            kept = room - 32
            target = b"%b... (%d more characters)" % (target[:kept], len(target) - kept)
        text = words + target
        length = head.section.content_length
        sizes = len(name), len(words) - len(name), len(text)
        _HEAD.pack_into(memory, at + _HEAD_AT, -1 if length is None else length, *sizes)
        memory[at + _HEAD_TEXT_AT : at + _HEAD_TEXT_AT + len(text)] = text

    def stage(self, phase: Phase, status: int, expected: int | None) -> None:
        """It has come to ``phase``; ``status`` is 0 until that of the response has gone out, ``expected`` the announced
        length of its body.
        """
        length = -1 if expected is None else expected
        _STAGE.pack_into(self._memory, self._at + _STAGE_AT, _NUMBERS[phase], status, length)

    def count(
        self,
        read: int,
        client_written: int,
        upstream_read: int,
        upstream_written: int,
        request_body: int,
        response_body: int,
    ) -> None:
        """So far it has come: ``read`` octets of the request's body, the other counts as in ``InFlight``."""
        _COUNTS.pack_into(
            self._memory,
            self._counts_at,
            self._head_size + read,
            client_written,
            upstream_read,
            upstream_written,
            request_body,
            response_body,
        )

    def end(self) -> None:
        """Its record is about to be written."""
        self._memory[self._at] = 0

    def read(self) -> InFlight | None:
        """Returns: the request in flight, None if there is none."""
        memory, at = self._memory, self._at
        in_flight, first_at, phase, status, expected_response, *counts, request_id = _STATE.unpack_from(memory, at)
        if not in_flight:
            return None
        id_size, size = _CONNECTION.unpack_from(memory, at + _CONNECTION_AT)
        connection = bytes(memory[at + _CONNECTION_TEXT_AT : at + _CONNECTION_TEXT_AT + size])
        expected_request, name_size, method_size, size = _HEAD.unpack_from(memory, at + _HEAD_AT)
        text = bytes(memory[at + _HEAD_TEXT_AT : at + _HEAD_TEXT_AT + size])
        known = phase != _HEAD_PHASE
        return InFlight(
            connection[:id_size].decode("ascii"),
            connection[id_size:].decode("utf-8", "surrogateescape"),
            first_at,
            _PHASES[phase],
            status or None,
            request_id.rstrip(b"\0").decode("ascii") if known else None,
            text[:name_size].decode("utf-8", "surrogateescape") if known and name_size else None,
            text[name_size : name_size + method_size] if known else None,
            text[name_size + method_size :] if known else None,
            expected_request if known and expected_request >= 0 else None,
            expected_response if known and expected_response >= 0 else None,
            *counts,
        )


class SlotStore:
    """The free slots of one worker. Made in the worker: what an earlier process in its place held is free again."""

    def __init__(self, memory: mmap.mmap, at: int, most: int) -> None:
        """``at`` is where in ``memory`` the place for the number of slots begins; ``most`` of them follow."""
        self._memory = memory
        self._at = at
        self._most = most
        self._made = 0  # slots are made when first wanted
        self._free: list[Slot] = []
        self._lock = threading.Lock()  # guards _made
        _MADE.pack_into(memory, at, 0)

    def take(self, connection_id: str, client: str) -> Slot:
        """Returns: a slot for a connection; where none is free, one that nobody else ever sees."""
        try:
            slot = self._free.pop()
        except IndexError:
            slot = self._make()
        slot.hold(connection_id, client)
        return slot

    def _make(self) -> Slot:
        with self._lock:
            if self._made == self._most:
                return Slot(bytearray(_ROOM), 0, is_shared=False)
            self._made += 1
            _MADE.pack_into(self._memory, self._at, self._made)
            return Slot(self._memory, self._at + self._made * _ROOM, is_shared=True)

    def give(self, slot: Slot) -> None:
        """Take back the slot of a connection that has ended."""
        if slot.is_shared:
            self._free.append(slot)


class InFlightTable:
    """The slots of all workers. Made by the main process, before it forks."""

    def __init__(self, workers: int, most_connections: int) -> None:
        """``most_connections`` is what one worker may hold at once."""
        self._each = min(most_connections, _MOST_MEMORY // _ROOM // workers)
        # A page takes memory when it is first read or written: only as far as slots were made.
        self._memory = mmap.mmap(-1, workers * (1 + self._each) * _ROOM)

    def slots(self, worker: int) -> SlotStore:
        """Returns: the slots of one worker. Call it in that worker."""
        return SlotStore(self._memory, self._at(worker), self._each)

    def left_by(self, worker: int) -> list[InFlight]:
        """Returns: what was in flight in a worker that has ended. Empties its slots."""
        found = []
        at = self._at(worker)
        (made,) = _MADE.unpack_from(self._memory, at)
        for number in range(1, made + 1):
            slot = Slot(self._memory, at + number * _ROOM, is_shared=True)
            request = slot.read()
            if request is not None:
                slot.end()
                found.append(request)
        return found

    def _at(self, worker: int) -> int:
        return worker * (1 + self._each) * _ROOM
