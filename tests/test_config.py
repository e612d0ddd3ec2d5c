"""Options: where values come from, which of them wins, and that every refusal says what, where and how to mend it."""

import concurrent.futures
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import socket
import ssl
import subprocess
import sys
import tomllib
import types
import typing

import hypothesis
import hypothesis.strategies
import pytest

import proxy.config
from harness import ROOT
from proxy.config import OPTIONS, ConfigError, Kind, Settings, TcpAddress, UnixAddress, UpstreamUrl, load_settings
from proxy.limits import Bound, Limit
from proxy.tls import read_contexts


def _error(arguments: list[str], environ: dict[str, str] | None = None) -> str:
    """Returns: the text of the refusal, which must be one line that a person can act on."""
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments, environ or {})
    text = str(caught.value)
    assert text.isprintable(), text
    assert len(text) < 500, text
    assert re.search(r"; \S|: options are ", text), f"no mend in: {text}"
    return text


def _file(tmp_path: pathlib.Path, text: str) -> str:
    path = tmp_path / "proxy.toml"
    path.write_bytes(text.encode("utf-8"))
    return str(path)


# -- the table -------------------------------------------------------------------------------------------------------


def test_every_option_is_a_field_of_settings_and_every_field_an_option() -> None:
    fields = [field.name for field in dataclasses.fields(Settings)]
    assert fields == [option.name for option in OPTIONS] + ["sources"]


def test_defaults_are_those_of_the_contract() -> None:
    described = load_settings([], {}).describe()
    assert {entry["source"] for entry in described.values()} == {"default"}
    assert {name: entry["value"] for name, entry in described.items()} == {
        "listen": "127.0.0.1:8080",
        "upstream": "unix:///var/run/docker.sock",
        "workers": len(os.sched_getaffinity(0)),
        "max_connections": 4096,
        "max_head_size": 65536,
        "max_body_size": None,
        "client_half_close": "abort",
        "proxy_name": re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname()),
        "log_file": "-",
        "log_level": "info",
        "log_schema": "native",
        "config": None,
        "drain_timeout": 30.0,
        "client_head_timeout": 10.0,
        "keepalive_timeout": 75.0,
        "client_read_timeout": None,
        "client_read_deadline": None,
        "client_write_timeout": None,
        "client_write_deadline": None,
        "upstream_connect_timeout": 10.0,
        "upstream_write_timeout": None,
        "upstream_write_deadline": None,
        "upstream_head_timeout": None,
        "upstream_read_timeout": None,
        "upstream_read_deadline": None,
        "tunnel_timeout": None,
        "peer_dead_timeout": 60.0,
        "tcp_user_timeout": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_client_ca": None,
        "upstream_ca": None,
        "upstream_cert": None,
        "upstream_key": None,
    }


def test_a_described_default_is_never_empty() -> None:
    described = {option.name: option.described_default for option in OPTIONS}
    assert all(described.values())
    assert (described["proxy_name"], described["log_file"]) == ("host name", "-")


# For each kind of option: a value, and what it becomes.
SAMPLES: dict[Kind, tuple[str, object]] = {
    Kind.LISTEN: ("[::1]:0", TcpAddress("::1", 0)),
    Kind.UPSTREAM: ("https://docker.example:2376", UpstreamUrl("https", "docker.example", 2376, "")),
    Kind.WORKERS: ("3", 3),
    Kind.NUMBER: ("17", 17),
    Kind.SIZE: ("8KiB", 8192),
    Kind.SIZE_OR_NONE: ("1 GiB", 2**30),
    Kind.LIMIT: ("2.5", 2.5),
    Kind.SECONDS: ("0.25", 0.25),
    Kind.CHOICE: ("", ""),
    Kind.NAME: ("edge-1", "edge-1"),
    Kind.LOG_FILE: ("/var/log/proxy.log", "/var/log/proxy.log"),
    Kind.PATH: ("some.pem", "some.pem"),
}
# What an option needs beside itself.
COMPANIONS = {
    "tls_key": ["--tls-cert", "c.pem"],
    "tls_client_ca": ["--tls-cert", "c.pem"],
    "upstream_ca": ["--upstream", "https://h"],
    "upstream_cert": ["--upstream", "https://h"],
    "upstream_key": ["--upstream", "https://h", "--upstream-cert", "c.pem"],
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.name != "config"], ids=lambda o: o.name)
@pytest.mark.parametrize("way", ["flag", "flag=", "env", "file"])
def test_every_option_can_be_set_in_every_way(option: proxy.config.Option, way: str, tmp_path: pathlib.Path) -> None:
    text, expected = SAMPLES[option.kind]
    if option.kind is Kind.CHOICE:
        text = expected = option.choices[-1]
    arguments, environ, source = COMPANIONS.get(option.name, []), {}, "flag"
    match way:
        case "flag":
            arguments = [*arguments, option.flag, text]
        case "flag=":
            arguments = [*arguments, f"{option.flag}={text}"]
        case "env":
            environ = {option.variable: text}
            source = f"env:{option.variable}"
        case "file":
            path = _file(tmp_path, f"# one\n\n{option.name} = {json.dumps(text)}\n")
            arguments = [*arguments, "--config", path]
            source = f"file:{path}:3"
    settings = load_settings(arguments, environ)
    value = getattr(settings, option.name)
    assert settings.sources[option.name] == source
    if isinstance(value, Limit | Bound):
        assert value.name == option.name
        assert value.source == source
        value = value.seconds if isinstance(value, Limit) else value.value
    assert value == expected
    json.dumps(settings.describe())


