"""The registered ops (namespace ``pkt_fast`` of ``torch.library``), one module each."""

from ._registry import backend as backend
from ._registry import served_by as served_by
from .align import align_rows as align_rows
from .align import align_rows_grouped as align_rows_grouped
from .capture_rows import capture_rows as capture_rows
from .capture_rows import captures_to_host as captures_to_host
from .capture_rows import synchronize_captures as synchronize_captures
from .decompose import decompose as decompose
from .grad_x_act import grad_x_act as grad_x_act
from .inject import inject_ as inject_
from .label_cosine import label_cosine as label_cosine
from .label_cosine import label_cosine_chunked as label_cosine_chunked
from .linear_kl import linear_kl as linear_kl
from .relation import relation as relation
from .row_cosine import row_cosine as row_cosine
