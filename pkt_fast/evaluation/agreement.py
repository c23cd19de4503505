"""How much one model predicts what another does, on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy import Anatomy
from ..data.batches import collate
from ..data.encoding import encode
from ..lending import evaluating, usual_defaults
from ..loading import pad_token_id
from ..phases import AlignedPositions
from ..vocabulary import match_vocabularies
from .evaluate import scoring_batches
from .rows import logit_chunks, supervised_hidden


@dataclass(frozen=True)
class Agreement:
    """Agreement with another model over supervised positions.

    Attributes:
        kl: mean KL(other ‖ model) of the next-token distributions, in nats.
        top1: share of positions where both find the same token most likely.
        tokens: positions compared.
    """

    kl: float
    top1: float
    tokens: int


@usual_defaults()
@torch.no_grad()
def agreement(
    model: nn.Module,
    other: nn.Module,
    rows: Any,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> Agreement:
    """Compare the next-token distributions of ``model`` with those of ``other`` (the source, say).

    ``tokenizer`` serves both, or is a pair (model's, other's); where the two cut text differently,
    ``other`` is read at the last position that has read no more of the text.  Distributions are
    over the shared vocabulary.

    Raises:
        DataError: the tokenizers cut text differently, and one gives no character offsets.
        VocabularyError: too little vocabulary is shared.
    """
    own, theirs = tokenizer if isinstance(tokenizer, tuple | list) else (tokenizer, tokenizer)
    examples = encode(rows, own, max_length=max_length)
    aligned = AlignedPositions.between(examples, theirs, own)
    sizes = Anatomy.of(model).vocab_size, Anatomy.of(other).vocab_size
    shared = match_vocabularies(*sizes, own, theirs)
    kl, same, tokens = 0.0, 0, 0
    with evaluating(model), evaluating(other):
        for batch in scoring_batches(examples, own, batch_size):
            others = collate(aligned.examples, batch.rows, pad_token_id=pad_token_id(theirs))
            mine = supervised_hidden(model, batch)
            their = supervised_hidden(other, others, aligned.positions)
            for chunk, logits in logit_chunks(model, mine):
                own_log = logits[:, shared.source.to(logits.device)].log_softmax(-1)
                # One chunk of the other model: its own chunks may be cut elsewhere.
                other_log = torch.cat([part for _, part in logit_chunks(other, their[chunk])])
                other_log = other_log[:, shared.target.to(other_log.device)].log_softmax(-1)
                other_log = other_log.to(own_log.device)
                kl += float((other_log.exp() * (other_log - own_log)).sum())
                same += int((own_log.argmax(-1) == other_log.argmax(-1)).sum())
            tokens += len(mine)
    return Agreement(kl / tokens, same / tokens, tokens)