@pytest.mark.parametrize("arguments", [[], ["--max-body-size", "1", "--tcp-user-timeout", "1", "--tls-cert", "x"]])
def test_values_have_the_types_that_settings_declare(arguments: list[str]) -> None:
    settings = load_settings(arguments, {})
    for name, declared in typing.get_type_hints(Settings).items():
        if name == "sources":
            continue
        allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        assert type(getattr(settings, name)) in allowed, name


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_settings([], {}).workers = 2  # type: ignore[misc]  # the point of the test


# -- which source wins -----------------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_file_beats_default(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, "client_write_timeout = 1\nclient_read_timeout = 1\nkeepalive_timeout = 1\n")
    environ = {"PROXY_CONFIG": path, "PROXY_CLIENT_WRITE_TIMEOUT": "2", "PROXY_CLIENT_READ_TIMEOUT": "2"}
    settings = load_settings(["--client-write-timeout=3"], environ)
    assert settings.client_write_timeout == Limit("client_write_timeout", 3.0, "flag")
    assert settings.client_read_timeout == Limit("client_read_timeout", 2.0, "env:PROXY_CLIENT_READ_TIMEOUT")
    assert settings.keepalive_timeout == Limit("keepalive_timeout", 1.0, f"file:{path}:3")
    assert settings.client_head_timeout == Limit("client_head_timeout", 10.0, "default")
    assert settings.config == path
    assert settings.sources["config"] == "env:PROXY_CONFIG"


def test_a_flag_names_another_file_than_the_environment(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, "workers = 7\n")
    settings = load_settings(["--config", path], {"PROXY_CONFIG": "/does/not/exist"})
    assert settings.workers == 7
    assert load_settings(["--config", "none"], {"PROXY_CONFIG": "/does/not/exist"}).config is None


def test_none_from_a_stronger_source_switches_off_what_a_weaker_one_set(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, 'client_write_deadline = 10\nmax_body_size = "1MiB"\ntls_cert = "c.pem"\n')
    arguments = ["--client-write-deadline=none", "--max-body-size=none", "--tls-cert=none", "--config", path]
    settings = load_settings(arguments, {})
    assert settings.client_write_deadline is None
    assert settings.max_body_size is None
    assert settings.tls_cert is None
    assert settings.sources["client_write_deadline"] == "flag"


# -- the line of a key -----------------------------------------------------------------------------------------------

AWKWARD_FILE = '''\
# workers = 1

proxy_name = """\\
edge\\
\\
-one"""
  "log_level"   =   'debug'   # keepalive_timeout = 3
log_file = """a
workers = 2
[tls]
keepalive_timeout = 4
"""
tls_cert = \'\'\'
tls_key = "not here"
c.pem\'\'\'
'tls_key' = "[k] # = \\"\\"\\" .pem"
workers = 5\r
keepalive_timeout = 6.5'''


def test_the_line_of_a_key_is_true_in_an_awkward_file(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, AWKWARD_FILE)
    settings = load_settings(["--config", path], {})
    lines = {
        name: int(source.rpartition(":")[2]) for name, source in settings.sources.items() if source.startswith("file:")
    }
    assert lines == {
        "proxy_name": 3,
        "log_level": 7,
        "log_file": 8,
        "tls_cert": 13,
        "tls_key": 16,
        "workers": 17,
        "keepalive_timeout": 18,
    }
    assert settings.proxy_name == "edge-one"
    assert settings.tls_key == '[k] # = """ .pem'


def test_the_line_of_an_unknown_table_and_of_an_array_is_true(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, 'workers = 2\nx = [\n["a"],\n]\n[limits]\nlisten = "a"\n[limits.more]\n[[other]]\n')
    assert f"'x' [['a']] (file:{path}:2): unknown" in _error(["--config", path])
    path = _file(tmp_path, 'workers = 2\n [limits] # c\nlisten = [\n["a"],\n]\n[limits.more]\n')
    assert f"'limits' (file:{path}:2): is a table" in _error(["--config", path])
    path = _file(tmp_path, "listen.host = 1\n")
    assert f"listen {{'host': 1}} (file:{path}:1): is a table" in _error(["--config", path])


