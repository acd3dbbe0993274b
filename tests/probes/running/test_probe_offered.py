"""What a module and a datamodule of one's own offer to the probes."""

from types import SimpleNamespace

import pytest
import torch

from moebed.errors import UserError
from probes.running.offered import probe_text, views_of

IDS = torch.arange(32).view(2, 16)
RIGHT = {"input_ids": IDS, "labels": IDS, "domain": torch.zeros(2, dtype=torch.long)}


class Text:
    """A datamodule of one's own."""

    domains = ("mine",)

    def __init__(self, batch):
        self.batch = batch

    def probe_batch(self, num_sequences):
        return self.batch


def text_of(batch, **changes):
    data = Text(batch)
    for name, value in changes.items():
        setattr(data, name, value)
    return probe_text(SimpleNamespace(datamodule=data), 2)


def test_a_text_of_ones_own_is_taken():
    text = text_of(RIGHT, domains=["a"])
    assert (text.domains, text.input_ids.shape, bool(text.token_mask.all())) == (("a",), (2, 16), True)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            (IDS, IDS),
            r"Text.probe_batch gives a tuple; it must give input_ids \(B, S\), labels \(B, S\), domain \(B,\)",
        ),
        ({"input_ids": IDS}, r"labels is missing; it must be whole numbers \(B, S\)"),
        (RIGHT | {"labels": IDS[:, :5]}, r"gives input_ids \(2, 16\), labels \(2, 5\), domain \(2,\); it must give"),
        (RIGHT | {"input_ids": IDS.float()}, r"input_ids is torch.float32 \(2, 16\); it must be whole numbers"),
        (RIGHT | {"input_ids": IDS[0]}, r"input_ids is torch.int64 \(16,\); it must be whole numbers \(B, S\)"),
        (RIGHT | {"domain": [0, 0]}, r"domain is list; it must be whole numbers \(B,\)"),
        (RIGHT | {"domain": torch.tensor([0])}, r"domain \(1,\); it must give .* of the same B and S"),
        (RIGHT | {"domain": torch.tensor([0, 1])}, r"domain has numbers from 0 to 1; domains are 1"),
        (RIGHT | {"labels": torch.full_like(IDS, -100)}, "holds no tokens"),
    ],
)
def test_what_is_no_text_is_one_line(batch, said):
    with pytest.raises(UserError, match=said):
        text_of(batch)


@pytest.mark.parametrize("domains", [None, "mine"])
def test_domains_have_names(domains):
    with pytest.raises(UserError, match="Text has no domains; give it the names"):
        text_of(RIGHT, domains=domains)


@pytest.mark.parametrize(
    ("given", "said"), [(None, "gives a NoneType; it must"), ([1, 2], "gives one of type int; each")]
)
def test_what_is_no_view_is_one_line(given, said):
    class Mine:
        """A module of one's own."""

        def views(self, text, needs):
            return given

    with pytest.raises(UserError, match=f"Mine.views {said}"):
        list(views_of(Mine(), None, frozenset()))
    with pytest.raises(UserError, match="SimpleNamespace has no views"):
        views_of(SimpleNamespace(), None, frozenset())


def test_a_walk_is_closed_with_its_views():
    """After an error too: it restores the model."""
    closed = []

    def walk():
        try:
            yield 1
        finally:
            closed.append(True)

    views = views_of(SimpleNamespace(views=lambda text, needs: walk()), None, frozenset())
    with pytest.raises(UserError, match="gives one of type int"):
        next(views)
    assert closed
