"""``pkt-fast demo``: a transfer between the bundled models, measured beside plain fine-tuning.

Every run trains the same layer for the same steps on the same rows, with the settings of the paper.
The test problems are only ever scored; no setting was chosen on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import check_output_dir
from ..config import TransferConfig
from ..evaluation import Evaluation, evaluate
from ..progress import Phases
from ..transfer import TransferResult, transfer
from . import bundled_rows, load_pair, source_path, target_path

TRAINING_ROWS = 512
MAX_NEW_TOKENS = 64

# What the same layer, batches and steps give without the alignment.
BASELINES = {"LoRA on labels": "sft", "logit distillation": "kd"}


@dataclass(frozen=True)
class Demo:
    """What the demo measured: a name for every model, and its scores on the held-out problems."""

    result: TransferResult
    scores: Mapping[str, Evaluation]


def run_demo(
    out: Console, *, output: str | None = None, progress: bool = True, **settings: Any
) -> Demo:
    """Transfer between the bundled models, compare on held-out problems, print a table to ``out``.

    ``output`` keeps the adapter and the report; ``settings`` are fields of
    :class:`~pkt_fast.TransferConfig` that hold for every run (seed, device, ...).
    """
    overwrite = TransferConfig.make(**settings).overwrite
    if output is not None:
        check_output_dir(output, overwrite)
    source, target, tokenizer = load_pair()
    rows, problems = bundled_rows("train")[:TRAINING_ROWS], bundled_rows("test")

    def score(name: str, model: Any) -> Evaluation:
        with Phases(progress).phase(name, 2 * len(problems)) as update:
            return evaluate(
                model,
                problems,
                tokenizer,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=50,
                advance=lambda done: update(done, ""),
            )

    def trained(**changes: Any) -> TransferResult:
        options = {**settings, **changes, "limit": None, "progress": progress}
        return transfer(source_path(), target_path(), rows, **options)

    out.print(f"Transferring with {len(rows)} problems, then asking {len(problems)} others.")
    scores = {
        "source": score("source", source),
        "target before": score("target before", target),
    }
    result = trained(preset="paper")
    scores["target after SemAlign"] = score("SemAlign", result.model)
    same_layer = {"layers": [pair.target for pair in result.pairs]}
    for name, method in BASELINES.items():
        scores[f"target after {name}"] = score(name, trained(method=method, **same_layer).model)
    _show(out, result, scores)
    if output is not None:
        result.save(output, overwrite=overwrite)
        out.print(f"The adapter and its report are in {output}", markup=False)
    out.print("Next: pkt-fast transfer --source A --target B --data train.jsonl --output out/")
    return Demo(result, scores)


def _show(out: Console, result: TransferResult, scores: Mapping[str, Evaluation]) -> None:
    table = Table("held-out problems", "exact match", "next-token loss")
    for name, found in scores.items():
        exact = "-" if found.exact_match is None else f"{found.exact_match:.1%}"
        table.add_row(name, exact, f"{found.next_token_loss:.4f}")
    out.print(table)
    steps = len(result.history)
    pairs = "; ".join(map(str, result.pairs))
    out.print(f"All three runs trained the same layer for {steps} steps ({pairs}).")
