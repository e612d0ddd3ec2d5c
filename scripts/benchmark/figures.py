"""What is measured: each figure's run, its columns, and the goals set for it.

A run measures one proxy once and returns a value per column. docs/performance.md says which goals are not met, and why.
"""

import collections.abc
import dataclasses
import functools
import json
import time

from .peers import Peer
from .stage import CellError, Instance, Scale, Stage

GIB = 1 << 30
BEST = "best"


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A value of a figure. `added`: the median of direct is taken off.

    `derive` computes it from the medians of the figure's other columns; from those of a round, noise would add up.
    """

    key: str
    title: str
    added: bool = False
    derive: collections.abc.Callable[[list[float]], float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """Ours is at most (or at least) `factor` times what each of `peers` has; without peers, `factor` itself.

    The peer "best" is whichever of the others has the lowest value.
    """

    column: str
    factor: float
    peers: tuple[str, ...] = ()
    at_least: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One table."""

    name: str
    title: str
    columns: tuple[Column, ...]
    goals: tuple[Goal, ...]
    run: collections.abc.Callable[[Stage, Peer], dict[str, float]]
    note: str = ""
    # The client talks to the upstream itself as well, which has no CPU time of a proxy.
    direct: bool = True


def _small(stage: Stage, peer: Peer, connections: int, close: bool = False) -> dict[str, float]:
    instance = stage.instance(peer, "small")
    values = _load_small(stage, instance, connections, stage.scale.small_s, close)
    return values if instance.process is not None else {"rate": values["rate"], "p99": values["p99"]}


def _load_small(stage: Stage, instance: Instance, connections: int, seconds: float, close: bool) -> dict[str, float]:
    stage.check_small(instance)
    instance.empty_log()
    with stage.measuring(instance) as measured:
        load = stage.wrk(instance, connections, seconds, close)
    requests = int(load["requests"])
    if instance.process is not None:
        # Whoever does not log has an unfair advantage. Ours loses no record; HAProxy drops one now and then, when two
        # threads write at once.
        enough = requests if instance.peer.name == "ours" else int(requests * 0.999)
        lines = instance.read_log(lambda lines: len(lines) >= enough)
        if len(lines) < enough:
            raise CellError(f"the access log has {len(lines)} lines for {requests} requests")
    instance.empty_log()
    return {"cpu": measured.cpu_s / requests * 1e6, "rate": requests / load["duration_s"], "p99": load["p99_us"]}


def _transfer(stage: Stage, peer: Peer, kind: str, secure: bool = False) -> dict[str, float]:
    instance = stage.instance(peer, "stream", secure)
    total = stage.scale.bulk_bytes
    with stage.measuring(instance) as measured:
        result = stage.client(instance, "transfer", "-kind", kind, "-bytes", str(total))
    instance.empty_log()
    values = {"wall": result["seconds"] * GIB / total}
    if instance.process is not None:
        values["cpu"] = measured.cpu_s * GIB / total
    return values


def _trickle(stage: Stage, peer: Peer) -> dict[str, float]:
    return _lines(stage, stage.instance(peer), 4)


def _lines(stage: Stage, instance: Instance, streams: int) -> dict[str, float]:
    options = ("-streams", str(streams), "-lines", str(stage.scale.trickle_lines), "-every", "5ms")
    result = stage.client(instance, "lines", *options, prompt=True)
    return {"p50": result["figures"]["p50_us"], "p99": result["figures"]["p99_us"]}


def _ping_pong(stage: Stage, peer: Peer) -> dict[str, float]:
    instance = stage.instance(peer)
    with stage.measuring(instance) as measured:
        result = stage.client(instance, "pingpong", "-count", str(stage.scale.ping_pongs))
    values = {"p50": result["figures"]["p50_us"], "p99": result["figures"]["p99_us"]}
    if instance.process is not None:
        values["cpu"] = measured.cpu_s / stage.scale.ping_pongs * 1e6
    return values


def _slow(stage: Stage, peer: Peer) -> dict[str, float]:
    # An instance of its own: memory that earlier figures left behind would hide the growth.
    instance = stage.start(peer, "stream", False)
    streams = stage.scale.slow_streams
    try:
        # One of each first, so that what is loaded once is not counted per stream.
        stage.client(instance, "lines", "-streams", "20", "-lines", "2")
        memory_before = instance.memory()
        with stage.measuring(instance) as measured:
            options = ("-streams", str(streams), "-lines", str(stage.scale.slow_lines), "-every", "500ms", "-ready")
            process = stage.begin_client(instance, "lines", *options)
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise CellError("the streams did not begin")
            memory = instance.memory() - memory_before
            result = stage.finish_client(process)
    finally:
        if instance.process is not None:
            stage.processes.end(instance.process)
    values = {"complete": float(result["done"]), "p99": result["figures"]["p99_us"] / 1e3}
    if instance.process is not None:
        values |= {"memory": memory / streams / 1024, "cpu": measured.cpu_s / streams * 1e3}
    return values


