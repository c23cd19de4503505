"""The steps of a transfer by hand: attribute, pair, capture, align, steer one layer, inject.

    python examples/building_blocks.py

Every block works alone.  Here each source layer's activation is mapped into the target's space and
compared with the target's own, then one layer is steered onto it for a few steps.
"""

from __future__ import annotations

import peft
import torch

import pkt_fast
from pkt_fast.anatomy import Anatomy
from pkt_fast.data import batches, encode
from pkt_fast.demo import bundled_rows, load_pair


def main(rows: int = 32, steps: int = 5) -> list[float]:
    source, target, tokenizer = load_pair()
    examples = encode(bundled_rows("train")[:rows], tokenizer)
    prepared = list(batches(examples, 8, pad_token_id=tokenizer.pad_token_id))

    # 1. Which source layer matters, and which target layer learns from it?
    scores = pkt_fast.attribute(source, prepared)
    depths = Anatomy.of(source).num_layers, Anatomy.of(target).num_layers
    (pair,) = pkt_fast.pair_layers(*depths, int(scores.argmax()))
    print("attribution:", [round(score, 3) for score in scores.tolist()])
    print("pair:", pair)

    # 2. One D x D matrix carries activations across; "dual" is exact when both models are one.
    mapping = pkt_fast.SemanticMap.between(source, target, "dual")
    first, last = pair.source[0], pair.source[-1]

    def aligned(batch):
        with (
            torch.no_grad(),
            pkt_fast.capture(source, {first, last}, positions=batch.supervised) as acts,
        ):
            source(**batch.model_inputs())
        return mapping((1 - pair.weight) * acts[first] + pair.weight * acts[last])

    # 3. Steer the target's layer: LoRA on that layer only, both losses of the paper.
    anatomy = Anatomy.of(target)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=anatomy.lora_targets(pair.target))
    adapted = peft.get_peft_model(target, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    tap = anatomy.tap(pair.target, "mlp")
    losses = []
    for step in range(steps):
        batch = prepared[step % len(prepared)]
        read = []
        handle = tap.module.register_forward_hook(
            lambda _, args, kwargs, out, read=read: read.append(tap.read(args, kwargs, out).value),
            with_kwargs=True,
        )
        with anatomy.bypass_head() as head_input:
            adapted(**batch.model_inputs())
        handle.remove()
        hidden, labels = head_input.hidden[batch.supervised], batch.targets[batch.supervised]
        loss = pkt_fast.losses.layer_cosine(read[0][batch.supervised], aligned(batch))
        loss = loss + pkt_fast.losses.label_cosine(hidden, anatomy.head, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("loss:", [round(loss, 4) for loss in losses])

    # 4. Ship the change as a PEFT adapter, or put it into the weights and take it out again.
    delta = pkt_fast.LayerDelta.from_peft(adapted)
    plain = adapted.unload()
    done = pkt_fast.inject(plain, delta)
    print(f"injected into {done.matrices} matrices, {done.unchanged_fraction:.1%} rounded away")
    print("ejected from", pkt_fast.eject(plain), "matrices")
    return losses


if __name__ == "__main__":
    main()
