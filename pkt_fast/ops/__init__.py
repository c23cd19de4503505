"""The registered ops (namespace ``pkt_fast`` of ``torch.library``), one module each."""

from .capture_rows import capture_rows as capture_rows
