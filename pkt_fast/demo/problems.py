"""Arithmetic word problems with exact answers: the task of the bundled demo pair.

A :class:`Kind` is a family of problems that share one calculation (``mul_add``: a x b + c).  It
draws its operands, computes the result of every step and fills one of its templates.  The operands
appear in the question as digits, in the order of :attr:`Example.numbers`, and the reply shows every
step and ends in ``So the answer is N.``, so a reader, a test or an evaluation can check it exactly.

The numbers are small and every result is a positive whole number, because the models that have to
learn this are small.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

NAMES = (
    "Mia", "Ben", "Ada", "Tom", "Eva", "Leo", "Zoe", "Max", "Ida", "Sam", "Amy", "Jon",
    "Lily", "Omar", "Nina", "Paul", "Rosa", "Hugo", "Vera", "Finn", "Kira", "Igor", "Yuki", "Noah",
)  # fmt: skip
THINGS = (
    "apples", "pens", "books", "bells", "cards", "shells", "stones", "eggs", "cakes", "cups",
    "hats", "balls", "toys", "stamps", "keys", "plums", "nuts", "beads", "ropes", "lamps",
)  # fmt: skip
CONTAINERS = ("bags", "boxes", "jars", "trays", "baskets", "crates", "drawers", "tins")
PLACES = ("shop", "farm", "school", "market", "kitchen", "garden", "museum", "harbour")

_FINAL_ANSWER = re.compile(r"[Tt]he answer is\s+(-?\d+)")


@dataclass(frozen=True)
class Example:
    """One question and its reply; ``numbers`` and ``answer`` are set for arithmetic only."""

    kind: str
    question: str
    reply: str
    numbers: tuple[int, ...] = ()
    answer: int | None = None

    def row(self) -> dict[str, list[dict[str, str]]]:
        """Return the example as a chat row, ``{"messages": [user, assistant]}``."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.reply},
            ]
        }


@dataclass(frozen=True)
class Kind:
    """A family of problems: how to draw operands, how to solve them, how to word them.

    ``solve`` returns the result of each step; the last one is the answer.  A template is a pair
    (question, working) whose fields are the operands ``a b c``, the step results ``x y``, two
    names ``n m``, a thing ``t``, a container ``box`` and a ``place``.
    """

    name: str
    draw: Callable[[Random], tuple[int, ...]]
    solve: Callable[..., tuple[int, ...]]
    templates: tuple[tuple[str, str], ...]

    def example(self, rng: Random) -> Example:
        """Draw one example."""
        numbers = self.draw(rng)
        results = self.solve(*numbers)
        question, working = rng.choice(self.templates)
        first, second = rng.sample(NAMES, 2)
        fields: dict[str, object] = {
            "n": first,
            "m": second,
            "t": rng.choice(THINGS),
            "box": rng.choice(CONTAINERS),
            "place": rng.choice(PLACES),
            **dict(zip("abc", numbers, strict=False)),
            **dict(zip("xy", results, strict=False)),
        }
        reply = f"{working.format(**fields)} So the answer is {results[-1]}."
        return Example(self.name, question.format(**fields), reply, numbers, results[-1])


def final_answer(text: str) -> int | None:
    """Return N of the last ``The answer is N`` in ``text``, or None when there is none."""
    found = _FINAL_ANSWER.findall(text)
    return int(found[-1]) if found else None


def _sum_pair(rng: Random) -> tuple[int, int]:
    return rng.randint(2, 20), rng.randint(2, 20)


def _difference_pair(rng: Random) -> tuple[int, int]:
    a = rng.randint(8, 30)
    return a, rng.randint(2, a - 2)


def _product_pair(rng: Random) -> tuple[int, int]:
    return rng.randint(2, 9), rng.randint(2, 9)


def _quotient_pair(rng: Random) -> tuple[int, int]:
    b = rng.randint(2, 9)
    return b * rng.randint(2, 9), b


