"""The proxies that are compared, each with a configuration equivalent to the others.

Every one relays to a single upstream over kept connections, buffers nothing on disk, has no limit of time, uses two
cores, and writes an access log to a file, as JSON. A peer is a function from a `Setup` to the command that starts it;
its configuration files go to the setup's directory.
"""

import collections.abc
import dataclasses
import json
import os
import pathlib
import socket
import sys

from .tools import CACHE, REPOSITORY, find

WORKERS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """Where one instance of a proxy listens, what is behind it, and where its files go."""

    directory: pathlib.Path
    port: int
    upstream_port: int
    log_file: pathlib.Path
    # The throwaway certificate's directory, if the client side is to speak TLS.
    certificates: pathlib.Path | None

    def write(self, name: str, text: str) -> pathlib.Path:
        """Write a configuration file. Returns: its path."""
        path = self.directory / name
        path.write_text(text)
        return path


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """How to start a proxy. `log_is_output`: it logs to its standard output, which is to be the log file."""

    words: tuple[str | pathlib.Path, ...]
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    log_is_output: bool = False
    folder: pathlib.Path | None = None


def _ours(setup: Setup) -> Command:
    words: list[str | pathlib.Path] = [sys.executable, "-m", "proxy", "--listen", f"127.0.0.1:{setup.port}"]
    words += ["--upstream", f"http://127.0.0.1:{setup.upstream_port}", "--log-file", setup.log_file]
    if setup.certificates is not None:
        words += ["--tls-cert", setup.certificates / "cert.pem", "--tls-key", setup.certificates / "key.pem"]
    return Command(tuple(words), folder=REPOSITORY)


def _go(setup: Setup, idle: int) -> Command:
    words: list[str | pathlib.Path] = [CACHE / "load", "proxy", "-listen", f"127.0.0.1:{setup.port}"]
    words += ["-upstream", f"http://127.0.0.1:{setup.upstream_port}", "-log-file", setup.log_file, "-idle", str(idle)]
    if setup.certificates is not None:
        words += ["-cert", setup.certificates / "cert.pem", "-key", setup.certificates / "key.pem"]
    return Command(tuple(words))


def _go_origin(setup: Setup) -> Command:
    return _go(setup, 0)


def _go_pooled(setup: Setup) -> Command:
    return _go(setup, 256)


def _nginx(setup: Setup) -> Command:
    # With proxy_buffering off, one buffer of proxy_buffer_size is all that a response passes through: at its default of
    # 4 KiB, nginx takes twice the CPU time per GiB.
    secure = ""
    if setup.certificates is not None:
        secure = f"ssl_certificate {setup.certificates}/cert.pem; ssl_certificate_key {setup.certificates}/key.pem;"
        secure += " ssl_protocols TLSv1.3;"
    config = setup.write(
        "nginx.conf",
        f"""
        daemon off; user root; worker_processes {WORKERS};
        pid {setup.directory}/nginx.pid; error_log {setup.directory}/nginx.error warn;
        events {{ worker_connections 8192; }}
        http {{
            client_body_temp_path {setup.directory}/body; proxy_temp_path {setup.directory}/temporary;
            fastcgi_temp_path {setup.directory}/f; scgi_temp_path {setup.directory}/s;
            uwsgi_temp_path {setup.directory}/u;
            log_format records escape=json '{{"time":"$time_iso8601","client":"$remote_addr:$remote_port",'
                '"method":"$request_method","target":"$request_uri","status":$status,"bytes":$body_bytes_sent,'
                '"duration_s":$request_time,"upstream":"$upstream_addr","request_bytes":$request_length}}';
            access_log {setup.log_file} records;
            keepalive_requests 1000000000; client_max_body_size 0; keepalive_timeout 3600; tcp_nodelay on;
            client_body_timeout 3600; send_timeout 3600;
            map $http_upgrade $forwarded_connection {{ default upgrade; '' ''; }}
            upstream behind {{
                server 127.0.0.1:{setup.upstream_port};
                keepalive 256; keepalive_requests 1000000000; keepalive_timeout 3600;
            }}
            server {{
                listen 127.0.0.1:{setup.port} reuseport {"ssl" if secure else ""} backlog=4096;
                {secure}
                location / {{
                    proxy_pass http://behind; proxy_http_version 1.1;
                    proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                    proxy_set_header Connection $forwarded_connection; proxy_set_header Upgrade $http_upgrade;
                    proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 3600; proxy_send_timeout 3600;
                    proxy_buffer_size 64k; proxy_busy_buffers_size 128k; proxy_buffers 8 64k;
                    client_body_buffer_size 64k;
                }}
            }}
        }}
        """,
    )
    return Command((find("nginx"), "-c", config, "-p", setup.directory))


