"""Which options there are, and the value of each with the place where it was set.

One table, ``OPTIONS``, is behind flags, environment, file, help and documents. Flag beats environment beats file beats default. Whatever is
wrong (an unknown option, a bad value, a file that can't be read) is a ``ConfigError`` of one line with name, value, source and mend.
Files that other options name are not opened here: ``tls`` and ``cli`` do that.
"""

import collections.abc
import dataclasses
import difflib
import enum
import ipaddress
import os
import re
import socket
import tomllib
import typing

from .grammar import TOKEN
from .limits import Bound, Limit

ENVIRONMENT_PREFIX = "PROXY_"

# poll(2) and TCP_USER_TIMEOUT count milliseconds in an int: 24.8 days. More would wrap, or be no limit at all.
LONGEST_S = 2_147_483
# TCP_USER_TIMEOUT takes whole milliseconds, and 0 would switch it off.
SHORTEST_S = 0.001
# sun_path holds 108 octets, the last of which is NUL (unix(7)).
_LONGEST_UNIX_PATH = 107
# Longer than any value that is meant, and short enough for one line on a screen.
_QUOTED_LENGTH = 120


class ConfigError(Exception):
    """What is wrong with the configuration: one line with option, value, source and how to mend it."""


@dataclasses.dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where to listen. Port 0 lets the kernel choose."""

    host: str  # without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket to listen on."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclasses.dataclass(frozen=True, slots=True)
class UpstreamUrl:
    """The upstream: ``host`` and ``port`` for ``http`` and ``https``, ``path`` of the socket for ``unix``."""

    scheme: str  # "http", "https" or "unix"
    host: str  # without brackets; empty for unix
    port: int  # 0 for unix
    path: str  # empty for http and https

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}" if self.path.startswith("/") else f"unix:{self.path}"
        return f"{self.scheme}://{TcpAddress(self.host, self.port)}"


class Kind(enum.Enum):
    """How the text of a value is read, and what it becomes."""

    LISTEN = enum.auto()  # TcpAddress | UnixAddress
    UPSTREAM = enum.auto()  # UpstreamUrl
    WORKERS = enum.auto()  # int
    NUMBER = enum.auto()  # Bound
    SIZE = enum.auto()  # Bound
    SIZE_OR_NONE = enum.auto()  # Bound | None
    LIMIT = enum.auto()  # Limit | None
    SECONDS = enum.auto()  # float, 0 included
    CHOICE = enum.auto()  # str, one of Option.choices
    NAME = enum.auto()  # str, a token
    LOG_FILE = enum.auto()  # str, "-" is stderr
    PATH = enum.auto()  # str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option. ``default`` is spelled as a user would spell it, and read the same way."""

    name: str  # "client_write_timeout"; its other spellings derive from it
    kind: Kind
    default: str
    metavar: str
    help: str
    group: str
    choices: tuple[str, ...] = ()
    shown_default: str = ""  # where the words of ``default`` would not explain it
    least: int = 1  # for NUMBER and SIZE
    most: int = 2**63 - 1

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The spelling in the environment."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def described_default(self) -> str:
        """The default, in words where they say more."""
        return self.shown_default or self.default


_GENERAL = "General"
_TIMEOUTS = "Timeouts and deadlines"
_TLS = "TLS"

# A head is kept whole in memory for each connection, hence the most; less than the least would refuse every real client.
_LEAST_HEAD = 1024
_MOST_HEAD = 16 * 1024 * 1024

