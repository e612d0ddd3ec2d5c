"""Run the proxy: ``python -m proxy``."""

import sys

from .dependencies import require_dependencies

if __name__ == "__main__":
    require_dependencies()
    # Only now: these import what may have been missing.
    from .cli import main

    sys.exit(main(sys.argv[1:]))