def _haproxy(setup: Setup) -> Command:
    # Without http-no-delay a line of progress waits for the next ones, 50 ms in the median; it costs bulk nothing.
    secure = f"ssl crt {setup.certificates}/both.pem alpn http/1.1" if setup.certificates is not None else ""
    record = '{"time":"%tr","client":"%ci:%cp","method":"%HM","target":"%HU","status":%ST,"bytes":%B,"read":%U,'
    record += '"duration_ms":%Ta,"upstream":"%si:%sp","state":"%tsc"}'
    config = setup.write(
        "haproxy.cfg",
        f"""
global
    nbthread {WORKERS}
    maxconn 6000
    tune.pipesize 1048576
    log stdout format raw local0
defaults
    mode http
    log global
    log-format {record.replace('"', chr(92) + '"').replace(" ", chr(92) + " ")}
    option splice-auto
    option splice-request
    option splice-response
    option http-no-delay
    option http-keep-alive
    option forwardfor
    http-reuse always
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
frontend front
    bind 127.0.0.1:{setup.port} backlog 4096 {secure}
    default_backend behind
backend behind
    server upstream 127.0.0.1:{setup.upstream_port}
""",
    )
    return Command((find("haproxy"), "-db", "-f", config), log_is_output=True)


def _envoy(setup: Setup) -> Command:
    extension = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{extension}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "codec_type": "HTTP1",
        "stream_idle_timeout": "0s",
        "request_timeout": "0s",
        "use_remote_address": True,
        "upgrade_configs": [{"upgrade_type": "tcp"}],
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{extension}.access_loggers.file.v3.FileAccessLog",
                    "path": str(setup.log_file),
                    "log_format": {
                        "json_format": {
                            "time": "%START_TIME%",
                            "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
                            "method": "%REQ(:METHOD)%",
                            "target": "%REQ(:PATH)%",
                            "status": "%RESPONSE_CODE%",
                            "flags": "%RESPONSE_FLAGS%",
                            "read": "%BYTES_RECEIVED%",
                            "bytes": "%BYTES_SENT%",
                            "duration_ms": "%DURATION%",
                            "upstream": "%UPSTREAM_HOST%",
                        }
                    },
                },
            }
        ],
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{extension}.filters.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "behind", "timeout": "0s"}}],
                }
            ]
        },
    }
    chain: dict[str, object] = {"filters": [{"name": "http", "typed_config": manager}]}
    if setup.certificates is not None:
        chain["transport_socket"] = {
            "name": "tls",
            "typed_config": {
                "@type": f"{extension}.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["http/1.1"],
                    "tls_certificates": [
                        {
                            "certificate_chain": {"filename": f"{setup.certificates}/cert.pem"},
                            "private_key": {"filename": f"{setup.certificates}/key.pem"},
                        }
                    ],
                },
            },
        }

    def address(port: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    # Envoy holds 1,024 connections, requests and waiting requests per cluster unless told otherwise.
    unlimited = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 1 << 20)
    config = {
        "static_resources": {
            "listeners": [{"name": "front", "address": address(setup.port), "filter_chains": [chain]}],
            "clusters": [
                {
                    "name": "behind",
                    "type": "STATIC",
                    "connect_timeout": "10s",
                    "circuit_breakers": {"thresholds": [unlimited]},
                    "load_assignment": {
                        "cluster_name": "behind",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(setup.upstream_port)}}]}],
                    },
                }
            ],
        }
    }
    path = setup.write("envoy.json", json.dumps(config))
    words = (find("envoy"), "-c", path, "--concurrency", str(WORKERS), "--disable-hot-restart", "-l", "error")
    return Command((*words, "--file-flush-interval-msec", "500"))