# Every option there is, in the order of help, `check` and documents.
OPTIONS: tuple[Option, ...] = (
    Option(
        "listen",
        Kind.LISTEN,
        "127.0.0.1:8080",
        "HOST:PORT|unix:PATH",
        "where clients connect; port 0 picks a free port and server.start says which",
        _GENERAL,
    ),
    Option(
        "upstream",
        Kind.UPSTREAM,
        "unix:///var/run/docker.sock",
        "URL",
        "http://host:port, https://host:port or unix:///path/docker.sock; no path on the server",
        _GENERAL,
    ),
    Option(
        "workers",
        Kind.WORKERS,
        "auto",
        "N|auto",
        "processes that share the port; auto is one for each core",
        _GENERAL,
        shown_default="auto (cores)",
    ),
    Option(
        "max_connections",
        Kind.NUMBER,
        "4096",
        "N",
        "client connections held at once, all workers together",
        _GENERAL,
        most=10_000_000,
    ),
    Option(
        "max_head_size",
        Kind.SIZE,
        "64KiB",
        "BYTES",
        "largest head of a request (431 if larger) or of a response",
        _GENERAL,
        least=_LEAST_HEAD,
        most=_MOST_HEAD,
    ),
    Option("max_body_size", Kind.SIZE_OR_NONE, "none", "BYTES", "largest request body (413 if larger)", _GENERAL),
    Option(
        "client_half_close",
        Kind.CHOICE,
        "abort",
        "abort|allow",
        "what a FIN from the client means while its response is pending",
        _GENERAL,
        choices=("abort", "allow"),
    ),
    Option(
        "proxy_name",
        Kind.NAME,
        "",
        "NAME",
        "names this deployment in Via and Proxy-Status",
        _GENERAL,
        shown_default="host name",
    ),
    Option(
        "log_file",
        Kind.LOG_FILE,
        "-",
        "PATH",
        "where the JSON lines go (- is stderr); reopened on SIGHUP and SIGUSR1",
        _GENERAL,
    ),
    Option(
        "log_level",
        Kind.CHOICE,
        "info",
        "LEVEL",
        "lowest level written: debug, info, warning or error",
        _GENERAL,
        choices=("debug", "info", "warning", "error"),
    ),
    Option("log_schema", Kind.CHOICE, "native", "native", "field names of the log", _GENERAL, choices=("native",)),
    Option(
        "config",
        Kind.PATH,
        "none",
        "FILE",
        "TOML file with these options, their names with _ in place of -",
        _GENERAL,
    ),
    Option(
        "drain_timeout",
        Kind.SECONDS,
        "30",
        "S",
        "on SIGTERM, how long requests in flight, tunnels and /events may still take; 0 is not at all; a second SIGTERM ends now",
        _GENERAL,
    ),
    Option(
        "client_head_timeout",
        Kind.LIMIT,
        "10",
        "S",
        "TLS handshake and request head, from its first byte to its last",
        _TIMEOUTS,
    ),
    Option(
        "keepalive_timeout",
        Kind.LIMIT,
        "75",
        "S",
        "client idle before the first byte of a request; its end is never an error",
        _TIMEOUTS,
    ),
    Option("client_read_timeout", Kind.LIMIT, "none", "S", "no progress reading the request body", _TIMEOUTS),
    Option(
        "client_read_deadline",
        Kind.LIMIT,
        "none",
        "S",
        "the whole request, from the first byte of its head",
        _TIMEOUTS,
    ),
    Option("client_write_timeout", Kind.LIMIT, "none", "S", "no progress writing the response to the client", _TIMEOUTS),
    Option(
        "client_write_deadline",
        Kind.LIMIT,
        "none",
        "S",
        "the whole response, from the end of the request head (as Go's WriteTimeout)",
        _TIMEOUTS,
    ),
    Option(
        "upstream_connect_timeout",
        Kind.LIMIT,
        "10",
        "S",
        "reaching upstream: name lookup, TCP connect, TLS handshake",
        _TIMEOUTS,
    ),
    Option(
        "upstream_write_timeout",
        Kind.LIMIT,
        "none",
        "S",
        "no progress writing the request to upstream",
        _TIMEOUTS,
    ),
    Option(
        "upstream_write_deadline",
        Kind.LIMIT,
        "none",
        "S",
        "writing the whole request to upstream, from connected",
        _TIMEOUTS,
    ),
    Option(
        "upstream_head_timeout",
        Kind.LIMIT,
        "none",
        "S",
        "from the request sent to the response head complete",
        _TIMEOUTS,
    ),
    Option("upstream_read_timeout", Kind.LIMIT, "none", "S", "no progress reading the response body", _TIMEOUTS),
    Option(
        "upstream_read_deadline",
        Kind.LIMIT,
        "none",
        "S",
        "the whole response body, from the end of its head",
        _TIMEOUTS,
    ),
    Option(
        "tunnel_timeout",
        Kind.LIMIT,
        "none",
        "S",
        "no byte in either direction of an upgraded connection",
        _TIMEOUTS,
    ),
    Option(
        "peer_dead_timeout",
        Kind.LIMIT,
        "60",
        "S",
        "the peer's kernel has answered nothing at all: data in flight or probes unacknowledged",
        _TIMEOUTS,
    ),
    Option(
        "tcp_user_timeout",
        Kind.LIMIT,
        "none",
        "S",
        "the kernel's TCP_USER_TIMEOUT; also ends a reader that is merely paused",
        _TIMEOUTS,
    ),
    Option("tls_cert", Kind.PATH, "none", "FILE", "serve HTTPS with this certificate chain (PEM)", _TLS),
    Option(
        "tls_key",
        Kind.PATH,
        "none",
        "FILE",
        "its key (PEM)",
        _TLS,
        shown_default="none (the key is in --tls-cert)",
    ),
    Option("tls_client_ca", Kind.PATH, "none", "FILE", "require a client certificate of this CA (PEM)", _TLS),
    Option(
        "upstream_ca",
        Kind.PATH,
        "none",
        "FILE|system",
        "CAs an https:// upstream may have its certificate from (PEM); system is the OS store",
        _TLS,
        shown_default="none (certifi's bundle)",
    ),
    Option("upstream_cert", Kind.PATH, "none", "FILE", "client certificate for an https:// upstream (PEM)", _TLS),
    Option(
        "upstream_key",
        Kind.PATH,
        "none",
        "FILE",
        "its key (PEM)",
        _TLS,
        shown_default="none (the key is in --upstream-cert)",
    ),
)

