"""``pkt-fast demo``: transfers between the bundled models, measured beside plain fine-tuning.

The source knows percentages, the target has never seen any, and there are few rows to learn from.
Every run trains for the same steps on the same rows, but for those that ``preset="best"`` has the
source write, at the rate that other problems chose for it (``independent-32`` in docs/methods.md).
The test problems are only ever scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import check_output_dir
from ..config import STEADY, TransferConfig
from ..evaluation import Evaluation, evaluate
from ..progress import Phases
from ..transfer import TransferResult, transfer
from . import bundled_rows, load_pair, source_path, target_path

TRAINING_ROWS = 32
MAX_NEW_TOKENS = 48
TRAINING: dict[str, Any] = {
    "steps": 320,
    "batch_size": 8,
    "max_new_tokens": MAX_NEW_TOKENS,
    **STEADY,
}

RUNS: dict[str, dict[str, Any]] = {
    'preset="paper"': {"preset": "paper", "learning_rate": 3e-3},
    "LoRA on labels": {"method": "sft", "learning_rate": 3e-3},
    "labels + distillation": {"method": "kd", "label_weight": 0.3, "learning_rate": 3e-3},
    'preset="best"': {"preset": "best", "learning_rate": 1e-2},
}


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
    config = TransferConfig.make(**settings)
    if output is not None:
        check_output_dir(output, config.overwrite)
    source, target, tokenizer = load_pair()
    rows = bundled_rows("specialty")[:TRAINING_ROWS]
    problems = bundled_rows("specialty_test")

    def score(name: str, model: Any) -> Evaluation:
        with Phases(progress).phase(name, 2 * len(problems)) as update:
            return evaluate(
                model,
                problems,
                tokenizer,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=50,
                device=config.device,
                advance=update,
            )

    out.print(f"Transferring with {len(rows)} problems, then asking {len(problems)} others.")
    scores = {
        "source": score("source", source),
        "target before": score("target before", target),
    }
    for name, run in RUNS.items():
        options = {**TRAINING, **run, **settings, "limit": None, "progress": progress}
        result = transfer(source_path(), target_path(), rows, **options)
        scores[f"target after {name}"] = score(name, result.model)
    _show(out, result, scores)
    if output is not None:
        result.save(output, overwrite=config.overwrite)
        out.print(f"The adapter and its report are in {output}", markup=False)
    out.print("Next: pkt-fast transfer --source A --target B --data train.jsonl --output out/")
    return Demo(result, scores)


def _show(out: Console, result: TransferResult, scores: Mapping[str, Evaluation]) -> None:
    table = Table("held-out problems", "exact match", "next-token loss")
    for name, found in scores.items():
        exact = "-" if found.exact_match is None else f"{found.exact_match:.1%}"
        table.add_row(name, exact, f"{found.next_token_loss:.4f}")
    out.print(table)
    out.print(
        f"Every run trained for {len(result.history)} steps; the paper's moves one layer, the "
        "others all."
    )