_KEYS = hypothesis.strategies.lists(
    hypothesis.strategies.text("abAB-_0 .[#='é", min_size=1, max_size=5), unique=True, min_size=1, max_size=6
)
_VALUES = hypothesis.strategies.sampled_from(
    [
        "1",
        "-0.5e3",
        "true",
        '"x # y"',
        "'[z]'",
        '"""\n[a]\nb = 1\n"""',
        "'''\n'' \"\"\"\n'''",
        '""""quoted" \\\n   end"""""',
        "[\n1, # one ]\n[2],\n]",
        "{a = 1, b = ['''\n]''']}",
        "1979-05-27 07:32:00",
    ]
)
_GAPS = hypothesis.strategies.sampled_from(["", "\n", "  # comment = 1\n", "\t\n# [x]\n"])


@hypothesis.given(_KEYS, hypothesis.strategies.data())
def test_the_line_of_a_key_is_true_in_any_file(keys: list[str], data: hypothesis.strategies.DataObject) -> None:
    text, expected = "", {}
    for key in keys:
        text += data.draw(_GAPS)
        expected[key] = text.count("\n") + 1
        text += f"{json.dumps(key, ensure_ascii=False)} = {data.draw(_VALUES)}{data.draw(_GAPS) or chr(10)}"
    text = text if data.draw(hypothesis.strategies.booleans()) else text.replace("\n", "\r\n")
    assert set(tomllib.loads(text)) == set(keys)
    assert proxy.config._key_lines(text, "here") == expected


# -- files that are refused ------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "missing.toml"
    assert f"config '{missing}' (flag): can't be read: No such file or directory; " in _error(
        ["--config", str(missing)]
    )
    assert "(env:PROXY_CONFIG): can't be read: Is a directory; " in _error([], {"PROXY_CONFIG": str(tmp_path)})


