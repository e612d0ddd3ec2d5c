"""A threaded reverse proxy that never swallows an abort: one structured record for every request it relays."""

__version__ = "0.1.0"
