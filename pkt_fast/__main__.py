"""``python -m pkt_fast`` is ``pkt-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
