"""The registered ops (namespace ``pkt_fast`` of ``torch.library``), one module each."""

from ._registry import backend as backend
from ._registry import served_by as served_by
from .capture_rows import capture_rows as capture_rows
from .grad_x_act import grad_x_act as grad_x_act
from .inject import inject_ as inject_
from .row_cosine import row_cosine as row_cosine
