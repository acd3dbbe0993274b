"""What is settled is asked for once, while a graph is traced."""

from pathlib import Path

import torch

from moebed.machine.settled import settled

asked = []


@settled
def _answer(of: str) -> int:
    asked.append(Path(__file__).read_text(encoding="utf-8"))  # which cannot be traced
    return len(of)


def test_a_settled_answer_breaks_no_graph():
    compiled = torch.compile(lambda x: x + _answer("four"), fullgraph=True, backend="eager")
    before = len(asked)
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [5, 5]
    assert len(asked) == before + 1