def _sum_triple(rng: Random) -> tuple[int, int, int]:
    return rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 12)


def _sum_less(rng: Random) -> tuple[int, int, int]:
    a, b = rng.randint(5, 14), rng.randint(5, 14)
    return a, b, rng.randint(2, a + b - 2)


def _less_sum(rng: Random) -> tuple[int, int, int]:
    a, b = _difference_pair(rng)
    return a, b, rng.randint(2, 12)


def _product_sum(rng: Random) -> tuple[int, int, int]:
    return *_product_pair(rng), rng.randint(2, 9)


def _product_less(rng: Random) -> tuple[int, int, int]:
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    return a, b, rng.randint(2, 7)


def _shared_sum(rng: Random) -> tuple[int, int, int]:
    c = rng.randint(2, 6)
    total = c * rng.randint(2, 6)
    a = rng.randint(max(2, total - 20), min(20, total - 2))
    return a, total - a, c


def _quotient_less(rng: Random) -> tuple[int, int, int]:
    b, x = rng.randint(2, 9), rng.randint(5, 9)
    return b * x, b, rng.randint(2, x - 2)


def _times_total(rng: Random) -> tuple[int, int]:
    return rng.randint(2, 9), rng.randint(2, 5)


_PERCENT_DIVISOR = {10: 10, 20: 5, 25: 4, 50: 2}


def _percent_pair(rng: Random) -> tuple[int, int]:
    percent = rng.choice(tuple(_PERCENT_DIVISOR))
    return _PERCENT_DIVISOR[percent] * rng.randint(2, 9), percent


