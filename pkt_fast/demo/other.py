"""Short text that is not a word problem: facts, lists of words, comparisons, bare equations.

Both models of the demo pair learn it, so it shows what a transfer made the target forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pkt_fast.demo.problems import NAMES, Example

_COLOURS = {
    "lemon": "yellow", "banana": "yellow", "cherry": "red", "tomato": "red", "leaf": "green",
    "frog": "green", "sky": "blue", "sea": "blue", "snow": "white", "milk": "white",
    "coal": "black", "raven": "black", "carrot": "orange", "pumpkin": "orange", "plum": "purple",
    "brick": "brown", "mouse": "grey", "cloud": "grey",
}  # fmt: skip
_SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars",
    "bee": "hums", "owl": "hoots", "pig": "grunts", "wolf": "howls", "snake": "hisses",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "high": "low", "fast": "slow", "wet": "dry",
    "full": "empty", "light": "dark", "hard": "soft", "open": "shut", "near": "far",
    "early": "late", "rich": "poor", "loud": "quiet", "thick": "thin",
}  # fmt: skip
_NEXT = {
    "Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
    "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday", "spring": "summer",
    "summer": "autumn", "autumn": "winter", "winter": "spring",
}  # fmt: skip
_WORDS = (
    "ant", "bird", "cup", "door", "ear", "fish", "gate", "hill", "ink", "jam", "kite", "leaf",
    "moon", "nest", "oak", "pear", "queen", "ring", "sun", "tree", "urn", "van", "wind", "yard",
)  # fmt: skip

# (facts, phrasings, reply): every fact is asked in several ways
_FACTS: tuple[tuple[dict[str, str], tuple[str, ...], str], ...] = (
    (
        _COLOURS,
        ("What colour is a {k}?", "Which colour has a {k}?", "Tell {n} the colour of a {k}."),
        "A {k} is {v}.",
    ),
    (
        _SOUNDS,
        ("What does a {k} do?", "Which sound does a {k} make?", "Tell {n} what a {k} does."),
        "A {k} {v}.",
    ),
    (
        _OPPOSITES,
        (
            "What is the opposite of {k}?",
            "Which word means not {k}?",
            "{n} says {k}. Say the opposite.",
        ),
        "The opposite of {k} is {v}.",
    ),
    (
        _NEXT,
        ("What comes after {k}?", "{k} is over. What is next?", "Tell {n} what follows {k}."),
        "After {k} comes {v}.",
    ),
)


@dataclass(frozen=True)
class Fact:
    """A question about a fixed fact."""

    name: str = "fact"

    def example(self, rng: Random) -> Example:
        """Draw one example."""
        facts, phrasings, reply = rng.choice(_FACTS)
        key = rng.choice(tuple(facts))
        question = rng.choice(phrasings).format(k=key, n=rng.choice(NAMES))
        return Example(self.name, question, reply.format(k=key, v=facts[key]))


@dataclass(frozen=True)
class WordList:
    """Repeat, sort or pick from a list of words."""

    name: str = "words"

    def example(self, rng: Random) -> Example:
        """Draw one example."""
        words = rng.sample(_WORDS, rng.randint(2, 4))
        listed = ", ".join(words)
        question, reply = rng.choice(
            (
                (f"Repeat these words: {listed}.", f"{listed}."),
                (f"Sort these words: {listed}.", f"{', '.join(sorted(words))}."),
                (f"Which word is last: {listed}?", f"The last word is {words[-1]}."),
                (f"Which word is first: {listed}?", f"The first word is {words[0]}."),
            )
        )
        return Example(self.name, question, reply)


@dataclass(frozen=True)
class Larger:
    """Pick the larger or the smaller of two numbers."""

    name: str = "larger"

    def example(self, rng: Random) -> Example:
        """Draw one example."""
        a, b = rng.sample(range(2, 100), 2)
        if rng.random() < 0.5:
            question, reply = "larger", f"{max(a, b)} is larger than {min(a, b)}."
        else:
            question, reply = "smaller", f"{min(a, b)} is smaller than {max(a, b)}."
        return Example(self.name, f"Which is {question}, {a} or {b}?", reply)


@dataclass(frozen=True)
class Drill:
    """Two to four bare equations in one row: the densest way to learn small arithmetic."""

    operations: Sequence[str]
    name: str = "drill"

    def example(self, rng: Random) -> Example:
        """Draw one example."""
        pairs = [self._equation(rng) for _ in range(rng.randint(2, 4))]
        question = "Work out " + ", ".join(left for left, _ in pairs) + "."
        return Example(self.name, question, " ".join(f"{left} = {right}." for left, right in pairs))

    def _equation(self, rng: Random) -> tuple[str, int]:
        sign = rng.choice(self.operations)
        # a wide number beside a narrow one, or two middling ones: what the problems ask
        wide = rng.random() < 0.5
        if sign == "+":
            a, b = (rng.randint(2, 81), rng.randint(2, 9)) if wide else _middling(rng)
            return f"{a} + {b}", a + b
        if sign == "-":
            b, rest = (rng.randint(2, 9), rng.randint(2, 72)) if wide else _middling(rng)
            return f"{b + rest} - {b}", rest
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return (f"{a} * {b}", a * b) if sign == "*" else (f"{a * b} / {b}", a)


def _middling(rng: Random) -> tuple[int, int]:
    return rng.randint(2, 20), rng.randint(2, 20)


OTHER = (Fact(), WordList(), Larger())
