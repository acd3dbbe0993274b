"""Generated mathematics: short questions with exact answers, in the manner of the DeepMind Mathematics dataset.

Each document holds 8 to 24 questions of one to three kinds and of one difficulty (the number of digits). The text is a
pure function of the seed, so the domain needs no file, and every answer can be checked by recomputing it.
"""

import math
from collections.abc import Callable, Iterator
from random import Random

_Question = tuple[str, str]
_DIGITS = "0123456789abcdef"
_PLACES = ("units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")


def math_documents(max_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yields documents of questions and answers until the next would pass ``max_bytes`` bytes of text.

    Args:
        max_bytes: Total size of the documents in bytes (the text is ASCII).
        seed: Seed of the generator.

    Yields:
        Documents of lines ``Q: ...`` and ``A: ...`` in turn.
    """
    rng = Random(f"moebed mathematics {seed}")
    while True:
        kinds = rng.sample(KINDS, rng.randint(1, 3))
        digits = rng.randint(1, 5)
        questions = [rng.choice(kinds)(rng, digits) for _ in range(rng.randint(8, 24))]
        document = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in questions)
        if len(document) > max_bytes:
            return
        max_bytes -= len(document)
        yield document


def _number(rng: Random, digits: int, signed: bool = True) -> int:
    """A number of up to this many digits, small ones about as frequent as large ones."""
    value = rng.randrange(1, 10 ** rng.randint(1, digits))
    return -value if signed and rng.random() < 0.25 else value


def _sum(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits), _number(rng, digits)
    form = rng.choice(["What is {a} + {b}?", "Add {a} and {b}.", "Calculate {a} + {b}."])
    return form.format(a=a, b=b), str(a + b)


def _difference(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits), _number(rng, digits, signed=False)
    form = rng.choice(["What is {a} - {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}."])
    return form.format(a=a, b=b), str(a - b)


def _product(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits), _number(rng, max(1, digits - 1))
    form = rng.choice(["What is {a} * {b}?", "Multiply {a} and {b}.", "Calculate the product of {a} and {b}."])
    return form.format(a=a, b=b), str(a * b)


def _quotient(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits), _number(rng, max(1, digits - 1), signed=False)
    return rng.choice(["Divide {a} by {b}.", "What is {a} / {b}?"]).format(a=a * b, b=b), str(a)


def _remainder(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits + 1, signed=False), _number(rng, digits, signed=False)
    return f"What is the remainder when {a} is divided by {b}?", str(a % b)


def _gcd(rng: Random, digits: int) -> _Question:
    common = _number(rng, max(1, digits - 1), signed=False)
    a, b = common * rng.randint(1, 40), common * rng.randint(1, 40)
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b))


def _lcm(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, min(digits, 3), signed=False), _number(rng, min(digits, 3), signed=False)
    return f"What is the least common multiple of {a} and {b}?", str(math.lcm(a, b))


def _signed_terms(terms: list[tuple[int, str]]) -> str:
    """Writes coefficients and powers as one would: ``3*x**2 - x + 4``."""
    text = ""
    for coefficient, power in terms:
        size = abs(coefficient)
        body = str(size) if not power else power if size == 1 else f"{size}*{power}"
        sign = "-" if coefficient < 0 else "+"
        text += f" {sign} {body}" if text else ("-" if coefficient < 0 else "") + body
    return text


def _linear_equation(rng: Random, digits: int) -> _Question:
    slope, solution, constant = _number(rng, min(digits, 2)), _number(rng, digits), _number(rng, digits)
    variable = rng.choice("abcdhkmnpqrstuvwxyz")
    left = _signed_terms([(slope, variable), (constant, "")])
    return f"Solve {left} = {slope * solution + constant} for {variable}.", str(solution)


def _power(rng: Random, digits: int) -> _Question:
    base, exponent = _number(rng, min(digits, 2)), rng.randint(2, 5)
    return f"What is {base} to the power of {exponent}?", str(base**exponent)


def _polynomial(rng: Random, digits: int) -> _Question:
    coefficients = [_number(rng, min(digits, 2)) for _ in range(rng.randint(2, 4))]
    x, name = _number(rng, 1), rng.choice("fghjpqr")
    powers = ["x" + f"**{i}" * (i > 1) if i else "" for i in range(len(coefficients))]
    terms = _signed_terms(list(zip(coefficients, powers, strict=True))[::-1])
    value = sum(c * x**i for i, c in enumerate(coefficients))
    return f"Let {name}(x) = {terms}. What is {name}({x})?", str(value)


def _place_value(rng: Random, digits: int) -> _Question:
    number = rng.randrange(10**digits, 10 ** (digits + 1))
    place = rng.randint(0, digits)
    return f"What is the {_PLACES[place]} digit of {number}?", str(number // 10**place % 10)


def _comparison(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, digits), _number(rng, digits)
    b += a == b
    word, answer = rng.choice([("bigger", max(a, b)), ("smaller", min(a, b))])
    return f"Which is {word}: {a} or {b}?", str(answer)


def _sorting(rng: Random, digits: int) -> _Question:
    numbers = [_number(rng, digits) for _ in range(rng.randint(3, 6))]
    word, descending = rng.choice([("increasing", False), ("decreasing", True)])
    listed = ", ".join(map(str, numbers))
    return f"Sort {listed} in {word} order.", ", ".join(map(str, sorted(numbers, reverse=descending)))


def _sequence(rng: Random, digits: int) -> _Question:
    start, slope = _number(rng, digits), _number(rng, max(1, digits - 1))
    curve = rng.choice([0, 0, rng.randint(1, 9)])
    terms = [start + slope * i + curve * i * i for i in range(rng.randint(4, 6) + 1)]
    return f"What is the next term in {', '.join(map(str, terms[:-1]))}?", str(terms[-1])


def _in_base(value: int, base: int) -> str:
    text = ""
    while value:
        value, digit = divmod(value, base)
        text = _DIGITS[digit] + text
    return text


def _base_conversion(rng: Random, digits: int) -> _Question:
    value, base = _number(rng, digits, signed=False), rng.choice([2, 3, 5, 8, 12, 16])
    if rng.random() < 0.5:
        return f"What is {value} (base 10) in base {base}?", _in_base(value, base)
    return f"What is {_in_base(value, base)} (base {base}) in base 10?", str(value)


def _fraction(rng: Random, digits: int) -> _Question:
    a, b = _number(rng, min(digits, 2), signed=False), _number(rng, min(digits, 2), signed=False)
    scale = rng.randint(2, 30)
    common = math.gcd(a, b)
    answer = str(a // common) if b == common else f"{a // common}/{b // common}"
    return f"Simplify {a * scale}/{b * scale}.", answer


def _factors(rng: Random, digits: int) -> _Question:
    number = rest = _number(rng, min(digits, 4), signed=False) + 1
    found = []
    for divisor in range(2, number + 1):
        if divisor * divisor > rest:
            break
        while rest % divisor == 0:
            found.append(divisor)
            rest //= divisor
    found += [rest] if rest > 1 else []
    if rng.random() < 0.4:
        return f"Is {number} a prime number?", "yes" if len(found) == 1 else "no"
    return f"List the prime factors of {number}.", ", ".join(map(str, sorted(set(found))))


KINDS: tuple[Callable[[Random, int], _Question], ...] = (
    *(_sum, _difference, _product, _quotient, _remainder, _gcd, _lcm, _linear_equation, _power, _polynomial),
    *(_place_value, _comparison, _sorting, _sequence, _base_conversion, _fraction, _factors),
)
