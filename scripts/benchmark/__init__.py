"""Parts of scripts/bench: the machine, the tools, the proxies, the figures, the tables, the picture."""