def _storm(stage: Stage, peer: Peer) -> dict[str, float]:
    instance = stage.instance(peer)
    instance.empty_log()
    count = stage.scale.storm_clients
    with stage.measuring(instance) as measured:
        options = ("-count", str(count), "-rate", "1000", "-alone", stage.scale.storm_alone)
        figures = stage.client(instance, "storm", *options)["figures"]
    values = {
        "fall": 100 * (1 - figures["beside_per_s"] / figures["alone_per_s"]),
        "p99_alone": figures["alone_p99_us"] / 1e3,
        "p99": figures["beside_p99_us"] / 1e3,
    }
    if instance.process is not None:
        values["cpu"] = measured.cpu_s
        lines = instance.read_log(lambda lines: _count_storm(lines, peer) >= count)
        values["recorded"] = float(_count_storm(lines, peer))
    instance.empty_log()
    return values


def _count_storm(lines: list[bytes], peer: Peer) -> int:
    """Count the requests of the storm in an access log: lines of any kind; of ours, only those that tell the truth."""
    storm = [line for line in lines if b"storm=" in line]
    if peer.name != "ours":
        return len(storm)
    targets = set()
    for line in storm:
        record = json.loads(line)
        told = (record["event"], record.get("side"), record.get("phase"), record.get("cause"))
        if told == ("request.abort", "client", "response_body", "reset"):
            targets.add(record["target"])
    return len(targets)


def _growth_connections(stage: Stage, peer: Peer) -> dict[str, float]:
    instance = stage.instance(peer, "small")
    values = {}
    for connections in stage.scale.connections:
        load = _load_small(stage, instance, connections, stage.scale.small_s / 2, False)
        values[f"cpu_{connections}"] = load["cpu"]
    return values


