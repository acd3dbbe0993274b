"""Items of the tasks beside this file, made by rule and seed, so that no network is asked for them.

Each function returns what lm-eval's ``custom_dataset`` is to: {"test": Dataset}. An item has a query, choices of which
one is right, and the number of that one, from 0.
"""

import random

from datasets import Dataset

NUM_ITEMS = 200
_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
_SINGULAR = ("dog", "girl", "teacher", "car", "house", "tree", "bird", "king", "letter", "river")
_PLURAL = tuple(f"{noun}s" for noun in _SINGULAR)
_BETWEEN = ("near the {}", "behind the {}", "beside the {}")


def recall(**metadata: object) -> dict[str, Dataset]:
    """Four boxes with a number each; which number has the one that is asked for? One choice of four."""
    draw, items = random.Random(1), []
    for _ in range(NUM_ITEMS):
        colours, numbers = draw.sample(_COLOURS, 4), [str(number) for number in draw.sample(range(10), 4)]
        said = " ".join(f"The {colour} box has number {n}." for colour, n in zip(colours, numbers, strict=True))
        label = draw.randrange(4)
        items.append({"query": f"{said} The {colours[label]} box has number", "choices": numbers, "label": label})
    return {"test": Dataset.from_list(items)}


def agreement(**metadata: object) -> dict[str, Dataset]:
    """A verb that agrees with its subject, with a noun of the other number between them. One choice of two."""
    draw, items = random.Random(2), []
    for number in range(NUM_ITEMS):
        plural = number % 2
        subject, other = draw.choice((_SINGULAR, _PLURAL)[plural]), draw.choice((_PLURAL, _SINGULAR)[plural])
        query = f"The {subject} {draw.choice(_BETWEEN).format(other)}"
        items.append({"query": query, "choices": ["is", "are"], "label": plural})
    return {"test": Dataset.from_list(items)}


def addition(**metadata: object) -> dict[str, Dataset]:
    """The sum of two numbers below 50, beside three that are near it. One choice of four."""
    draw, items = random.Random(3), []
    for _ in range(NUM_ITEMS):
        first, second = draw.randrange(50), draw.randrange(50)
        total = first + second
        near = [total + off for off in (-10, -2, -1, 1, 2, 10) if total + off >= 0]
        choices = [str(number) for number in draw.sample(near, 3)]
        label = draw.randrange(4)
        choices.insert(label, str(total))
        items.append({"query": f"{first} + {second} =", "choices": choices, "label": label})
    return {"test": Dataset.from_list(items)}
