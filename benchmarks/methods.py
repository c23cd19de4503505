"""Compare the methods on the research pairs and keep the numbers in benchmarks/results.

    python scripts/train_demo_pair.py --output PAIRS
    python benchmarks/methods.py --pairs PAIRS --setting sliced-32 --methods sft,kd,paper
    python benchmarks/methods.py --summary

Every setting has a JSON file; both commands write the tables of all to methods.md beside them.

Settings are named PAIR-ROWS, with "-source" behind when the source writes the replies.  PAIR is
"independent" (the bundled target) or "sliced" (a target cut from the source before it learnt the
rows' task); the source is the bundled one.  "problems" is the bundled pair on problems that source
and target were both trained on.  Methods that the result file already holds under the same settings
are kept.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pkt_fast._files import write_json
from pkt_fast.compare import Comparison, compare, load_comparison, mean_interval
from pkt_fast.demo import bundled_rows, source_path, target_path

RESULTS = Path(__file__).parent / "results"
STEPS, BATCH_SIZE = 320, 8
LEARNING_RATES = (1e-2, 3e-3, 3e-2, 1e-3)  # these targets are small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=Path, help="holds base/ and sliced/")
    parser.add_argument("--setting", help="PAIR-ROWS or PAIR-ROWS-source")
    parser.add_argument("--methods", help="names of recipes, with commas")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument(
        "--summary", action="store_true", help="print the kept results and write methods.md"
    )
    args = parser.parse_args()
    if args.summary:
        print(write_page(RESULTS), end="")
        return
    if not (args.pairs and args.setting and args.methods):
        parser.error("give --pairs, --setting and --methods, or --summary")
    path = RESULTS / f"methods_{args.setting}.json"
    known = load_comparison(path) if path.exists() else None
    have = {method.name for method in known.methods} if known else set()
    wanted = [name for name in args.methods.split(",") if name not in have]
    if wanted:
        found = _measure(args.setting, args.pairs, wanted, args.seeds, args.budget)
        known = _merged(known, found)
        write_json(path, known.as_dict())
        write_page(RESULTS)
    assert known is not None
    Console(width=220).print(known.table())


def _measure(setting: str, pairs: Path, methods: list[str], seeds: str, budget: int) -> Comparison:
    pair, rows, *labels = setting.split("-")
    split = "" if pair == "problems" else "specialty"
    names = {"train": split or "train"} | {
        role: f"{split}_{role}" if split else role for role in ("validation", "test")
    }
    return compare(
        source_path(),
        pairs / "sliced" if pair == "sliced" else target_path(),
        bundled_rows(names["train"]),
        methods,
        validation=bundled_rows(names["validation"]),
        test=bundled_rows(names["test"]),
        other=bundled_rows("other"),
        source_base=None if pair == "problems" else pairs / "base",
        examples=int(rows),
        labels=labels[0] if labels else "given",
        seeds=[int(seed) for seed in seeds.split(",")],
        tune_budget=budget,
        learning_rates=LEARNING_RATES,
        max_new_tokens=48,
        steps=STEPS,
        batch_size=BATCH_SIZE,
    )


def write_page(folder: Path) -> str:
    """Write methods.md: a table of every methods_*.json in ``folder``; returns its text."""
    lines = [
        "# Methods, measured",
        "",
        "Written by `python benchmarks/methods.py`; what the settings and columns are is in",
        "[docs/methods.md](../../docs/methods.md).",
    ]
    for path in sorted(folder.glob("methods_*.json")):
        name = path.stem.removeprefix("methods_")
        lines += ["", f"## {name}", "", _summary(load_comparison(path)).rstrip()]
    text = "\n".join(lines) + "\n"
    (folder / "methods.md").write_text(text, encoding="utf-8")
    return text


def _summary(comparison: Comparison, reference: str = "sft+kd") -> str:
    """A Markdown table by validation loss, with the paired difference to ``reference`` by seed."""
    header = ("method", "validation", "test loss", f"minus {reference}", "exact %", "token acc. %")
    header += ("gap %", "KL to source", "top-1 %", "other text", "chosen")
    lines = [header, ("---",) * len(header)]
    by_name = {method.name: method for method in comparison.methods}
    compared = by_name[reference].runs if reference in by_name else []
    for method in sorted(comparison.methods, key=lambda m: m.validation_loss):
        differences = [
            run.next_token_loss - other.next_token_loss
            for run, other in zip(method.runs, compared, strict=bool(compared))
        ]
        lines.append(
            (
                method.name,
                f"{method.validation_loss:.4f}",
                _shown(method.mean("next_token_loss"), 4),
                "" if method.name == reference else _shown(mean_interval(differences), 4),
                _shown(method.mean("exact_match"), 1, 100),
                _shown(method.mean("token_accuracy"), 1, 100),
                _shown(method.mean("gap_closed"), 1, 100),
                _shown(method.mean("source_kl"), 3),
                _shown(method.mean("source_top1"), 1, 100),
                _shown(method.mean("other_loss"), 2),
                ", ".join(f"{k} {v:g}" for k, v in method.chosen.items()),
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: tuple[float, float] | None, digits: int, factor: float = 1) -> str:
    if value is None:
        return "-"
    return f"{value[0] * factor:.{digits}f} ± {value[1] * factor:.{digits}f}"


def _merged(known: Comparison | None, found: Comparison) -> Comparison:
    if known is None:
        return found
    recipes = {**known.settings["recipes"], **found.settings["recipes"]}
    same = {k: v for k, v in found.settings.items() if k != "recipes"}
    if same != {k: v for k, v in known.settings.items() if k != "recipes"}:
        raise SystemExit("the result file holds other settings; delete it or choose another name")
    settings = {**known.settings, "recipes": recipes}
    return replace(known, settings=settings, methods=[*known.methods, *found.methods])


if __name__ == "__main__":
    main()
