"""Run the proxy: ``python -m proxy``."""

import sys

if not sys.version_info >= (3, 11):
    # Before the other imports, which are errors of syntax to an older one.
    sys.stderr.write("proxy: error: Python 3.11 or newer is needed, and this is " + sys.version.split()[0] + "\n")
    sys.exit(2)

from .dependencies import require_dependencies

if __name__ == "__main__":
    require_dependencies()
    # Only now: these import what may have been missing.
    from .cli import main

    sys.exit(main(sys.argv[1:]))