_BY_NAME = {option.name: option for option in OPTIONS}
# Named in the documents of this version as still to come: an error that says so is kinder than "unknown".
_NOT_YET = frozenset(
    (
        "auth_file",
        "allow",
        "rate_limit",
        "max_inflight_per_client",
        "proxy_protocol",
        "admin",
        "upstream_wait",
        "spawn",
        "exit_when_idle",
    )
)
_LATER_CHOICES = {"log_schema": ("ecs", "otel")}


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The effective value of every option. Built once and shared by all threads.

    A time limit or a bound that is off is None. ``sources`` says for each option where its value was set.
    """

    listen: TcpAddress | UnixAddress
    upstream: UpstreamUrl
    workers: int
    max_connections: Bound
    max_head_size: Bound
    max_body_size: Bound | None
    client_half_close: str  # "abort" or "allow"
    proxy_name: str
    log_file: str  # "-" is stderr
    log_level: str
    log_schema: str
    config: str | None
    drain_timeout: float  # seconds; 0 waits for nothing
    client_head_timeout: Limit | None
    keepalive_timeout: Limit | None
    client_read_timeout: Limit | None
    client_read_deadline: Limit | None
    client_write_timeout: Limit | None
    client_write_deadline: Limit | None
    upstream_connect_timeout: Limit | None
    upstream_write_timeout: Limit | None
    upstream_write_deadline: Limit | None
    upstream_head_timeout: Limit | None
    upstream_read_timeout: Limit | None
    upstream_read_deadline: Limit | None
    tunnel_timeout: Limit | None
    peer_dead_timeout: Limit | None
    tcp_user_timeout: Limit | None
    tls_cert: str | None
    tls_key: str | None  # None: in tls_cert
    tls_client_ca: str | None
    upstream_ca: str | None  # None: certifi's; "system": the OS store
    upstream_cert: str | None
    upstream_key: str | None  # None: in upstream_cert
    sources: dict[str, str]

    def describe(self) -> dict[str, dict[str, object]]:
        """Returns: for each option ``{"value": ..., "source": ...}``, fit for JSON; seconds and bytes are numbers, off is None."""
        described: dict[str, dict[str, object]] = {}
        for option in OPTIONS:
            value: object = getattr(self, option.name)
            match value:
                case Limit():
                    value = value.seconds
                case Bound():
                    value = value.value
                case TcpAddress() | UnixAddress() | UpstreamUrl():
                    value = str(value)
                case _:
                    pass
            described[option.name] = {"value": value, "source": self.sources[option.name]}
        return described


class _BadValue(ValueError):
    """What is wrong with the text of a value, and the mend; who reads it adds option, value and source."""


def load_settings(
    arguments: collections.abc.Sequence[str], environ: collections.abc.Mapping[str, str]
) -> Settings:
    """Put flags, environment, the file that either names, and defaults together.

    ``arguments`` are flags only, without a command.
    Raises: ConfigError.
    """
    given = _read_environment(environ) | _read_flags(arguments)
    path = None
    if "config" in given:
        text, source = given["config"]
        path = _parse(_BY_NAME["config"], text, source)
        if path is not None:
            given = _read_file(path, source) | given
    values: dict[str, typing.Any] = {}
    sources: dict[str, str] = {}
    for option in OPTIONS:
        text, source = given.get(option.name, (option.default, "default"))
        values[option.name] = _parse(option, text, source)
        sources[option.name] = source
    settings = Settings(**values, sources=sources)
    _check_together(settings)
    return settings


# -- where values come from; each reader gives name -> (text, source) --------------------------------------------------------------


def _read_flags(arguments: collections.abc.Sequence[str]) -> dict[str, tuple[str, str]]:
    given: dict[str, tuple[str, str]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"unexpected argument {_quoted(argument)}: options are --name VALUE or --name=VALUE, and a command comes first"
            )
        flag, equals, text = argument.partition("=")
        name = flag[2:].replace("-", "_")
        option = _BY_NAME.get(name)
        if option is None or "_" in flag:
            raise ConfigError(_unknown(f"option {_quoted(flag)}", name, [known.flag for known in OPTIONS], flag.replace("_", "-")))
        if not equals:
            # A value may begin with one hyphen (--log-file -), but the next option is no value.
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option.flag} (flag): needs a value; write {option.flag} {option.metavar}")
            text = rest.pop(0)
        if name in given:
            raise ConfigError(
                f"{option.flag} (flag): given twice, {_shown(option, given[name][0])} and {_shown(option, text)}; keep one of them"
            )
        given[name] = (text, "flag")
    return given


def _read_environment(environ: collections.abc.Mapping[str, str]) -> dict[str, tuple[str, str]]:
    given: dict[str, tuple[str, str]] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        option = _BY_NAME.get(name)
        if option is not None and variable == option.variable:
            given[name] = (text, f"env:{variable}")
        elif _looks_like_option(name):
            known = [candidate.variable for candidate in OPTIONS]
            raise ConfigError(_unknown(f"environment variable {_quoted(variable)}", name, known, variable.upper()))
    return given


def ignored_variables(environ: collections.abc.Mapping[str, str]) -> list[str]:
    """Returns: the variables that begin with ``PROXY_`` and are taken for somebody else's.

    The prefix is not ours alone: Kubernetes sets ``PROXY_PORT`` for a service named "proxy", and other programs read ``PROXY_USER``.
    """
    ours = {option.variable for option in OPTIONS}
    return sorted(variable for variable in environ if variable.startswith(ENVIRONMENT_PREFIX) and variable not in ours)


def _looks_like_option(name: str) -> bool:
    """Whether an unknown variable must be meant for this program: a known name but for a few letters, or two words of option names."""
    if name in _BY_NAME or name in _NOT_YET or difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.8):
        return True
    words = name.split("_")
    return len(words) > 1 and all(word in _OPTION_WORDS for word in words)


_OPTION_WORDS = frozenset(word for option in OPTIONS for word in option.name.split("_"))


def _read_file(path: str, source: str) -> dict[str, tuple[str, str]]:
    where = f"config {_quoted(path)} ({source})"
    try:
        with open(path, "rb") as file:
            octets = file.read()
    except OSError as error:
        raise ConfigError(f"{where}: can't be read: {error.strerror}; check the path and its permissions") from error
    try:
        text = octets.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = octets[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}: line {line} is not UTF-8; save the file as UTF-8") from error
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # TOMLDecodeError says line and column; it is a ValueError, as is what int() says of a number with thousands of digits.
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f'{where}: is not TOML: {problem[:200]}; write lines such as name = "value"') from error
    lines = _key_lines(text)
    given: dict[str, tuple[str, str]] = {}
    for name, value in table.items():
        place = f"file:{path}:{lines[name]}"
        option = _BY_NAME.get(name)
        if option is None:
            if isinstance(value, dict):
                raise ConfigError(f"{_quoted(name)} ({place}): is a table, and options stand at the top level; remove the [{_cut(name)}]")
            raise ConfigError(_unknown(f"option {_quoted(name)} ({place})", name.replace("-", "_"), list(_BY_NAME), name))
        if name == "config":
            raise ConfigError(f"config {_shown(option, str(value))} ({place}): can't be set in the file itself; use the flag or {option.variable}")
        given[name] = (_text_of(option, value, place), place)
    return given


def _text_of(option: Option, value: object, source: str) -> str:
    """Returns: a TOML value as the text a flag would have."""
    match option.kind:
        case Kind.WORKERS | Kind.NUMBER | Kind.SIZE | Kind.SIZE_OR_NONE:
            wanted = "a whole number or a string"
            fits = isinstance(value, int | str)
        case Kind.LIMIT | Kind.SECONDS:
            wanted = "a number or a string"
            fits = isinstance(value, int | float | str)
        case Kind.LISTEN | Kind.UPSTREAM | Kind.CHOICE | Kind.NAME | Kind.LOG_FILE | Kind.PATH:
            wanted = "a string"
            fits = isinstance(value, str)
        case _:
            typing.assert_never(option.kind)
    if not fits or isinstance(value, bool):
        kind = _TOML_TYPES.get(type(value), "a date or time")
        raise ConfigError(f"{option.name} {_quoted(value)} ({source}): is {kind}, and must be {wanted}; {_example(option)}")
    # 1e-3 or 1e300: the fixed-point form is what the parsers of text read.
    return f"{value:f}" if isinstance(value, float) and abs(value) < LONGEST_S * 10 else str(value)


_TOML_TYPES: dict[type, str] = {
    bool: "a truth value",
    int: "a whole number",
    float: "a number with a fraction",
    str: "a string",
    list: "an array",
    dict: "a table",
}


def _key_lines(text: str) -> dict[str, int]:
    """Find the line on which each top-level key of a valid TOML document stands, since tomllib does not tell.

    A statement of TOML ends with its line unless a string or array in it is still open. So the shortest run of lines that tomllib
    accepts, from where the last one ended, is one statement: no quoting rule is written down here a second time.
    """
    lines: dict[str, int] = {}
    pending = ""
    first = 1
    for number, line in enumerate(text.split("\n"), start=1):
        pending += line + "\n"
        try:
            statement = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        for name in statement:
            lines.setdefault(name, first)
        if line.lstrip(" \t").startswith("[") and pending == line + "\n":
            return lines | {name: lines.get(name, found) for name, found in _table_lines(text, number).items()}
        pending = ""
        first = number + 1
    return lines
