"""``python -m benchmarks``, and what ``pkt-fast bench`` calls."""

from benchmarks.run import main
from pkt_fast.cli import answered

if __name__ == "__main__":
    raise SystemExit(answered(main))
