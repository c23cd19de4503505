"""The method as one would write it with Transformers and PEFT, without deliberate waste.

One loop over epochs and batches: the source's forward pass without gradient and without its head,
the paper's two alignment steps over the vocabulary, the target's forward pass with LoRA on the
paired layer, both losses from the logits of the supervised positions, AdamW.  Batches are padded to
their longest row.  Autograd keeps no graph below the first trained layer by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkt_fast import TransferConfig
from pkt_fast.data import ExampleSet, collate
from pkt_fast.pairing import LayerPair
from pkt_fast.steering import plan_steps

MODULES = ("up_proj", "down_proj", "v_proj", "o_proj")


def transfer_plainly(
    source: nn.Module,
    target: nn.Module,
    examples: ExampleSet,
    pair: LayerPair,
    config: TransferConfig,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train ``pair`` of two Llama-like models; returns the PEFT model and the losses by step.

    It takes the batches of :func:`pkt_fast.transfer` in the same order, so that losses compare.
    """
    from peft import LoraConfig, get_peft_model

    device = target.lm_head.weight.device
    basis_s, basis_t = (_basis(model.lm_head.weight.float()) for model in (source, target))
    names = [name for name, _ in target.model.layers[pair.target].named_modules()]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[
            f"model.layers.{pair.target}.{name}" for name in names if name.endswith(MODULES)
        ],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    model = get_peft_model(target, lora)
    layer = target.model.layers[pair.target].mlp
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    history = []
    for step in plan_steps(examples.lengths, config):
        batches = [collate(examples, indices, pad_token_id=0).to(device) for indices in step.micro]
        rows = sum(int(batch.supervised.sum()) for batch in batches)
        sums = torch.zeros(2, device=device)
        for batch in batches:
            keep, inputs = batch.supervised, batch.model_inputs()
            with (
                torch.no_grad(),
                _outputs([source.model.layers[i].mlp for i in pair.source]) as seen,
            ):
                source.model(**inputs, use_cache=False)
            hidden = [value[keep] for value in seen]
            mixed = hidden[0]
            if len(hidden) == 2:
                mixed = (1 - pair.weight) * hidden[0] + pair.weight * hidden[1]
            aligned = (F.normalize(mixed.float(), dim=1) @ basis_s.T) @ basis_t
            with _outputs([layer]) as ours:
                top = target.model(**inputs, use_cache=False).last_hidden_state
            logits = target.lm_head(top[keep]).float()
            labels = batch.targets[keep]
            layer_loss = (1 - F.cosine_similarity(ours[0][keep].float(), aligned)).sum() / rows
            picked = logits.gather(1, labels[:, None])[:, 0]
            output_loss = (1 - picked / logits.norm(dim=1)).sum() / rows
            (layer_loss + output_loss).backward()
            sums += torch.stack([layer_loss.detach(), output_loss.detach()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(dict(zip(("layer_loss", "output_loss"), sums.tolist(), strict=True)))
    return model, history


def _basis(weight: Tensor) -> Tensor:
    return F.normalize(torch.linalg.pinv(weight.detach()).T, dim=1)


@contextlib.contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    values: list[Any] = []
    handles = [m.register_forward_hook(lambda _m, _a, out: values.append(out)) for m in modules]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
