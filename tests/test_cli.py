"""The command line as a user meets it: in a process of its own, in each form the program comes in."""

import collections.abc
import contextlib
import datetime
import json
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import time
import typing

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import proxy
import proxy.demo
from proxy.config import OPTIONS

ROOT = pathlib.Path(proxy.__file__).resolve().parent.parent
FORMS = {
    "package": (ROOT / "proxy" / "__main__.py", ["-m", "proxy"]),
    "single file": (ROOT / "proxy.py", [str(ROOT / "proxy.py")]),
    "zipapp": (ROOT / "dist" / "proxy.pyz", [str(ROOT / "dist" / "proxy.pyz")]),
}
# Other tests and machines may have set some; a path to the package is all that is needed of the rest.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PROXY_")} | {
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "100",
}
PATIENCE_S = 30.0


class Program:
    """One form of the program, run from an empty directory so that `proxy` means nothing by accident."""

    def __init__(self, form: str, directory: pathlib.Path) -> None:
        file, command = FORMS[form]
        if not file.exists():
            pytest.skip(f"{file} has not been built")
        self.command = list(command)
        self.form = form
        self.file = file
        self.directory = directory
        self.environment = dict(ENVIRONMENT)
        if form != "package":
            # They must run without the package beside them.
            del self.environment["PYTHONPATH"]

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, *self.command, *arguments],
            cwd=self.directory,
            env=self.environment | environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def refusal(self, *arguments: str, **environ: str) -> str:
        """Returns: the one line with which a command refuses its arguments, without the program's name."""
        done = self.run(*arguments, **environ)
        assert (done.returncode, done.stdout) == (2, ""), done
        prefix, _, text = done.stderr.partition("proxy: error: ")
        assert prefix == ""
        assert text.endswith("\n")
        assert text[:-1].isprintable(), "more than one line, or control characters"
        return text[:-1]

    @contextlib.contextmanager
    def serving(self, *arguments: str) -> collections.abc.Iterator["Serving"]:
        """Serve on a port the kernel chose, with the log in a file; whatever happens, no process is left."""
        log = self.directory / "serve.log"
        process = subprocess.Popen(
            [
                sys.executable,
                *self.command,
                "--listen",
                "127.0.0.1:0",
                "--workers=2",
                "--log-file",
                str(log),
                *arguments,
            ],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        serving = Serving(process, log)
        try:
            yield serving
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
            serving.output = process.communicate(timeout=PATIENCE_S)


class Serving:
    """A proxy that runs."""

    def __init__(self, process: subprocess.Popen[str], log: pathlib.Path) -> None:
        self.process = process
        self.log = log
        self.output = ("", "")

    def events(self, name: str) -> list[dict[str, typing.Any]]:
        """Returns: the events of that name so far."""
        if not self.log.exists():
            return []
        lines = self.log.read_text("ascii").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == name]

    def await_event(self, name: str) -> dict[str, typing.Any]:
        """Returns: the first event of that name."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not (events := self.events(name)):
            assert self.process.poll() is None or self.events(name), self.process.communicate()
            assert time.monotonic() < give_up_at, f"no {name}"
            time.sleep(0.02)
        return events[0]

    def address(self) -> tuple[str, int]:
        """Returns: where it listens."""
        host, _, port = self.await_event("server.start")["listen"].rpartition(":")
        return host, int(port)


@pytest.fixture(params=list(FORMS))
def program(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Program:
    directory = tmp_path / "empty"
    directory.mkdir()
    return Program(request.param, directory)


# -- help and version ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("check", "--help"), ("serve", "--listen", "x", "--help")])
def test_help_names_every_option_with_its_default(program: Program, arguments: tuple[str, ...]) -> None:
    done = program.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    for option in OPTIONS:
        assert f" {option.flag} {option.metavar} {option.help} (default {option.described_default})" in words
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_version_names_the_file_that_runs_and_what_it_stands_on(program: Program) -> None:
    done = program.run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["abort-proxy"] == proxy.__version__
    file = pathlib.Path(lines["file"])
    assert file.is_absolute()
    assert program.file in (file, *file.parents) or file.parent == program.file.parent
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    for package in ("urllib3", "certifi", "python-json-logger"):
        assert re.match(r"\d+\.\d+", lines[package]), f"{package} {lines[package]}"


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("chek",), "command 'chek': unknown; did you mean check? the commands are serve, check, demo"),
        (
            ("explain", "x.log"),
            "command 'explain': is not available in this version; the commands are serve, check, demo",
        ),
        (("report",), "command 'report': is not available in this version"),
        (("",), "command '': unknown; the commands are"),
        (("a\nb\x1b[1m",), "command 'a\\nb\\x1b[1m': unknown"),
        (("demo", "--fast"), "demo '--fast': demo takes no options"),
        (("serve", "check"), "unexpected argument 'check'"),
        (("--workers", "1", "check"), "unexpected argument 'check'"),
        (("--json",), "option '--json' (flag): unknown"),
        (("--client-write-timeout", "ten"), "client_write_timeout 'ten' (flag): is no number of seconds; write"),
        (("serve", "--config", "/does/not/exist"), "config '/does/not/exist' (flag): can't be read: No such file"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(program: Program, arguments: tuple[str, ...], text: str) -> None:
    assert text in program.refusal(*arguments)


def test_a_misspelt_variable_is_refused(program: Program) -> None:
    text = program.refusal("check", PROXY_CLIENT_WRITE_TIMOUT="2")
    assert text == (
        "option 'PROXY_CLIENT_WRITE_TIMOUT' '2' (environment): unknown; did you mean PROXY_CLIENT_WRITE_TIMEOUT?"
    )


def test_a_file_whose_name_has_a_newline_is_still_one_line(program: Program) -> None:
    path = program.directory / "a\nb.toml"
    path.write_text("workers = 0\n", "ascii")
    assert "b.toml:1): is not from 1 to 1024" in program.refusal("check", "--config", str(path))


def test_missing_packages_are_named_with_the_commands_that_mend_it(program: Program) -> None:
    program.command.insert(0, "-S")  # the standard library alone
    done = program.run("--version")
    if program.form == "zipapp":
        assert done.returncode == 0  # it brings its packages
        return
    assert (done.returncode, done.stdout) == (2, "")
    first, *mends = done.stderr.splitlines()
    assert first.startswith("proxy: error: ")
    assert first.endswith(" has no urllib3, certifi, pythonjsonlogger; one of these mends it:")
    # Debian's package goes to Debian's Python alone, and that one lets pip install nothing.
    apt, pip = (
        "apt install python3-urllib3 python3-certifi python3-pythonjsonlogger",
        "urllib3 certifi python-json-logger",
    )
    venv = f"{sys.executable} -m venv packages && packages/bin/pip install {pip}, then packages/bin/python"
    of_the_system = sys.base_prefix == "/usr" and os.path.exists("/usr/bin/apt-get")
    managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
    assert [mend.strip() for mend in mends] == [
        *([apt] if of_the_system else []),
        venv if managed else f"{sys.executable} -m pip install {pip}",
        "uv run proxy.py",
    ]


def test_an_older_python_is_told_so_before_anything_it_can_not_read(program: Program) -> None:
    run = "run_module('proxy'" if program.form == "package" else f"run_path({str(program.file)!r}"
    old = "sys.version_info = (3, 10, 13); sys.version = '3.10.13 (main)'"
    program.command = ["-c", f"import runpy, sys; {old}; runpy.{run}, run_name='__main__')"]
    done = program.run("--version")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "proxy: error: Python 3.11 or newer is needed, and this is 3.10.13\n"


def test_what_is_there_is_not_called_missing() -> None:
    code = "import sys; sys.modules['urllib3'] = sys; import proxy.dependencies as d; print(d.missing_dependencies())"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "['certifi', 'pythonjsonlogger']\n"


@pytest.mark.parametrize(
    ("command", "status", "stderr"),
    [
        ("check >&-", 0, ""),
        ("check <&- >&- 2>&-", 0, ""),
        ("--version <&- 2>&-", 0, ""),
        ("--bogus 2>&-", 2, ""),
        ("--bogus >&- 2>&-", 2, ""),
        ("--bogus <&-", 2, "proxy: error: option '--bogus' (flag): unknown; --help lists the options\n"),
    ],
)
def test_closed_standard_files(program: Program, command: str, status: int, stderr: str) -> None:
    shell = ["sh", "-c", f'"$@" {command}', "sh", sys.executable, *program.command]
    done = subprocess.run(
        shell,
        cwd=program.directory,
        env=program.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, stderr)


def test_serve_without_standard_files(program: Program) -> None:
    """No socket takes their numbers, and with them what is meant for people."""
    program.command = ["-c", _EXEC_CLOSED, *program.command]
    with program.serving("--upstream", "unix:/does/not/exist") as serving:
        answer = _exchange(serving.address(), b"GET / HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert {os.readlink(f"/proc/{serving.process.pid}/fd/{fd}") for fd in range(3)} == {os.devnull}
        serving.process.terminate()
        assert serving.process.wait(PATIENCE_S) == 0
    assert serving.events("server.stop")[0]["balanced"] is True


_EXEC_CLOSED = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_prints_each_value_with_its_source(program: Program) -> None:
    path = program.directory / "proxy.toml"
    path.write_text('\nmax_body_size = "1MiB"\n', "ascii")
    arguments = ("--client-write-deadline", "2.5", "--config", "proxy.toml", "--upstream", "tcp://127.0.0.1:2375")
    done = program.run("check", *arguments, PROXY_LISTEN="[::1]:8081", PROXY_USER="me")
    assert (done.returncode, done.stderr) == (0, "")
    table = {}
    for line in done.stdout.splitlines()[1 : len(OPTIONS) + 1]:
        name, value, source = line.split(None, 2)
        table[name] = (value, source)
    assert list(table) == [option.name for option in OPTIONS]
    assert table["client_write_deadline"] == ("2.5", "flag")
    assert table["max_body_size"] == ("1048576", "file:proxy.toml:2")
    assert table["listen"] == ("[::1]:8081", "env:PROXY_LISTEN")
    assert table["upstream"] == ("http://127.0.0.1:2375", "flag")
    assert table["client_read_timeout"] == ("none", "default")
    assert table["keepalive_timeout"] == ("75", "default")
    assert "note: PROXY_USER is no option, and is ignored\n" in done.stdout
    assert done.stdout.endswith("The configuration is good.\n")


def test_check_as_json(program: Program) -> None:
    done = program.run("check", "--json", "--workers=3", "--upstream=unix:/does/not/exist")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["version"] == proxy.__version__
    assert found["settings"]["workers"] == {"value": 3, "source": "flag"}
    assert found["settings"]["keepalive_timeout"] == {"value": 75.0, "source": "default"}
    assert list(found["settings"]) == [option.name for option in OPTIONS]
    assert found["notes"] == ["upstream socket '/does/not/exist' does not exist now; requests get 502 until it does"]


def test_check_into_a_pipe_whose_reader_has_left(program: Program) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, *program.command, "check"]
    with os.fdopen(write_end, "wb") as output:
        done = subprocess.run(
            command,
            cwd=program.directory,
            env=program.environment,
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_that_cannot_be_told_is_in_the_exit_status(program: Program) -> None:
    with open("/dev/full", "wb") as output:
        done = subprocess.run(
            [sys.executable, *program.command, "--bad"],
            cwd=program.directory,
            env=program.environment,
            stdout=subprocess.PIPE,
            stderr=output,
            timeout=PATIENCE_S,
        )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("command", ["check", "demo", "--help"])
def test_onto_a_full_disk(program: Program, command: str) -> None:
    with open("/dev/full", "wb") as output:
        done = subprocess.run(
            [sys.executable, *program.command, command],
            cwd=program.directory,
            env=program.environment,
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
        )
    assert done.returncode == 2
    assert (
        done.stderr == b"proxy: error: standard output can't be written: No space left on device; check where it goes\n"
    )


def test_check_looks_at_the_places_for_log_and_socket(program: Program) -> None:
    there = str(program.directory)
    assert "log_file '/does/not/exist.log' (flag): '/does/not' is no directory; make it" in program.refusal(
        "check", "--log-file", "/does/not/exist.log"
    )
    assert "(flag): Is a directory; name a file in it" in program.refusal("check", "--log-file", there)
    assert "listen 'unix:/does/not/p.sock' (flag): '/does/not' is no directory" in program.refusal(
        "check", "--listen", "unix:/does/not/p.sock"
    )
    assert program.run("check", "--log-file", "new.log", "--listen", "unix:p.sock").returncode == 0
    assert os.listdir(there) == []


@pytest.fixture
def certificates(tmp_path: pathlib.Path) -> pathlib.Path:
    authority = trustme.CA()
    identity = authority.issue_cert("localhost")
    stranger = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    identity.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    identity.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    identity.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    stranger.private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    (tmp_path / "garbage.pem").write_text("nothing\n", "ascii")
    key = serialization.load_pem_private_key(identity.private_key_pem.bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    (tmp_path / "locked.pem").write_bytes(encoded)
    certificate = identity.cert_chain_pems[0].bytes()
    (tmp_path / "order.pem").write_bytes(authority.cert_pem.bytes() + certificate)
    (tmp_path / "cert.der.pem").write_bytes(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii")))
    (tmp_path / "damaged.pem").write_bytes(certificate.replace(b"M", b"N", 3))
    os.mkfifo(tmp_path / "pipe.pem")
    short = str(tmp_path / "short.pem")
    made = ("req", "-x509", "-newkey", "rsa:512", "-nodes", "-keyout", short, "-subj", "/CN=localhost")
    done = subprocess.run(["openssl", *made], check=True, capture_output=True)
    with open(short, "ab") as file:
        file.write(done.stdout)
    for path in tmp_path.glob("*.pem"):
        path.chmod(0o600)
    return tmp_path


def test_check_loads_the_files_of_tls(program: Program, certificates: pathlib.Path) -> None:
    ca, cert, key, both = (str(certificates / f"{name}.pem") for name in ("ca", "cert", "key", "both"))
    upstream = ("--upstream", "https://localhost:2376")
    for good in (
        ("--tls-cert", cert, "--tls-key", key),
        ("--tls-cert", both, "--tls-client-ca", ca),
        (*upstream,),
        (*upstream, "--upstream-ca", ca, "--upstream-cert", cert, "--upstream-key", key),
        (*upstream, "--upstream-ca", "system", "--upstream-cert", both),
    ):
        done = program.run("check", *good)
        assert (done.returncode, done.stderr) == (0, ""), good


def test_check_looks_at_what_peers_will_refuse(program: Program, certificates: pathlib.Path) -> None:
    """It is allowed, as a clock may be wrong, and clocks and certificates change while the proxy runs."""
    authority = trustme.CA()
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    for name, first, last in (("old", now - 3 * day, now - day), ("new", now + day, now + 3 * day)):
        identity = authority.issue_cert("localhost", not_before=first, not_after=last)
        path = certificates / f"{name}.pem"
        identity.private_key_and_cert_chain_pem.write_to_path(str(path))
        path.chmod(0o600)
    key = certificates / "key.pem"

    def notes(*options: str) -> list[str]:
        done = program.run("check", "--json", "--upstream", "https://localhost:2376", *options)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["notes"]
        assert isinstance(found, list)
        return found

    cert = str(certificates / "cert.pem")
    assert notes("--tls-cert", cert, "--tls-key", str(key)) == []
    assert [note.partition(":")[2] for note in notes("--tls-cert", str(certificates / "old.pem"))] == [
        " certificate has expired; peers that check it will refuse it"
    ]
    assert [note.partition(":")[2] for note in notes("--upstream-cert", str(certificates / "new.pem"))] == [
        " certificate is not yet valid; peers that check it will refuse it"
    ]
    key.chmod(0o640)  # for the group of the service
    assert notes("--tls-cert", cert, "--tls-key", str(key)) == []
    key.chmod(0o644)
    assert notes("--tls-cert", cert, "--tls-key", str(key)) == [
        f"the key in {str(key)!r} can be read by every user; chmod o-r mends it"
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--listen", "nosuch.invalid:80"), "write an address of this machine, such as 127.0.0.1"),
        (("--listen", "192.0.2.1:80"), "this machine has no such address; choose one of its own"),
        (("--listen", "unix:{}/nowhere"), "is a symbolic link to nothing; remove it, or choose another path"),
        (("--listen", "unix:{}/circle"), "is a symbolic link to nothing; remove it, or choose another path"),
        (("--log-file", "{}/circle"), "choose a path that can be written, or - for stderr"),
        (("--log-file", "{}/pipe"), "a named pipe needs a reader first"),
        (("--log-file", "{}"), "Is a directory; name a file in it"),
        (("--log-file", "{}/new/"), "Is a directory; name a file in it"),
    ],
)
def test_places_that_can_not_be_had(
    program: Program, tmp_path: pathlib.Path, options: tuple[str, ...], text: str
) -> None:
    """``check`` says what ``serve`` would say."""
    (tmp_path / "nowhere").symlink_to("/does/not/exist")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    filled = [option.format(tmp_path) for option in options]
    listen = () if options[0] == "--listen" else ("--listen", "127.0.0.1:0")
    assert text in (said := program.refusal("check", *listen, *filled))
    assert program.refusal("serve", *listen, *filled) == said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tls-cert", "cert.pem"), "it holds no key; set --tls-key too"),
        (("--tls-cert", "cert.pem", "--tls-key", "other.pem"), "the key does not belong to the certificate"),
        (("--tls-cert", "cert.pem", "--tls-key", "locked.pem"), "the key is encrypted"),
        (("--tls-cert", "short.pem"), "make a new one, with a key of 2048 bits or more"),
        (("--tls-cert", "key.pem"), "'{}/key.pem' holds a key and no certificate; name a file"),
        (("--tls-cert", "cert.der.pem", "--tls-key", "key.pem"), "'{}/cert.der.pem' holds no PEM certificate; name"),
        (("--tls-cert", "cert.pem", "--tls-key", "cert.pem"), "'{}/cert.pem' holds no PEM key; name a file"),
        (("--tls-cert", "order.pem", "--tls-key", "key.pem"), "or put that certificate before those of its issuers"),
        (("--tls-cert", "damaged.pem", "--tls-key", "key.pem"), "they may be damaged"),
        (("--tls-cert", "pipe.pem"), "'{}/pipe.pem' is no file; name a regular one"),
        (("--upstream", "https://h", "--upstream-ca", "pipe.pem"), "'{}/pipe.pem' is no file; name a regular one"),
        (("--tls-cert", "garbage.pem", "--tls-key", "key.pem"), "tls_cert '{}/garbage.pem' (flag)"),
        (("--tls-cert", "missing.pem"), "can't read '{}/missing.pem': No such file or directory"),
        (
            ("--tls-cert", "both.pem", "--tls-client-ca", "garbage.pem"),
            "tls_client_ca '{}/garbage.pem' (flag): holds no",
        ),
        (("--upstream", "https://h", "--upstream-ca", "garbage.pem"), "upstream_ca '{}/garbage.pem' (flag): holds no"),
        (
            ("--upstream", "https://h", "--upstream-ca", "missing.pem"),
            "upstream_ca '{}/missing.pem' (flag): can't read",
        ),
        (("--upstream", "https://h", "--upstream-cert", "ca.pem"), "upstream_cert '{}/ca.pem' (flag): can't be used"),
        (("--upstream", "https://h", "--upstream-cert", "ca.pem"), "it holds no key; set --upstream-key too"),
    ],
)
def test_check_refuses_files_of_tls(
    program: Program, certificates: pathlib.Path, options: tuple[str, ...], text: str
) -> None:
    paths = [str(certificates / option) if option.endswith(".pem") else option for option in options]
    assert text.format(certificates) in program.refusal("check", *paths)
    assert text.format(certificates) in program.refusal("serve", "--listen", "127.0.0.1:0", *paths)


# -- serve -----------------------------------------------------------------------------------------------------------


def _exchange(address: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        client.sendall(request)
        received = b""
        while octets := client.recv(65536):
            received += octets
        return received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_from_start_to_stop(program: Program, number: signal.Signals) -> None:
    with program.serving("--upstream", "unix:/does/not/exist", "--upstream-connect-timeout=3") as serving:
        answer = _exchange(serving.address(), b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 502 ")
        assert "upstream" in json.loads(body)["message"]
        start = serving.await_event("server.start")
        assert start["settings"]["upstream_connect_timeout"] == {"value": 3.0, "source": "flag"}
        assert start["settings"]["listen"] == {"value": "127.0.0.1:0", "source": "flag"}
        serving.process.send_signal(number)
        assert serving.process.wait(PATIENCE_S) == 0
    assert serving.output == ("", "")
    (stop,) = serving.events("server.stop")
    assert stop["balanced"] is True
    assert stop["requests"] == {"begun": 1, "complete": 0, "reject": 0, "abort": 1}
    assert len(serving.events("request.abort")) == 1


def test_serve_on_a_port_in_use(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = program.refusal("--listen", f"127.0.0.1:{other.getsockname()[1]}")
    assert text.startswith(
        f"listen '127.0.0.1:{text.split(':')[1].split(chr(39))[0]}' (flag): Address already in use; "
    )


def test_serve_where_it_may_not(program: Program) -> None:
    assert "listen 'unix:/does/not/p.sock' (flag): No such file or directory" in program.refusal(
        "--listen", "unix:/does/not/p.sock"
    )
    assert "log_file '/does/not/p.log' (env:PROXY_LOG_FILE): No such file or directory; " in program.refusal(
        "--listen", "127.0.0.1:0", PROXY_LOG_FILE="/does/not/p.log"
    )
    assert "listen '192.0.2.1:0' (flag): Cannot assign requested address; " in program.refusal(
        "--listen", "192.0.2.1:0"
    )
    assert "listen 'no-such-host.invalid:0' (flag): " in program.refusal("--listen", "no-such-host.invalid:0")


def test_serve_into_a_pipe_that_nobody_reads(program: Program) -> None:
    os.mkfifo(program.directory / "log")
    assert program.refusal("--listen", "127.0.0.1:0", "--log-file", "log") == (
        "log_file 'log' (flag): No such device or address; a named pipe needs a reader first, and a socket is no file;"
        " start the reader, or choose another path"
    )


@pytest.mark.parametrize("log_file", ["-", "log"])
def test_serve_that_can_open_too_few_files_says_what_to_do(tmp_path: pathlib.Path, log_file: str) -> None:
    program = Program("package", tmp_path)
    options = ("--listen", "127.0.0.1:0", "--workers", "1", "--log-file", log_file)
    for most in range(6, 10):
        done = subprocess.run(
            ["prlimit", f"--nofile={most}:{most}", sys.executable, *program.command, *options],
            cwd=program.directory,
            env=program.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 2
        assert re.fullmatch(
            r"proxy: error: (listen|log_file|workers) \S+ \(flag\): .*Too many open files; allow more open files and"
            r" processes \(ulimit -n and -u\), or set fewer --workers\n",
            done.stderr,
        )


@contextlib.contextmanager
def _served_soon(program: Program) -> collections.abc.Iterator[tuple["subprocess.Popen[str]", typing.TextIO]]:
    """Start the proxy. Yields it while it waits for its configuration, and where that is to be written."""
    os.mkfifo(program.directory / "config")
    with subprocess.Popen(
        [sys.executable, *program.command, "--config", "config"],
        cwd=program.directory,
        env=program.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            with open(program.directory / "config", "w") as config:  # which waits until it is opened to be read
                yield process, config
        finally:
            process.kill()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "event"),
    [(signal.SIGHUP, "server.reload"), (signal.SIGUSR1, "server.start"), (signal.SIGUSR2, "server.inflight")],
)
def test_an_order_that_comes_before_it_serves_is_obeyed_then(
    program: Program, number: signal.Signals, event: str
) -> None:
    with _served_soon(program) as (process, config):
        process.send_signal(number)
        config.write('listen = "127.0.0.1:0"\nupstream = "http://127.0.0.1:1"\nworkers = 1\n')
        config.close()
        assert process.stderr is not None
        events = (json.loads(line)["event"] for line in process.stderr)
        assert event in events
        process.terminate()
        assert list(events)[-1] == "server.stop"
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_stop_that_comes_before_it_serves_ends_it(program: Program, number: signal.Signals, status: int) -> None:
    with _served_soon(program) as (process, _):
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == status
        assert process.stderr is not None
        assert process.stderr.read() == ""


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_shows_both_pushes_and_keeps_its_promises(program: Program) -> None:
    began_at = time.monotonic()
    done = program.run("demo", PROXY_CLIENT_WRITE_DEADLINE="0.1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert time.monotonic() - began_at < 20
    assert "\033" not in done.stdout
    assert done.stdout.isascii()
    first, second = done.stdout.split("\n2. ")
    assert "The client got all of it" in first
    assert 'cause                   "deadline"' in second
    assert (
        "docker prints `unexpected EOF`. Here it prints:\n     client_write_deadline (2 s, set by flag) ended" in second
    )


@pytest.mark.parametrize(
    ("leaves", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 1)]
)
@pytest.mark.parametrize("whole_group", [True, False])
def test_demo_that_is_left_leaves_nothing_behind(
    program: Program, leaves: signal.Signals | None, status: int, whole_group: bool
) -> None:
    temporary = program.directory / "tmp"
    temporary.mkdir()
    # Every process of the demo has the pipe for stderr; it ends when the last of them has gone.
    with subprocess.Popen(
        [sys.executable, *program.command, "demo"],
        cwd=program.directory,
        env=program.environment | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while b"Pushing" not in process.stdout.readline():
            assert process.poll() is None
        if leaves is not None and whole_group:
            os.killpg(process.pid, leaves)  # as a terminal sends it: to all of them
        elif leaves is not None:
            process.send_signal(leaves)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == status
    assert os.listdir(temporary) == []


def test_demo_that_can_open_too_few_files_is_one_line(program: Program) -> None:
    demo = ["prlimit", "--nofile=10:10", sys.executable, *program.command, "demo"]
    done = subprocess.run(
        demo, cwd=program.directory, env=program.environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2
    assert re.fullmatch("proxy: error: .*Too many open files.*\n", done.stderr)


def test_demo_fails_when_a_claim_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"event": "request.abort", "limit": {"name": "client_read_deadline"}, "bytes": {"client_written": 1}}
    # A proxy whose records are wrong: there is none to run.
    monkeypatch.setattr(
        proxy.demo, "_push_through_proxy", lambda *_: (proxy.demo._Seen((), 2, whole=True), record, True)
    )
    assert proxy.demo.run_demo() == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("demo failed: ")]
    assert "demo failed: limit.name is 'client_read_deadline', not 'client_write_deadline'" in failures
    assert "demo failed: client_written is 1, not 2" in failures
