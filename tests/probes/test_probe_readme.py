"""The example in the README works as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "probes" / "README.md"


def test_the_example_probe(make_decoder, text):
    define, use = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names = {"decoder": make_decoder(num_experts=[4, 0, 6]), "text": text}
    exec(define + use, names)
    result = names["result"]
    assert list(result.arrays) == ["top_prob/0", "top_prob/2"]
    assert result.arrays["top_prob/0"].shape == ()
    assert result.headlines["top_prob"].value == pytest.approx(result.scalars["top_prob"])
