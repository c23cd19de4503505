"""Every method on equal terms: same pair, rows, steps, seeds and tuning budget, one table.

A *recipe* names settings of :func:`pkt_fast.transfer` and the loss weights worth tuning.  Each
recipe gets the same number of trials; a trial trains once and is scored by the next-token loss on
validation rows.  The best settings then train from every seed, and only these models meet the test
rows.
"""

from .recipes import RECIPES, Recipe, recipes, trials
from .results import Comparison, MethodResult, Scores, load_comparison, mean_interval
from .running import LABELS, compare

__all__ = [
    "LABELS",
    "RECIPES",
    "Comparison",
    "MethodResult",
    "Recipe",
    "Scores",
    "compare",
    "load_comparison",
    "mean_interval",
    "recipes",
    "trials",
]
