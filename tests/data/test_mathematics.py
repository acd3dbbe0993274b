"""Every generated answer is recomputed by other means than the generator's."""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest

from moebed.data.mathematics import KINDS, math_documents

_N = r"(-?\d+)"
_PLACES = ["units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands"]


def _next_term(terms: list[int]) -> int:
    rows = [terms]
    while any(rows[-1]):
        rows.append([b - a for a, b in pairwise(rows[-1])])
    return sum(row[-1] for row in rows)


def _divisors(n: int) -> set[int]:
    return {d for d in range(1, n + 1) if n % d == 0}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _linear(left: str, right: str, name: str) -> str:
    at = [eval(re.sub(rf"\b{name}\b", f"({value})", left)) for value in (0, 1)]
    return str(Fraction(int(right) - at[0], at[1] - at[0]))


def _common(a: str, b: str) -> int:
    return max(d for d in range(1, min(int(a), int(b)) + 1) if int(a) % d == int(b) % d == 0)


def _converted(text: str, source: str, target: str, answer: str) -> str:
    duodecimal_safe = int(text, int(source)) == int(answer, int(target))
    return answer if duodecimal_safe and not answer.startswith("0") else "wrong"


RULES: list[tuple[str, Callable[..., str]]] = [
    (rf"(?:What is|Calculate) {_N} \+ {_N}[?.]|Add {_N} and {_N}\.", lambda a, b, c, d: str(int(a or c) + int(b or d))),
    (rf"(?:What is|Calculate) {_N} - {_N}[?.]", lambda a, b: str(int(a) - int(b))),
    (rf"Subtract {_N} from {_N}\.", lambda b, a: str(int(a) - int(b))),
    (rf"(?:What is|Multiply|Calculate the product of) {_N} (?:\*|and) {_N}[?.]", lambda a, b: str(int(a) * int(b))),
    (rf"(?:What is|Divide) {_N} (?:/|by) {_N}[?.]", lambda a, b: str(Fraction(int(a), int(b)))),
    (rf"What is the remainder when {_N} is divided by {_N}\?", lambda a, b: str(int(a) - int(a) // int(b) * int(b))),
    (rf"What is the greatest common divisor of {_N} and {_N}\?", lambda a, b: str(_common(a, b))),
    (rf"What is the least common multiple of {_N} and {_N}\?", lambda a, b: str(int(a) * int(b) // _common(a, b))),
    (rf"Solve (.+) = {_N} for ([a-z])\.", _linear),
    (rf"What is {_N} to the power of {_N}\?", lambda a, b: str(eval("*".join([f"({a})"] * int(b))))),
    (
        rf"Let ([a-z])\(x\) = (.+)\. What is \1\({_N}\)\?",
        lambda _, terms, x: str(eval(re.sub(r"\bx\b", f"({x})", terms))),
    ),
    (rf"What is the ([a-z ]+) digit of {_N}\?", lambda place, n: n[-1 - _PLACES.index(place)]),
    (
        rf"Which is (bigger|smaller): {_N} or {_N}\?",
        lambda word, a, b: a if (int(a) > int(b)) == (word == "bigger") else b,
    ),
    (
        r"Sort (.+) in (increasing|decreasing) order\.",
        lambda listed, word: ", ".join(
            sorted(listed.split(", "), key=lambda n: int(n) * (1 if word[0] == "i" else -1))
        ),
    ),
    (r"What is the next term in (.+)\?", lambda listed: str(_next_term([int(n) for n in listed.split(", ")]))),
    (rf"Simplify {_N}/{_N}\.", lambda a, b: str(Fraction(int(a), int(b)))),
    (rf"Is {_N} a prime number\?", lambda n: "yes" if _is_prime(int(n)) else "no"),
    (
        rf"List the prime factors of {_N}\.",
        lambda n: ", ".join(str(d) for d in sorted(_divisors(int(n))) if _is_prime(d)),
    ),
]


def _recomputed(question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"What is ([0-9a-f]+) \(base (\d+)\) in base (\d+)\?", question):
        return _converted(*match.groups(), answer)
    for pattern, rule in RULES:
        if match := re.fullmatch(pattern, question):
            return rule(*match.groups())
    return None


def test_every_answer_is_right_and_every_kind_occurs() -> None:
    text = "".join(math_documents(120_000))
    pairs = re.findall(r"Q: (.+)\nA: (.+)\n", text)
    assert "".join(f"Q: {q}\nA: {a}\n" for q, a in pairs) == text
    assert [(q, a) for q, a in pairs if _recomputed(q, a) != a] == []
    seen = {next((p for p, _ in RULES if re.fullmatch(p, q)), "base") for q, _ in pairs}
    assert len(seen) == len(RULES) + 1
    assert len(KINDS) == 17


@pytest.mark.parametrize("wrong", [("What is 2 + 2?", "5"), ("What is ff (base 16) in base 10?", "254")])
def test_the_check_notices_a_wrong_answer(wrong: tuple[str, str]) -> None:
    assert _recomputed(*wrong) != wrong[1]


def test_text_is_a_function_of_the_seed_and_fits_the_size() -> None:
    first, again, other = (list(math_documents(20_000, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert 17_000 < sum(map(len, first)) <= 20_000
