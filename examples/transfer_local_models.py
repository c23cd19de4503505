"""Transfer between two local models, compare before and after, keep the adapter.

    python examples/transfer_local_models.py SOURCE TARGET TRAIN.jsonl TEST.jsonl OUTPUT

Without arguments it uses the bundled pair and problems, and writes to ./transferred.
"""

from __future__ import annotations

import sys
from typing import Any

import pkt_fast
from pkt_fast.demo import bundled_rows, source_path, target_path
from pkt_fast.evaluation import evaluate


def main(source: Any, target: Any, train: Any, test: Any, output: str, **settings: Any) -> None:
    result = pkt_fast.transfer(source, target, train, output_dir=output, **settings)
    print("layers paired:", *result.pairs)
    for name, model in (("before", target), ("after", result.model)):
        found = evaluate(model, test, result.tokenizer, max_new_tokens=64)
        print(f"{name}: loss {found.next_token_loss:.4f}, exact match {found.exact_match:.1%}")
    print(f"the adapter is in {output}; PeftModel.from_pretrained(target, {output!r}) loads it")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        train, test = bundled_rows("train")[:256], bundled_rows("test")[:50]
        main(source_path(), target_path(), train, test, "transferred", overwrite=True)
    elif len(sys.argv) == 6:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
