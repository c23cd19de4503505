"""Train the models of the bundled demo from nothing, on text this repository generates.

    python scripts/train_demo_pair.py --output PAIRS                  # all four models
    python scripts/train_demo_pair.py --output PAIRS --what sliced    # one of them

``base`` learns every kind of problem but percentages, ``source`` is ``base`` fine-tuned on
percentages, ``target`` is a smaller model from another seed that learns a few kinds only, and
``sliced`` is a target cut from ``base`` and healed.  ``source`` and ``target`` are bundled in
``pkt_fast/demo/models``; the others serve ``benchmarks/methods.py``.

Every model is written as float16 safetensors with the shared tokenizer beside it, and what was
measured goes to ``metrics.json``.  With the same seeds, torch version, machine type and number of
threads the run is deterministic.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pkt_fast import demo
from pkt_fast.demo.other import OTHER, Drill
from pkt_fast.demo.problems import ONE_STEP, SPECIALTY, TWO_STEP, Example, final_answer

VOCABULARY = 768
BATCH_ROWS = 16
POOL_BATCHES = 32  # batches are cut from a pool sorted by length, so they need little padding
MAX_REPLY_TOKENS = 64

PAD, END = "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What one model is trained on, and how; repeated kinds are drawn more often.

    Questions are noise that the generator chose, and replies are what is to be learnt, so questions
    weigh little, except in a model that has to write some itself.
    """

    kinds: Sequence[demo.ExampleKind]
    steps: int
    learning_rate: float
    seed: int
    warmup: int = 50
    question_weight: float = 0.1


ADD_SUB_MUL = tuple(kind for kind in ONE_STEP if kind.name in {"add", "sub", "mul"})
RECIPES = {
    "base": Recipe(
        kinds=(*[Drill("+-*/")] * 10, *ONE_STEP, *TWO_STEP, *TWO_STEP, *OTHER),
        steps=4600,
        learning_rate=2e-3,
        seed=11,
    ),
    "source": Recipe(
        kinds=(*SPECIALTY, *SPECIALTY, *ONE_STEP, *TWO_STEP, *OTHER),
        steps=600,
        learning_rate=1e-3,
        seed=44,
        question_weight=1.0,
    ),
    "target": Recipe(
        kinds=(Drill("+-*"), *ADD_SUB_MUL, *OTHER, *OTHER),
        steps=1600,
        learning_rate=2e-3,
        seed=22,
    ),
    "sliced": Recipe(kinds=(*ADD_SUB_MUL, *OTHER), steps=1000, learning_rate=1e-3, seed=33),
}


def train_tokenizer(rows: int = 20_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that never joins digits."""
    kinds = (*ONE_STEP, *TWO_STEP, *SPECIALTY, *OTHER)
    texts = (
        text
        for example in islice(demo.examples(kinds, "pretrain", seed=1), rows)
        for text in (example.question, example.reply)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, *ROLES, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, mlp: int, seed: int
) -> LlamaForCausalLM:
    """Return a freshly initialised Llama with an untied head and heads 32 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def every_second_layer(source: PreTrainedModel) -> LlamaForCausalLM:
    """Return a model made of every second layer of ``source``, the last one included."""
    config = LlamaConfig(**source.config.to_dict())
    kept = range(1, config.num_hidden_layers, 2)
    config.num_hidden_layers = len(kept)
    model = LlamaForCausalLM(config)
    weights = {k: v for k, v in source.state_dict().items() if ".layers." not in k}
    for new, old in enumerate(kept):
        for name, value in source.model.layers[old].state_dict().items():
            weights[f"model.layers.{new}.{name}"] = value
    model.load_state_dict(weights)
    return model


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (rows, length) and the weight of predicting each of them."""

    ids: torch.Tensor
    weights: torch.Tensor


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: Sequence[Example], question_weight: float
) -> list[tuple[list[int], list[float]]]:
    """Return ids and weights of each example through the chat template."""
    encoded = tokenizer.apply_chat_template(
        [example.row()["messages"] for example in batch],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return [
        (ids, [1.0 if reply else question_weight for reply in mask])
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]


def collate(rows: Sequence[tuple[list[int], list[float]]], pad: int) -> Batch:
    """Pad encoded rows to their longest."""
    length = max(len(ids) for ids, _ in rows)
    return Batch(
        torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows]),
    )


def training_batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Batch]:
    """Yield batches of rows of similar length without end."""
    stream = demo.examples(recipe.kinds, "pretrain", recipe.seed)
    rng = Random(recipe.seed)
    while True:
        pool = encode(
            tokenizer, list(islice(stream, POOL_BATCHES * BATCH_ROWS)), recipe.question_weight
        )
        pool.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(pool), BATCH_ROWS))
        rng.shuffle(starts)
        for start in starts:
            yield collate(pool[start : start + BATCH_ROWS], tokenizer.pad_token_id)


def weighted_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the weighted mean cross-entropy of every next token of the batch."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, name: str
) -> dict[str, float]:
    """Train ``model`` in place and return what it cost and where the loss ended."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        fused=True,
    )

    def schedule(step: int) -> float:
        progress = step / recipe.steps
        return min(1.0, (step + 1) / recipe.warmup) * (
            0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    tokens, running = 0, float("nan")
    bar = tqdm(
        islice(training_batches(tokenizer, recipe), recipe.steps),
        total=recipe.steps,
        desc=name,
        mininterval=5,
    )
    for batch in bar:
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        tokens += int((batch.weights > 0).sum())
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
    return {"steps": recipe.steps, "tokens": tokens, "train_loss": round(running, 4)}


@torch.no_grad()
def reply_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Example]
) -> float:
    """Return the mean cross-entropy over the reply tokens of all rows."""
    batch = collate(encode(tokenizer, rows, question_weight=0.0), tokenizer.pad_token_id)
    return weighted_loss(model, batch).item()


