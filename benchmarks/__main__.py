"""``python -m benchmarks``, and what ``pkt-fast bench`` calls."""

from benchmarks.run import main

if __name__ == "__main__":
    raise SystemExit(main())