def test_a_file_that_is_not_utf_8(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_bytes(b'workers = 1\nproxy_name = "\xff"\n')
    assert "line 2 is not UTF-8" in _error(["--config", str(path)])


def test_a_file_without_an_end() -> None:
    assert "config '/dev/zero' (flag): is larger than 262,144 bytes; " in _error(["--config", "/dev/zero"])


@pytest.mark.timeout(20)
def test_a_named_pipe_that_nobody_writes_to_is_an_error_and_no_wait(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert f"config '{path}' (flag): can't be read: a named pipe that nobody writes to; " in _error(
        ["--config", str(path)]
    )


def test_a_pipe_that_holds_it_all() -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb"):
        with open(write_end, "wb") as writer:
            writer.write(b"workers = 3\n")
        assert load_settings(["--config", f"/dev/fd/{read_end}"], {}).workers == 3


@pytest.mark.parametrize(
    "command",
    [
        'mkfifo pipe && { echo workers = 3 >pipe & } && "$@" --config pipe',
        'echo workers = 3 | "$@" --config /dev/stdin',
        '"$@" --config <(echo workers = 3)',
    ],
)
def test_a_file_that_is_a_pipe(command: str, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "proxy", "check", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["settings"]["workers"]["value"] == 3


def test_whoever_writes_to_a_pipe_may_take_his_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a program that decrypts the file, and asks for a password first."""
    monkeypatch.setattr(proxy.config, "_PIPE_PATIENCE_MS", 1)
    read_end, write_end = os.pipe()
    with (
        open(read_end, "rb"),
        concurrent.futures.ThreadPoolExecutor() as executor,
        open(write_end, "wb", buffering=0) as writer,
    ):
        loading = executor.submit(load_settings, ["--config", f"/dev/fd/{read_end}"], {})
        with pytest.raises(TimeoutError):
            loading.result(0.2)
        writer.write(b"workers = 3\n")
        writer.close()
        assert loading.result(5).workers == 3


def test_a_byte_order_mark_is_no_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_bytes(b"\xef\xbb\xbfworkers = 3\n")
    assert load_settings(["--config", str(path)], {}).workers == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("workers = ", "(at end of document)"),
        ("a = 1\nworkers 3\n", "(at line 2, column 9)"),
        ("workers = 1\nworkers = 2\n", "Cannot overwrite a value"),
        ("x = " + "[" * 3000, "is not TOML"),
        ("listen = '''\n", "is not TOML"),
    ],
)
def test_a_file_that_is_not_toml(text: str, problem: str, tmp_path: pathlib.Path) -> None:
    error = _error(["--config", _file(tmp_path, text)])
    assert "is not TOML" in error
    assert problem in error


@pytest.mark.parametrize(
    "text", ["workers = " + "9" * 5000, "workers = 0x" + "f" * 5000, "listen = [0x" + "f" * 5000 + "]"]
)
def test_a_number_of_thousands_of_digits(text: str, tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, text)
    assert _error(["--config", path]) == (
        f"config {path!r} (flag): holds a number of thousands of digits; write a shorter one"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("client_write_timeot = 5", "'client_write_timeot' 5 ({}:1): unknown; did you mean client_write_timeout?"),
        ("client-write-timeout = 5", "'client-write-timeout' 5 ({}:1): unknown; did you mean client_write_timeout?"),
        ("'' = 5", "'' 5 ({}:1): unknown; --help lists"),
        ("admin = 'x'", "'admin' 'x' ({}:1): is not available in this version"),
        ("config = 'x'", "config 'x' ({}:1): can't be set in the file itself"),
        ("config = 5", "config 5 ({}:1): can't be set in the file itself"),
        ("workers = true", "workers true ({}:1): is a truth value, and must be a whole number or a string"),
        ("workers = 1.0", "workers 1.0 ({}:1): is a number with a fraction"),
        ("keepalive_timeout = false", "keepalive_timeout false ({}:1): is a truth value, and must be a number"),
        ("keepalive_timeout = [1]", "keepalive_timeout [1] ({}:1): is an array"),
        ("keepalive_timeout = 07:32:00", "({}:1): is a date or time"),
        ("keepalive_timeout = nan", "keepalive_timeout 'nan' ({}:1): is no number of seconds"),
        ("keepalive_timeout = -inf", "keepalive_timeout '-inf' ({}:1): is no number of seconds"),
        ("keepalive_timeout = -3", "keepalive_timeout '-3' ({}:1): must not be negative"),
        ("keepalive_timeout = 1e-9", "keepalive_timeout '0.000000001' ({}:1): is less than a millisecond"),
        ("keepalive_timeout = 1e-400", "({}:1): is less than a millisecond"),
        ("keepalive_timeout = -1e-400", "({}:1): must not be negative"),
        ("keepalive_timeout = 1e300", "({}:1): is more than the kernel can count"),
        ("listen = 8080", "listen 8080 ({}:1): is a whole number, and must be a string; write HOST:PORT"),
        ("tls_cert = 5", "tls_cert 5 ({}:1): is a whole number, and must be a string; write a path"),
        ("max_head_size = -1", "max_head_size '-1' ({}:1): must not be negative"),
        ("proxy_name = 'a\\nb'", "proxy_name 'a\\\\nb' ({}:1): can't stand in Via"),
        ('log_file = ""', "log_file '' ({}:1): is empty; write a path, or - for stderr"),
        ('log_file = "a\\u0000b"', "log_file 'a\\x00b' ({}:1): holds a NUL character"),
    ],
)
def test_what_a_file_may_not_say(text: str, problem: str, tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, text)
    assert problem.format(f"file:{path}") in _error(["--config", path])


def test_a_value_of_thousands_of_lines_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, "workers = 2\nx = [\n" + "1,\n" * 20_000 + "]\n")
    assert "line 2 begins a value of more than 50 lines; no option" in _error(["--config", path])


@pytest.mark.parametrize("zero", ["0.0", "0e5", "-0.0", "0.0e9"])
def test_a_zero_of_any_spelling_switches_a_limit_off(zero: str, tmp_path: pathlib.Path) -> None:
    path = _file(tmp_path, f"keepalive_timeout = {zero}\n")
    if zero.startswith("-"):
        assert "must not be negative" in _error(["--config", path])
    else:
        assert load_settings(["--config", path], {}).keepalive_timeout is None


def test_numbers_of_a_file_may_be_numbers(tmp_path: pathlib.Path) -> None:
    path = _file(
        tmp_path, "keepalive_timeout = 0\nclient_head_timeout = 1.5\nmax_body_size = 0x100\ndrain_timeout = 1e1\n"
    )
    settings = load_settings(["--config", path], {})
    assert settings.keepalive_timeout is None
    assert settings.client_head_timeout == Limit("client_head_timeout", 1.5, f"file:{path}:2")
    assert settings.max_body_size == Bound("max_body_size", 256, f"file:{path}:3")
    assert settings.drain_timeout == 10.0


# -- flags and variables that are refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--lisen", "x"], "option '--lisen' 'x' (flag): unknown; did you mean --listen?"),
        (["--zzz=1"], "option '--zzz' '1' (flag): unknown; --help lists the options"),
        (
            ["--client_write_timeout", "1"],
            "option '--client_write_timeout' '1' (flag): unknown; did you mean --client-write-timeout?",
        ),
        (["--client-write", "1"], "option '--client-write' '1' (flag): unknown; did you mean --client-write"),
        (["--rate-limit", "1"], "option '--rate-limit' '1' (flag): is not available in this version"),
        (["--conf=x"], "option '--conf' 'x' (flag): unknown; did you mean --config?"),
        (["--=x"], "option '--' 'x' (flag): unknown"),
        (["--"], "unexpected argument '--'"),
        (["-l", "x"], "unexpected argument '-l'"),
        (
            ["--workers", "1", "check"],
            "unexpected argument 'check': options are --name VALUE or --name=VALUE, and a command",
        ),
        (["--listen"], "--listen (flag): needs a value; write --listen HOST:PORT|unix:PATH"),
        (["--listen", "--workers", "1"], "--listen (flag): needs a value"),
        (["--listen="], "listen '' (flag): is empty"),
        (["--listen", "a:1", "--listen=b:2"], "--listen (flag): given twice, 'a:1' and 'b:2'; keep one of them"),
        (
            ["--log-level", "loud\n\x1b[31m"],
            "log_level 'loud\\n\\x1b[31m' (flag): is none of its values; write debug or",
        ),
        (["--log-level", "x" * 9999], "xxx... (flag): is none of its values"),
        (["--log-schema", "ecs"], "log_schema 'ecs' (flag): is not available in this version; write native"),
        (["--log-file", "a\udcffb\0"], "log_file 'a\\udcffb\\x00' (flag): holds a NUL character"),
    ],
)
def test_flags_that_are_refused(arguments: list[str], problem: str) -> None:
    assert problem in _error(arguments)


def test_a_value_may_begin_with_a_hyphen() -> None:
    assert load_settings(["--log-file", "-"], {}).log_file == "-"
    assert "client_read_timeout '-1' (flag): must not be negative" in _error(["--client-read-timeout", "-1"])


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("PROXY_CLIENT_WRITE_TIMOUT", "unknown; did you mean PROXY_CLIENT_WRITE_TIMEOUT?"),
        ("PROXY_LISTN", "unknown; did you mean PROXY_LISTEN?"),
        ("PROXY_listen", "unknown; did you mean PROXY_LISTEN?"),
        ("PROXY_READ_TIMEOUT", "unknown; did you mean"),
        ("PROXY_UPSTREAM_TIMEOUT", "unknown; did you mean"),
        ("PROXY_ADMIN", "is not available in this version"),
        ("PROXY_RATE_LIMIT", "is not available in this version"),
    ],
)
def test_a_variable_that_must_be_meant_for_the_proxy_is_no_silent_loss(variable: str, problem: str) -> None:
    assert f"option '{variable}' '1' (environment): {problem}" in _error([], {variable: "1"})


def test_variables_of_others_are_left_alone_and_can_be_listed() -> None:
    environ = {
        "PROXY_PORT": "tcp://10.0.0.1:80",
        "PROXY_PORT_8080_TCP_ADDR": "10.0.0.1",
        "PROXY_SERVICE_HOST": "10.0.0.1",
        "PROXY_USER": "me",
        "PROXY_PASSWORD": "secret",
        "PROXY_": "",
        "HTTP_PROXY": "http://x",
        "PROXYLISTEN": "x",
        "PROXY_WORKERS": "2",
    }
    settings = load_settings([], environ)
    assert settings.workers == 2
    assert sum(source != "default" for source in settings.sources.values()) == 1
    assert proxy.config.ignored_variables(environ) == [
        "PROXY_",
        "PROXY_PASSWORD",
        "PROXY_PORT",
        "PROXY_PORT_8080_TCP_ADDR",
        "PROXY_SERVICE_HOST",
        "PROXY_USER",
    ]


def test_a_bad_value_in_the_environment_names_the_variable() -> None:
    error = _error([], {"PROXY_CLIENT_WRITE_TIMEOUT": "ten"})
    assert error == (
        "client_write_timeout 'ten' (env:PROXY_CLIENT_WRITE_TIMEOUT): is no number of seconds;"
        " write seconds, such as 10 or 0.5, or with a unit (500ms, 10s, 5m, 1h), or none to switch it off"
    )
    assert "workers '' (env:PROXY_WORKERS): is empty; " in _error([], {"PROXY_WORKERS": ""})


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10.0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("007", 7.0),
        ("500ms", 0.5),
        ("10s", 10.0),
        ("10 s", 10.0),
        ("1.5m", 90.0),
        ("2h", 7200.0),
        ("0.001", 0.001),
        ("1ms", 0.001),
        ("2147483", 2147483.0),
        ("0", None),
        ("0.000", None),
        ("0ms", None),
        ("none", None),
        ("None", None),
    ],
)
def test_seconds(text: str, seconds: float | None) -> None:
    limit = load_settings(["--tunnel-timeout", text], {}).tunnel_timeout
    assert limit == (None if seconds is None else Limit("tunnel_timeout", seconds, "flag"))


@pytest.mark.parametrize(
    "text",
    [
        *"-1 -0.5 +1 nan inf -inf infinity 1e3 0x10 1_000 1,5 10d 10S off ٣ ten 0.0005 0.1ms 2147484 600h . s".split(),
        *(" 1", "1 ", "1  s", "0." + "0" * 400 + "1"),
    ],
)
def test_what_is_no_length_of_time(text: str) -> None:
    assert "(flag): " in _error(["--tunnel-timeout", text])
    assert "(flag): " in _error([f"--drain-timeout={text}"])


def test_drain_timeout_is_a_plain_number_and_may_be_nothing() -> None:
    assert load_settings(["--drain-timeout", "0"], {}).drain_timeout == 0.0
    assert "0 waits for nothing" in _error(["--drain-timeout", "none"])


@hypothesis.given(hypothesis.strategies.floats(min_value=0.001, max_value=2_147_483))
def test_seconds_are_not_rounded_on_the_way_from_a_file(seconds: float) -> None:
    text = proxy.config._text_of(next(o for o in OPTIONS if o.name == "tunnel_timeout"), seconds, "file:x:1")
    assert proxy.config._parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        ("2k", 2048),
        ("2K", 2048),
        ("1m", 2**20),
        ("1GIB", 2**30),
        ("5000b", 5000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert load_settings(["--max-body-size", text], {}).max_body_size == Bound("max_body_size", size, "flag")


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5k", "64KB", "1e3", "64 KiB ", "64 ", "k", "1t", "9" * 20, "9999999999g", "off", "٣"]
)
def test_what_is_no_size(text: str) -> None:
    assert "max_body_size " in _error(["--max-body-size", text])


def test_a_head_has_a_least_and_a_largest_size_and_no_off() -> None:
    assert load_settings(["--max-head-size", "1024"], {}).max_head_size.value == 1024
    assert load_settings(["--max-head-size", "16MiB"], {}).max_head_size.value == 2**24
    assert "is less than 1024 bytes" in _error(["--max-head-size", "1023"])
    assert "is more than 16777216 bytes" in _error(["--max-head-size", "17MiB"])
    assert "is no number of bytes" in _error(["--max-head-size", "none"])


def test_numbers() -> None:
    assert load_settings(["--max-connections", "1"], {}).max_connections == Bound("max_connections", 1, "flag")
    assert load_settings(["--workers", "auto"], {}).workers == len(os.sched_getaffinity(0))
    for text in ("0", "-1", "1025", "two", "1.0", "", "AUTO", "1" * 5000):
        assert "workers " in _error(["--workers", text])
    for text in ("0", "none", "99999999999"):
        assert "max_connections " in _error(["--max-connections", text])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", TcpAddress("127.0.0.1", 8080)),
        ("0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("localhost:65535", TcpAddress("localhost", 65535)),
        ("[::]:80", TcpAddress("::", 80)),
        ("[fe80::1%eth0]:80", TcpAddress("fe80::1%eth0", 80)),
        ("my-host.example.:80", TcpAddress("my-host.example.", 80)),
        ("unix:/run/p.sock", UnixAddress("/run/p.sock")),
        ("unix:///run/p.sock", UnixAddress("/run/p.sock")),
        ("unix:p.sock", UnixAddress("p.sock")),
        ("unix:" + "p" * 107, UnixAddress("p" * 107)),
    ],
)
def test_listen(text: str, address: TcpAddress | UnixAddress) -> None:
    settings = load_settings(["--listen", text], {})
    assert settings.listen == address
    assert load_settings(["--listen", str(settings.describe()["listen"]["value"])], {}).listen == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (":8080", "names no address; write 127.0.0.1:8080 for this machine alone, 0.0.0.0:8080 or [::]:8080 for all"),
        ("*:8080", "names no address; write 127.0.0.1:8080"),
        ("8080", "has no host; write 127.0.0.1:8080"),
        ("localhost", "has no port; write localhost:8080"),
        ("[::1]", "has no port; write [::1]:8080"),
        ("::1:8080", "holds an IPv6 address without brackets"),
        ("[::1:8080", "holds an IPv6 address without brackets"),
        ("[::g]:8080", "holds '[::g]', which is no IPv6 address"),
        ("[1.2.3.4]:8080", "which is no IPv6 address"),
        ("256.0.0.1:80", "which is no IPv4 address"),
        ("h:65536", "has the port '65536'; write a port from 0 to 65535"),
        ("h:-1", "has the port '-1'"),
        ("h:٣", "has the port"),
        ("h:", "has the port ''"),
        ("a b:80", "which is no host name"),
        ("a..b:80", "which is no host name"),
        ("-a:80", "which is no host name"),
        ("a." * 126 + "aa:80", "which is too long for a host name"),
        ("a" * 64 + ":80", "which is too long for a host name; DNS takes 253 octets, and 63 between two dots"),
        ("http://h:80", "is a URL; write HOST:PORT"),
        ("/run/p.sock", "has no port; for a unix socket write unix:/run/p.sock"),
        ("unix:", "names no socket"),
        ("unix:/run/", "names no socket"),
        ("unix://run/p.sock", "has a host; write unix:///run/p.sock, with three slashes"),
        ("unix:" + "p" * 108, "is a path of 108 octets, and the kernel takes 107"),
        ("unix:" + "é" * 54, "is a path of 108 octets"),
    ],
)
def test_listen_refused(text: str, problem: str) -> None:
    assert problem in _error(["--listen", text])


@pytest.mark.parametrize(
    ("text", "url", "spelled"),
    [
        ("http://h:8000", UpstreamUrl("http", "h", 8000, ""), "http://h:8000"),
        ("http://h", UpstreamUrl("http", "h", 80, ""), "http://h:80"),
        ("HTTPS://h/", UpstreamUrl("https", "h", 443, ""), "https://h:443"),
        ("https://[::1]", UpstreamUrl("https", "::1", 443, ""), "https://[::1]:443"),
        ("http://[::1]:81/", UpstreamUrl("http", "::1", 81, ""), "http://[::1]:81"),
        ("tcp://10.0.0.7:2375", UpstreamUrl("http", "10.0.0.7", 2375, ""), "http://10.0.0.7:2375"),
        ("tcp://h", UpstreamUrl("http", "h", 2375, ""), "http://h:2375"),
        ("unix:///run/docker.sock", UpstreamUrl("unix", "", 0, "/run/docker.sock"), "unix:///run/docker.sock"),
        ("unix:/run/a@b?c#d", UpstreamUrl("unix", "", 0, "/run/a@b?c#d"), "unix:///run/a@b?c#d"),
        ("unix:d.sock", UpstreamUrl("unix", "", 0, "d.sock"), "unix:d.sock"),
    ],
)
def test_upstream(text: str, url: UpstreamUrl, spelled: str) -> None:
    assert load_settings(["--upstream", text], {}).upstream == url
    assert str(url) == spelled
    assert load_settings(["--upstream", spelled], {}).upstream == url


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("h:2375", "has no scheme; write http://h:2375, or https://"),
        ("/var/run/docker.sock", "has no scheme; write unix:///var/run/docker.sock"),
        ("http:8080", "has no scheme; write http://http:8080"),
        ("http:/h:2375", "lacks two slashes; write http://h:2375"),
        ("HTTPS:h", "lacks two slashes; write https://h"),
        ("tcp:", "lacks two slashes; write tcp://host:port"),
        ("unix:///run/", "names no socket; write unix:/run/NAME.sock"),
        ("ftp://h", "has the scheme ftp; write http://"),
        ("http://", "has no host; write http://"),
        ("http://:80", "has no host; write http://"),
        ("http://h:0", "has the port '0'; write a port from 1"),
        ("http://h:", "has the port ''"),
        ("http://h:99999", "has the port '99999'"),
        ("http://h:80/v1", "has a path; leave it out"),
        ("http://h:80//", "has a path"),
        ("http://h?x", "has a query or fragment"),
        ("http://h/#x", "has a query or fragment"),
        ("http://::1:80", "without brackets"),
        ("http://h." + "a" * 64 + ".example:80", "which is too long for a host name"),
        ("http://h x", "which is no host name"),
        ("http://h\n", "which is no host name"),
        ("http://bücher.example", "which is no host name"),
        ("unix://var/run/docker.sock", "has a host; write unix:///var/run/docker.sock"),
    ],
)
def test_upstream_refused(text: str, problem: str) -> None:
    assert problem in _error(["--upstream", text])


@pytest.mark.parametrize(
    "text", ["http://u:s3cret@h", "http://u:s3/cret@h", "u:s3cret@h:80", "https://s3cret@h/x?y", "s3cret@"]
)
def test_a_password_in_the_upstream_is_refused_and_not_repeated(text: str) -> None:
    error = _error(["--upstream", text])
    assert "holds a user name or password" in error
    assert "s3" not in error
    assert "s3" not in _error(["--upstream", text, "--upstream", "http://h"])


@pytest.mark.parametrize(
    "arguments", [["--upstream", "unix://u:s3cret@h/x"], ["--log-level", "info", "http://u:s3cret@h"]]
)
def test_a_password_in_the_wrong_place_is_not_repeated(arguments: list[str]) -> None:
    assert "s3" not in _error(arguments)


@pytest.mark.parametrize(
    "line",
    ['upstream = ["http://u:s3cret@h"]', 'upstream.url = "http://u:s3cret@h"', 'upstrem = ["http://u:s3cret@h"]'],
)
def test_a_password_of_another_type_in_a_file_is_not_repeated(line: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(line)
    error = _error(["--config", str(path)])
    assert "upstre" in error
    assert "s3" not in error


def test_a_proxy_name_is_a_token() -> None:
    assert load_settings(["--proxy-name", "a!b_c.d~1"], {}).proxy_name == "a!b_c.d~1"
    for text in ("a b", "a,b", "a;b", "é", 'a"', "a\r\nX: y", "(a)", "a" * 256, "a\n"):
        assert "can't stand in Via" in _error(["--proxy-name", text])


def test_the_host_name_becomes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine's own name can't be changed by a test without harm to others.
    for name, token in (("höst name", "h-st-name"), ("", "proxy"), ("vm(1)", "vm-1-")):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert load_settings([], {}).proxy_name == token


# -- options that need others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tls-key", "k"], "tls_key 'k' (flag): has no meaning without --tls-cert; set --tls-cert too"),
        (["--tls-client-ca", "c"], "tls_client_ca 'c' (flag): has no meaning without --tls-cert"),
        (
            ["--upstream", "https://h", "--upstream-key", "k"],
            "upstream_key 'k' (flag): has no meaning without --upstream-cert",
        ),
        (
            ["--upstream-ca", "system"],
            "has no meaning for upstream 'unix:///var/run/docker.sock' (default); set an https://",
        ),
        (["--upstream-cert", "c", "--upstream", "http://h"], "has no meaning for upstream 'http://h:80' (flag)"),
    ],
)
def test_options_that_need_others(arguments: list[str], problem: str) -> None:
    assert problem in _error(arguments)


def test_a_certificate_file_may_hold_its_key() -> None:
    settings = load_settings(["--tls-cert", "both.pem", "--upstream", "https://h", "--upstream-cert", "both.pem"], {})
    assert (settings.tls_cert, settings.tls_key) == ("both.pem", None)
    assert (settings.upstream_cert, settings.upstream_key) == ("both.pem", None)


@pytest.mark.parametrize(
    ("listen", "upstream", "itself"),
    [
        ("127.0.0.1:80", "http://127.0.0.1:80", True),
        ("127.0.0.1:80", "http://127.0.0.1:81", False),
        ("127.0.0.1:80", "http://127.0.0.2:80", False),
        ("127.0.0.1:443", "https://127.0.0.1", True),
        ("0.0.0.0:80", "http://127.0.0.1:80", True),
        ("0.0.0.0:80", "http://[::1]:80", False),
        ("[::]:80", "http://[::1]:80", True),
        ("[::]:80", "http://127.0.0.1:80", True),
        ("localhost:80", "http://LOCALHOST:80", True),
        ("127.0.0.1:80", "http://localhost:80", True),
        ("0.0.0.0:80", "http://localhost:80", True),
        ("[::1]:80", "http://localhost:80", True),
        ("localhost:80", "http://127.0.0.1:80", True),
        ("127.0.0.2:80", "http://localhost:80", False),
        ("unix:{}/a", "unix://{}/a", True),
        ("unix:{}/link", "unix://{}/a", True),
        ("unix:{}/a", "unix://{}/b", False),
        ("unix:{}/a", "http://a:80", False),
        ("127.0.0.1:80", "unix://{}/a", False),
    ],
)
def test_the_proxy_is_not_its_own_upstream(listen: str, upstream: str, itself: bool, tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    arguments = ["--listen", listen.format(tmp_path), "--upstream", upstream.format(tmp_path)]
    if itself:
        assert "(flag): is where the proxy itself listens, listen " in _error(arguments)
    else:
        load_settings(arguments, {})


@pytest.mark.parametrize("text", ["224.0.0.1:80", "255.255.255.255:80", "[ff02::1]:80"])
def test_an_address_nobody_can_connect_to_is_refused(text: str) -> None:
    assert "is an address that nobody can connect to; write 127.0.0.1:80 for" in _error(["--listen", text])


@pytest.mark.parametrize(
    ("text", "seconds"), [("700ms", 0.7), ("1.1m", 66.0), ("0.1s", 0.1), ("3ms", 0.003), ("0.7h", 2520.0)]
)
def test_a_unit_gives_the_number_that_was_meant(text: str, seconds: float) -> None:
    limit = load_settings(["--tunnel-timeout", text], {}).tunnel_timeout
    assert limit is not None
    assert repr(limit.seconds) == repr(seconds)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("log_file", "/tmp/\u00fc.log"),
        ("tls_cert", "/tmp/\u00fc.pem"),
        ("listen", "unix:/tmp/\u00fc"),
        ("upstream", "unix:/tmp/\u00fc"),
    ],
)
def test_a_path_that_the_locale_does_not_have_is_one_line(option: str, value: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'{option} = "{value}"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "proxy", "check", "--config", str(file)],
        cwd=ROOT,
        env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]},
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"can't be a path in this locale; set LC_ALL=C.UTF-8" in done.stderr


def test_what_standard_output_has_no_letters_for_is_shown_all_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "check", "--upstream", "unix:/tmp/\u00fc.sock"],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        capture_output=True,
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xfc.sock" in done.stdout


def test_a_certificate_file_that_goes_while_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """It can be opened, and a moment later can't: the main process reads on SIGHUP, and must not end of it."""
    (tmp_path / "own.pem").touch()

    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", gone)
    settings = load_settings(["--tls-cert", str(tmp_path / "own.pem")], {})
    with pytest.raises(ConfigError, match="changed while it was read"):
        read_contexts(settings)


# -- anything at all -------------------------------------------------------------------------------------------------


@hypothesis.given(
    hypothesis.strategies.lists(
        hypothesis.strategies.one_of(
            hypothesis.strategies.sampled_from([option.flag for option in OPTIONS if option.name != "config"]),
            hypothesis.strategies.text(max_size=12),
        ),
        max_size=5,
    )
)
def test_any_arguments_give_settings_or_one_printable_line(arguments: list[str]) -> None:
    try:
        settings = load_settings(arguments, {})
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
        values = [entry["value"] for entry in json.loads(json.dumps(settings.describe())).values()]
        assert all(math.isfinite(value) for value in values if isinstance(value, float))
    assert not refusal or refusal.isprintable()
