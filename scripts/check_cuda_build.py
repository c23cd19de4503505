"""Check that the native extension holds machine code for every GPU architecture we promise.

    python scripts/check_cuda_build.py

Needs no GPU: the code is listed by cuobjdump, which Triton ships.  Exit status 1 when an
architecture is missing.  An extension that was built without nvcc has none: that is status 0, with
a line that says so, unless ``PKT_FAST_CUDA=1`` demands the CUDA part, as it does when building.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import triton

from pkt_fast import _native

PROMISED = {"sm_80": (11, 0), "sm_90": (11, 8), "sm_100": (12, 8)}
"""Architectures, and since which version nvcc knows them."""


def main() -> int:
    info = _native.build_info()
    if not info["cuda_archs"]:
        print("the extension was built without nvcc: CPU kernels only")
        return int(os.environ.get("PKT_FAST_CUDA") == "1")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [tool, "--list-elf", _native.__file__], capture_output=True, text=True, check=True
    ).stdout
    found = set(re.findall(r"sm_\d+", listed))
    version = tuple(map(int, info["cuda_version"].split(".")))
    missing = sorted({arch for arch, since in PROMISED.items() if version >= since} - found)
    print(f"{Path(_native.__file__).name} holds code for {', '.join(sorted(found)) or 'no GPU'}")
    if missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
