"""How good a model is on held-out rows: exact match, next-token loss, agreement with another."""

from .agreement import Agreement, agreement
from .answers import Answer, answer_of, matches
from .evaluate import Evaluation, evaluate
from .generation import generate_replies

__all__ = [
    "Agreement",
    "Answer",
    "Evaluation",
    "agreement",
    "answer_of",
    "evaluate",
    "generate_replies",
    "matches",
]