def _growth_sizes(stage: Stage, peer: Peer) -> dict[str, float]:
    instance = stage.instance(peer)
    values = {}
    for size in stage.scale.sizes_mib:
        repeat = max(1, stage.scale.bulk_bytes // (size << 20))
        with stage.measuring(instance) as measured:
            options = ("-kind", "down", "-bytes", str(size << 20), "-repeat", str(repeat))
            stage.client(instance, "transfer", *options)
        values[f"cpu_{size}"] = measured.cpu_s * GIB / (repeat * size << 20)
    instance.empty_log()
    return values


def _fairness(stage: Stage, peer: Peer) -> dict[str, float]:
    instance = stage.instance(peer)
    alone = _lines(stage, instance, 2)
    begun = time.monotonic()
    options = ("-kind", "down", "-bytes", str(64 << 20), "-repeat", "0")
    download = stage.begin_client(instance, "transfer", *options)
    try:
        beside = _lines(stage, instance, 2)
    finally:
        result = stage.finish_client(download)
    instance.empty_log()
    return {
        "alone": alone["p99"],
        "beside": beside["p99"],
        "times": beside["p99"] / alone["p99"],
        "download": result["done"] * (64 << 20) / GIB / (time.monotonic() - begun),
    }


_CPU_REQUEST = Column("cpu", "CPU µs/request")
_CPU_GIB = Column("cpu", "CPU s/GiB")
_WALL = Column("wall", "wall s/GiB")
_RATE = Column("rate", "requests/s")

_SMALL_GOALS = (
    Goal("cpu", 0.5, ("go", "caddy", "traefik")),
    Goal("cpu", 0.9, ("go-pooled",)),
    Goal("cpu", 1.0, ("envoy",)),
    Goal("rate", 1.0, ("envoy",), at_least=True),
)
_BULK_GOALS = (
    Goal("cpu", 1.0, ("haproxy",)),
    Goal("cpu", 0.5, ("envoy", "go", "go-pooled", "caddy", "nginx")),
    Goal("wall", 1.0, (BEST,)),
)


def _small_figure(connections: int) -> Figure:
    return Figure(
        f"small-{connections}",
        f"GET 1 KiB, keep-alive, {connections} connections",
        (_CPU_REQUEST, _RATE, Column("p99", "p99 µs")),
        _SMALL_GOALS,
        functools.partial(_small, connections=connections),
    )


def _bulk_figure(name: str, title: str, kind: str, goals: tuple[Goal, ...], secure: bool = False) -> Figure:
    run = functools.partial(_transfer, kind=kind, secure=secure)
    return Figure(name, title, (_CPU_GIB, _WALL), goals, run)


def all_figures(scale: Scale) -> dict[str, Figure]:
    """Give every figure by name, in the order of the tables; the growth figures have a column per step."""
    chunked = (Goal("cpu", 0.7, (BEST,)),)
    secure = (Goal("cpu", 1.0, (BEST,)),)
    length = "Content-Length"
    figures = (
        _small_figure(16),
        _small_figure(64),
        Figure(
            "close",
            "GET 1 KiB, a connection per request, 16 at a time",
            (_CPU_REQUEST, _RATE, Column("p99", "p99 µs")),
            (Goal("cpu", 0.9, ("envoy", "go-pooled")),),
            functools.partial(_small, connections=16, close=True),
        ),
        _bulk_figure("bulk-down", f"Download, {length}", "down", _BULK_GOALS),
        _bulk_figure("bulk-up", f"Upload, {length}", "up", _BULK_GOALS),
        _bulk_figure("tunnel-down", "Upgraded connection, download", "tunnel-down", _BULK_GOALS),
        _bulk_figure("tunnel-up", "Upgraded connection, upload", "tunnel-up", _BULK_GOALS),
        _bulk_figure("chunked-down", "Download, chunks of 32 KiB", "chunked-down", chunked),
        _bulk_figure("chunked-up", "Upload, chunks of 32 KiB", "chunked-up", chunked),
        _bulk_figure("tls-down", f"Download, {length}, TLS towards the client", "down", secure, True),
        _bulk_figure("tls-up", f"Upload, {length}, TLS towards the client", "up", secure, True),
        _bulk_figure("tls-chunked-down", "Download, chunked, TLS towards the client", "chunked-down", secure, True),
        _bulk_figure("tls-chunked-up", "Upload, chunked, TLS towards the client", "chunked-up", secure, True),
        Figure(
            "trickle",
            "A line of 100 bytes every 5 ms, 4 streams: delay added to direct",
            (Column("p50", "p50 µs", added=True), Column("p99", "p99 µs", added=True)),
            (Goal("p50", 1.0, ("nginx",)), Goal("p99", 1.0, ("nginx",))),
            _trickle,
        ),
        Figure(
            "pingpong",
            "Upgraded connection, one byte there and back",
            (Column("p50", "p50 µs"), Column("p99", "p99 µs"), Column("cpu", "CPU µs/turn")),
            (Goal("p50", 1.0, ("go",)),),
            _ping_pong,
        ),
        Figure(
            "slow",
            "Slow streams at once: a line every 500 ms each",
            (
                Column("memory", "KiB/stream"),
                Column("cpu", "CPU ms/stream"),
                Column("complete", "complete"),
                Column("p99", "p99 ms"),
            ),
            (Goal("memory", 1.0, ("go",)), Goal("cpu", 1.0, ("go",))),
            _slow,
            note="Memory is the growth of the proportional set size of all processes once every stream has begun.",
        ),
        Figure(
            "storm",
            "1,000 clients a second reset in mid-stream, beside others that ask 2,000 times a second",
            (
                Column("fall", "others' rate falls %"),
                Column("recorded", "aborts on record"),
                Column("p99_alone", "others' p99 ms alone"),
                Column("p99", "in the storm"),
                Column("cpu", "CPU s"),
            ),
            (Goal("fall", 10.0), Goal("recorded", float(scale.storm_clients), at_least=True)),
            _storm,
            note="On record: lines of any kind in the access log that name the request; of ours only request.abort "
            "with side client, phase response_body, cause reset.",
        ),
        Figure(
            "growth-connections",
            "GET 1 KiB: CPU µs per request by connections",
            (
                *(Column(f"cpu_{number}", f"{number:,}") for number in scale.connections),
                Column("growth", "last ÷ first", derive=lambda steps: steps[-1] / steps[0]),
                Column("least", "last ÷ least", derive=lambda steps: steps[-1] / min(steps)),
            ),
            (Goal("growth", 1.0, ("nginx", "envoy")), Goal("least", 1.0, ("nginx", "envoy"))),
            _growth_connections,
            direct=False,
        ),
        Figure(
            "growth-sizes",
            "Download: CPU s per GiB by size of the body",
            (
                *(Column(f"cpu_{size}", f"{size:,} MiB") for size in scale.sizes_mib),
                Column("growth", "most ÷ least", derive=lambda steps: max(steps) / min(steps)),
            ),
            (Goal("growth", 1.25),),
            _growth_sizes,
            direct=False,
        ),
        Figure(
            "fairness",
            "p99 of a trickle alone and beside a download at line rate",
            (
                Column("alone", "alone µs"),
                Column("beside", "beside µs"),
                Column("times", "times"),
                Column("download", "download GiB/s"),
            ),
            (Goal("times", 3.0),),
            _fairness,
        ),
    )
    return {figure.name: figure for figure in figures}
