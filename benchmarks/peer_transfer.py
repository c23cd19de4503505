"""The peer: SemAlign written the obvious way with Transformers and PEFT.

Dynamic padding, the source under no_grad every epoch, hooks on the paired layers, the paper's
two-step alignment on the supervised rows, the whole target forward with LoRA on one layer, logits
for L_out, AdamW.  No waste that an experienced user would not also leave in; the same batches, the
same adapter initialisation and the same losses as ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkt_fast.data import Batch
from pkt_fast.pairing import LayerPair


def transfer(
    source: nn.Module,
    target: nn.Module,
    pair: LayerPair,
    steps: Sequence[Sequence[Batch]],
    learning_rate: float,
) -> list[tuple[float, float]]:
    """Train the LoRA already attached to ``target``; returns (layer loss, output loss) by step."""
    base = target.get_base_model()
    source_basis = unit_pinv(source.lm_head.weight)
    target_basis = unit_pinv(base.lm_head.weight)
    parameters = [p for p in target.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [
        source.model.layers[layer].mlp.register_forward_hook(keep(f"source{i}"))
        for i, layer in enumerate(pair.source)
    ]
    handles.append(base.model.layers[pair.target].mlp.register_forward_hook(keep("target")))
    history = []
    for batches in steps:
        count = sum(int(batch.supervised.sum()) for batch in batches)
        layer_loss = output_loss = 0.0
        for batch in batches:
            mask = batch.supervised
            with torch.no_grad():
                source(**batch.model_inputs(), use_cache=False)
                hidden = seen["source0"][mask]
                if len(pair.source) == 2:
                    hidden = (1 - pair.weight) * hidden + pair.weight * seen["source1"][mask]
                coefficients = F.normalize(hidden, dim=-1) @ source_basis.T
                supervisory = coefficients @ target_basis
            logits = target(**batch.model_inputs(), use_cache=False).logits[mask]
            at_label = logits.gather(1, batch.targets[mask][:, None])[:, 0]
            l_out = (1 - at_label / logits.norm(dim=-1)).sum() / count
            cosine = F.cosine_similarity(seen["target"][mask], supervisory, dim=-1)
            l_layer = (1 - cosine).sum() / count
            (l_layer + l_out).backward()
            layer_loss += l_layer.item()
            output_loss += l_out.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append((layer_loss, output_loss))
    for handle in handles:
        handle.remove()
    return history


def unit_pinv(weight: Tensor) -> Tensor:
    """The paper's semantic basis by SVD."""
    return F.normalize(torch.linalg.pinv(weight.detach()).T, dim=-1)