ONE_STEP = (
    Kind(
        "add",
        _sum_pair,
        lambda a, b: (a + b,),
        (
            (
                "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
                "{n} has {a} + {b} = {x} {t}.",
            ),
            (
                "There are {a} {t} in the {place}. {n} brings {b} more. How many {t} are there?",
                "There are {a} + {b} = {x} {t}.",
            ),
            (
                "{n} finds {a} {t} and {m} finds {b} {t}. How many {t} do they find together?",
                "Together they find {a} + {b} = {x} {t}.",
            ),
            (
                "{n} bought {a} {t} on Monday and {b} {t} on Friday. How many {t} is that in all?",
                "In all that is {a} + {b} = {x} {t}.",
            ),
            (
                "A box holds {a} {t}. {n} puts in {b} {t}. How many {t} does the box hold now?",
                "The box holds {a} + {b} = {x} {t}.",
            ),
        ),
    ),
    Kind(
        "sub",
        _difference_pair,
        lambda a, b: (a - b,),
        (
            (
                "{n} has {a} {t}. {n} gives {b} to {m}. How many {t} does {n} have left?",
                "{n} has {a} - {b} = {x} {t} left.",
            ),
            (
                "There are {a} {t} in the {place}. {n} takes {b} away. How many {t} are left?",
                "There are {a} - {b} = {x} {t} left.",
            ),
            (
                "{n} had {a} {t} and lost {b} of them. How many {t} are left?",
                "There are {a} - {b} = {x} {t} left.",
            ),
            (
                "The {place} had {a} {t} and sold {b}. How many {t} does the {place} still have?",
                "The {place} has {a} - {b} = {x} {t}.",
            ),
        ),
    ),
    Kind(
        "compare",
        _difference_pair,
        lambda a, b: (a - b,),
        (
            (
                "{n} has {a} {t} and {m} has {b} {t}. How many more {t} does {n} have?",
                "{n} has {a} - {b} = {x} more {t}.",
            ),
            (
                "{n} is {a} years old and {m} is {b}. How many years older is {n}?",
                "{n} is {a} - {b} = {x} years older.",
            ),
            (
                "{n} needs {a} {t} but has only {b}. How many more {t} does {n} need?",
                "{n} needs {a} - {b} = {x} more {t}.",
            ),
            (
                "One rope is {a} metres long, the other {b}. How much longer is the first one?",
                "It is {a} - {b} = {x} metres longer.",
            ),
        ),
    ),
    Kind(
        "mul",
        _product_pair,
        lambda a, b: (a * b,),
        (
            (
                "{n} has {a} {box} with {b} {t} in each. How many {t} does {n} have?",
                "{n} has {a} * {b} = {x} {t}.",
            ),
            (
                "There are {a} {box} in the {place}. Each holds {b} {t}. How many {t} are there?",
                "There are {a} * {b} = {x} {t}.",
            ),
            (
                "{n} reads {a} pages a day. How many pages does {n} read in {b} days?",
                "{n} reads {a} * {b} = {x} pages.",
            ),
            (
                "One of the {t} costs {a} coins. How many coins do {b} of them cost?",
                "They cost {a} * {b} = {x} coins.",
            ),
            (
                "{n} puts {a} rows of {b} {t} on a table. How many {t} are on the table?",
                "There are {a} * {b} = {x} {t}.",
            ),
        ),
    ),
    Kind(
        "div",
        _quotient_pair,
        lambda a, b: (a // b,),
        (
            (
                "{n} shares {a} {t} fairly among {b} friends. How many {t} does each friend get?",
                "Each friend gets {a} / {b} = {x} {t}.",
            ),
            (
                "{n} puts {a} {t} into {b} {box}, the same number in each. How many are in each?",
                "Each holds {a} / {b} = {x} {t}.",
            ),
            (
                "{n} packs {a} {t}, {b} to a bag. How many bags does {n} fill?",
                "{n} fills {a} / {b} = {x} bags.",
            ),
            (
                "{a} {t} lie in {b} equal rows. How many {t} are in one row?",
                "One row has {a} / {b} = {x} {t}.",
            ),
        ),
    ),
)

TWO_STEP = (
    Kind(
        "add_add",
        _sum_triple,
        lambda a, b, c: (a + b, a + b + c),
        (
            (
                "{n} has {a} {t}, buys {b} and then finds {c}. How many {t} does {n} have now?",
                "First {a} + {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
            (
                "The {place} has {a} red, {b} blue and {c} green {t}. How many {t} is that in all?",
                "First {a} + {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
            (
                "{n} walks {a} steps, then {b} steps, then {c} steps. How many steps is that?",
                "First {a} + {b} = {x}. Then {x} + {c} = {y} steps.",
            ),
        ),
    ),
    Kind(
        "add_sub",
        _sum_less,
        lambda a, b, c: (a + b, a + b - c),
        (
            (
                "{n} has {a} {t}, gets {b} more and gives {c} to {m}. How many {t} are left?",
                "First {a} + {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
            (
                "{n} has {a} {t} and {m} has {b}. They sell {c} of them. How many {t} are left?",
                "First {a} + {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
            (
                "A bus has {a} people. {b} get on and {c} get off. How many people are on the bus?",
                "First {a} + {b} = {x}. Then {x} - {c} = {y} people.",
            ),
        ),
    ),
    Kind(
        "sub_add",
        _less_sum,
        lambda a, b, c: (a - b, a - b + c),
        (
            (
                "{n} had {a} {t}, lost {b} and then bought {c}. How many {t} does {n} have now?",
                "First {a} - {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
            (
                "The {place} had {a} {t}. It sold {b} and got {c} new ones. "
                "How many {t} are there?",
                "First {a} - {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
            (
                "A train has {a} people. {b} get off and {c} get on. How many people are there?",
                "First {a} - {b} = {x}. Then {x} + {c} = {y} people.",
            ),
        ),
    ),
    Kind(
        "mul_add",
        _product_sum,
        lambda a, b, c: (a * b, a * b + c),
        (
            (
                "{n} has {a} {box} with {b} {t} in each and {c} more {t}. How many {t} is that?",
                "First {a} * {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
            (
                "{n} buys {a} {t} for {b} coins each and a cup for {c} coins. "
                "How many coins is it?",
                "First {a} * {b} = {x}. Then {x} + {c} = {y} coins.",
            ),
            (
                "{n} makes {a} {t} a day for {b} days. {m} makes {c}. How many {t} is that in all?",
                "First {a} * {b} = {x}. Then {x} + {c} = {y} {t}.",
            ),
        ),
    ),
    Kind(
        "mul_sub",
        _product_less,
        lambda a, b, c: (a * b, a * b - c),
        (
            (
                "{n} fills {a} {box} with {b} {t} each and gives {c} {t} away. How many are left?",
                "First {a} * {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
            (
                "The {place} gets {a} {box} of {b} {t}. {c} {t} are broken. How many are good?",
                "First {a} * {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
            (
                "{n} plants {a} rows of {b} trees. {c} trees fall. How many trees are left?",
                "First {a} * {b} = {x}. Then {x} - {c} = {y} trees.",
            ),
        ),
    ),
    Kind(
        "add_div",
        _shared_sum,
        lambda a, b, c: (a + b, (a + b) // c),
        (
            (
                "{n} has {a} {t} and {m} has {b}. They share them among {c} friends. "
                "How many {t} does each friend get?",
                "First {a} + {b} = {x}. Then {x} / {c} = {y} {t}.",
            ),
            (
                "{n} puts {a} red and {b} blue {t} into {c} {box} equally. How many are in each?",
                "First {a} + {b} = {x}. Then {x} / {c} = {y} {t}.",
            ),
        ),
    ),
    Kind(
        "div_sub",
        _quotient_less,
        lambda a, b, c: (a // b, a // b - c),
        (
            (
                "{n} shares {a} {t} fairly among {b} boys. One uses {c}. "
                "How many {t} are left to him?",
                "First {a} / {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
            (
                "{n} puts {a} {t} into {b} {box} equally and takes {c} out of one. "
                "How many are left in it?",
                "First {a} / {b} = {x}. Then {x} - {c} = {y} {t}.",
            ),
        ),
    ),
    Kind(
        "times_total",
        _times_total,
        lambda a, b: (a * b, a * b + a),
        (
            (
                "{n} has {a} {t}. {m} has {b} times as many. How many {t} do they have together?",
                "First {a} * {b} = {x}. Then {x} + {a} = {y} {t}.",
            ),
            (
                "{n} is {a} years old and {m} is {b} times as old. How old are they together?",
                "First {a} * {b} = {x}. Then {x} + {a} = {y} years.",
            ),
        ),
    ),
)

SPECIALTY = (
    Kind(
        "percent",
        _percent_pair,
        lambda a, p: (a // _PERCENT_DIVISOR[p],),
        (
            (
                "{n} has {a} {t}. {b} percent of them are red. How many {t} are red?",
                "{b} percent of {a} is {x}.",
            ),
            (
                "There are {a} {t} in the {place} and {b} percent are new. How many {t} are new?",
                "{b} percent of {a} is {x}.",
            ),
            (
                "Of {a} {t}, {n} used {b} percent. How many {t} did {n} use?",
                "{b} percent of {a} is {x}.",
            ),
        ),
    ),
    Kind(
        "percent_left",
        _percent_pair,
        lambda a, p: (a // _PERCENT_DIVISOR[p], a - a // _PERCENT_DIVISOR[p]),
        (
            (
                "{n} has {a} {t} and sells {b} percent of them. How many {t} are left?",
                "First {b} percent of {a} is {x}. Then {a} - {x} = {y} {t}.",
            ),
            (
                "Of {a} {t} in the {place}, {b} percent are broken. How many {t} are good?",
                "First {b} percent of {a} is {x}. Then {a} - {x} = {y} {t}.",
            ),
        ),
    ),
)