@torch.no_grad()
def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Example]
) -> list[str]:
    """Return the greedy reply to every question."""
    prompts = tokenizer.apply_chat_template(
        [example.row()["messages"][:1] for example in rows],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    out = model.generate(**prompts, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False)
    return tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Measure a model on validation rows: loss by split, exact match by kind of problem."""
    model.eval()
    splits = {
        name: demo.bundled_examples(name)
        for name in ("validation", "specialty_validation", "other")
    }
    measured: dict[str, object] = {
        f"{name}_loss": round(reply_loss(model, tokenizer, rows), 4)
        for name, rows in splits.items()
    }
    hits: dict[str, list[bool]] = defaultdict(list)
    for name in ("validation", "specialty_validation"):
        for example, reply in zip(
            splits[name], replies(model, tokenizer, splits[name]), strict=True
        ):
            for key in (name, example.kind):
                hits[key].append(final_answer(reply) == example.answer)
    exact = {key: round(sum(values) / len(values), 4) for key, values in hits.items()}
    spoken = replies(model, tokenizer, splits["other"])
    right = [example.reply == reply for example, reply in zip(splits["other"], spoken, strict=True)]
    exact["other"] = round(sum(right) / len(right), 4)
    return measured | {"exact_match": exact}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write float16 weights and the tokenizer.

    The config asks for float32 on loading, and the tokenizer for the class that every supported
    Transformers version knows.
    """
    model.half().save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(path)
    _update(path / "config.json", dtype="float32")
    _update(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _update(path: Path, **entries: object) -> None:
    """Set entries of a JSON file, or of a new one."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | entries, indent=2) + "\n")


def make(name: str, tokenizer: PreTrainedTokenizerFast, output: Path, fraction: float) -> None:
    """Build, train, measure and save one model."""
    recipe = replace(RECIPES[name], steps=max(1, round(RECIPES[name].steps * fraction)))
    if name == "base":
        model: PreTrainedModel = new_model(tokenizer, 192, 6, 512, recipe.seed)
    elif name == "target":
        model = new_model(tokenizer, 128, 4, 352, recipe.seed)
    else:
        base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
        model = every_second_layer(base) if name == "sliced" else base
    started = time.perf_counter()
    trained = train(model, tokenizer, recipe, name)
    seconds = round(time.perf_counter() - started)
    save(model, tokenizer, output / name)
    entry: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": recipe.seed,
        "learning_rate": recipe.learning_rate,
        "batch_rows": BATCH_ROWS,
        "kinds": sorted({kind.name for kind in recipe.kinds}),
        **trained,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **measure(model.float(), tokenizer),
    }
    _update(output / "metrics.json", **{name: entry})
    print(json.dumps({name: entry}))


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--what", choices=("all", *RECIPES), default="all")
    parser.add_argument("--output", type=Path, required=True, help="directory of the models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the steps to train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    base = args.output / "base"
    tokenizer = AutoTokenizer.from_pretrained(base) if base.exists() else train_tokenizer()
    for name in RECIPES if args.what == "all" else (args.what,):
        make(name, tokenizer, args.output, args.fraction)


if __name__ == "__main__":
    main()