def _caddy(setup: Setup) -> Command:
    scheme, secure = "http", ""
    if setup.certificates is not None:
        scheme, secure = ("https", f"tls {setup.certificates}/cert.pem {setup.certificates}/key.pem")
    config = setup.write(
        "Caddyfile",
        f"""
{{
    admin off
    auto_https off
    persist_config off
    log {{
        level ERROR
    }}
    servers {{
        protocols h1
    }}
}}
{scheme}://localhost:{setup.port}, {scheme}://127.0.0.1:{setup.port} {{
    bind 127.0.0.1
    {secure}
    log {{
        output file {setup.log_file} {{
            roll_disabled
        }}
        format json
        level INFO
    }}
    reverse_proxy http://127.0.0.1:{setup.upstream_port} {{
        transport http {{
            keepalive_idle_conns_per_host 256
        }}
    }}
}}
""",
    )
    home = {
        "HOME": str(setup.directory),
        "XDG_DATA_HOME": str(setup.directory),
        "XDG_CONFIG_HOME": str(setup.directory),
    }
    return Command((find("caddy"), "run", "--config", config, "--adapter", "caddyfile"), home)


def _traefik(setup: Setup) -> Command:
    routes: dict[str, object] = {
        "http": {
            "routers": {
                "all": {"rule": "PathPrefix(`/`)", "service": "behind", "entryPoints": ["front"]}
                | ({"tls": {}} if setup.certificates is not None else {})
            },
            "services": {
                "behind": {
                    "loadBalancer": {
                        "servers": [{"url": f"http://127.0.0.1:{setup.upstream_port}"}],
                        "serversTransport": "pooled",
                    }
                }
            },
            "serversTransports": {"pooled": {"maxIdleConnsPerHost": 256}},
        }
    }
    if setup.certificates is not None:
        pair = {"certFile": f"{setup.certificates}/cert.pem", "keyFile": f"{setup.certificates}/key.pem"}
        routes["tls"] = {"certificates": [pair], "stores": {"default": {"defaultCertificate": pair}}}
    routes_file = setup.write("routes.json", json.dumps(routes))
    os.replace(routes_file, routes_file.with_suffix(".yml"))  # JSON is YAML, and Traefik goes by the ending
    static = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "log": {"level": "ERROR"},
        "accessLog": {"filePath": str(setup.log_file), "format": "json"},
        "providers": {"file": {"filename": str(routes_file.with_suffix(".yml")), "watch": False}},
        "entryPoints": {
            "front": {
                "address": f"127.0.0.1:{setup.port}",
                "transport": {"respondingTimeouts": {"readTimeout": 0, "idleTimeout": 0}},
            }
        },
    }
    config = setup.write("traefik.yml", json.dumps(static))
    return Command((find("traefik"), f"--configFile={config}"))


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A column of the comparison. `command` is None for `direct`, where the client talks to the upstream itself."""

    name: str
    command: collections.abc.Callable[[Setup], Command] | None
    # The program whose version is told, beside our own.
    program: str | None
    note: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("direct", None, None, "no proxy: the physical limit"),
        Peer("ours", _ours, None, "this proxy"),
        Peer("go", _go_origin, "go", "httputil.ReverseProxy with Go's default transport"),
        Peer("go-pooled", _go_pooled, "go", "the same with 256 idle connections per host"),
        Peer("caddy", _caddy, "caddy", ""),
        Peer("traefik", _traefik, "traefik", ""),
        Peer("envoy", _envoy, "envoy", f"--concurrency {WORKERS}"),
        Peer("nginx", _nginx, "nginx", f"{WORKERS} workers, no buffering"),
        Peer("haproxy", _haproxy, "haproxy", f"{WORKERS} threads, splice with 1 MiB pipes"),
    )
}


def free_port() -> int:
    """Pick a port of the loopback address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def nginx_upstream(setup: Setup, body: str) -> Command:
    """Configure an nginx that answers any request with a fixed body: the cheapest upstream for small responses."""
    config = setup.write(
        "upstream.conf",
        f"""
        daemon off; user root; worker_processes {WORKERS};
        pid {setup.directory}/upstream.pid; error_log {setup.directory}/upstream.error warn;
        events {{ worker_connections 8192; }}
        http {{
            client_body_temp_path {setup.directory}/ub; proxy_temp_path {setup.directory}/ut;
            fastcgi_temp_path {setup.directory}/uf; scgi_temp_path {setup.directory}/us;
            uwsgi_temp_path {setup.directory}/uu;
            access_log off; keepalive_requests 1000000000; keepalive_timeout 3600; default_type text/plain;
            server {{ listen 127.0.0.1:{setup.port} reuseport backlog=4096; location / {{ return 200 "{body}"; }} }}
        }}
        """,
    )
    return Command((find("nginx"), "-c", config, "-p", setup.directory))
