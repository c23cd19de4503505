"""Training rows to token ids: read, render, tokenise, truncate, batch.

Rows come in three shapes, and files, lists and ``datasets.Dataset`` objects may mix them::

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}
    {"text": "any text"}          # or just the string

**Rendering.**  Conversations go through the tokenizer's chat template, with all that a message
holds (``tool_calls``, ``name``, ...) and the row's ``tools``.  Without one they become
``User: ...`` and ``Assistant: ...`` lines with the EOS token after each assistant turn, and a
prompt/completion pair of strings is simply concatenated (plus EOS).  Plain text gets EOS at its
end.  Special tokens that the tokenizer adds in front (BOS) are added exactly when no template does
the job, so BOS never appears twice.  Messages after the last assistant message are not rendered:
nothing can be learnt from them.

**Supervision.**  Loss falls on assistant turns (or the completion, or all of a plain text).  A turn
is what the model would have to generate after the generation prompt: the words, and the first
special token behind them, so that it learns to stop.  Boilerplate after that token (a newline, the
next header) is not supervised.  A template without such a token ends its turn with whatever text
it puts there.  Tool calls are part of their turn, as the template shows them; its content may then
be null.  Turns are found in *text* space and carried to tokens by character offsets; a token that
straddles the border belongs to the turn.

**Truncation.**  A row longer than ``max_length`` first loses unsupervised tokens behind the last
turn, then prompt tokens from the front (BOS stays, and the supervised part always keeps one token
before it to be predicted from), and only then the end of its supervised part.

One module holds one step: :mod:`.reading` (files and objects to rows), :mod:`.rows` (the shapes of
a row, checked), :mod:`.templates` and :mod:`.turns` (a conversation as text, and where its turns
are), :mod:`.rendering` (rows to text with supervised spans), :mod:`.tokenising` (text to tokens),
:mod:`.encoding` (all of these in a row, a few rows at a time), :mod:`.examples` (what they make,
held compactly), :mod:`.bucketing` and :mod:`.batches` (examples to padded batches).
"""

from .batches import Batch, batches, collate, moved, padding_fraction
from .bucketing import batch_indices
from .encoding import encode
from .examples import IGNORE_INDEX, DataSummary, Example, Examples, ExampleSet, Span
from .reading import Origin, read_rows
from .rendering import render_prompt, special_tokens
from .rows import ROLES, Message, check_rows, parse_turns
from .tokenising import prefix_ids, tokenize, without_gaps

__all__ = [
    "IGNORE_INDEX",
    "ROLES",
    "Batch",
    "DataSummary",
    "Example",
    "ExampleSet",
    "Examples",
    "Message",
    "Origin",
    "Span",
    "batch_indices",
    "batches",
    "check_rows",
    "collate",
    "encode",
    "moved",
    "padding_fraction",
    "parse_turns",
    "prefix_ids",
    "read_rows",
    "render_prompt",
    "special_tokens",
    "tokenize",
    "without_gaps",
]
