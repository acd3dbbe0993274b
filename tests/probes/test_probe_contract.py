"""The contract itself: names of arrays, what a layer begins with, what runs after what."""

import numpy as np
import pytest
import torch

from moebed.errors import ConfigError, UserError
from moebed.views.layer import Need
from probes.contract import ArrayName, Probe, by_layer, by_part, find, in_order, numbers
from probes.registry import PROBES
from probes.running.driver import PER_EXPERT, run_probes
from tests.probes.output_cases import GivenOutputs, output_view


@pytest.mark.parametrize(
    ("name", "taken_apart"),
    [
        ("load/7", ("load", 7, "")),
        ("matrix_cos/12/up", ("matrix_cos", 12, "up")),
        ("repeat_any/0/all%2", ("repeat_any", 0, "all%2")),
        ("unit_stratum", ("unit_stratum", None, "")),
        ("loss/web", ("loss", None, "web")),
    ],
)
def test_a_name_is_read_as_it_was_written(name, taken_apart):
    assert ArrayName.of(name) == taken_apart
    assert str(ArrayName(*taken_apart)) == name


def test_what_is_put_is_found():
    probe = Probe()
    probe.put("steps", None, np.arange(3))
    for layer in (10, 2):
        probe.put("share", layer, layer / 4)
        probe.put("cos", layer, torch.eye(layer, dtype=torch.float64), "up")
        probe.put("count", layer, layer, "up")
    probe.put("count", 2, 5, "down")
    assert numbers(probe.arrays, "share") == {2: 0.5, 10: 2.5}
    assert list(numbers(probe.arrays, "share")) == [2, 10]
    assert by_part(probe.arrays, "count") == {"up": {2: 2, 10: 10}, "down": {2: 5}}
    assert by_layer(probe.arrays, "cos", "up")[10].shape == (10, 10)
    assert not by_layer(probe.arrays, "cos")
    assert not by_layer(probe.arrays, "steps")
    assert find(probe.arrays, "count", 2, "down") == 5
    assert find(probe.arrays, "count", 10, "down") is None
    assert {str(value.dtype) for value in probe.arrays.values()} == {"float32", "int64"}
    probe.forget(2)
    assert sorted(probe.arrays) == ["cos/10/up", "count/10/up", "share/10", "steps"]
    probe.drop("count")
    assert sorted(probe.arrays) == ["cos/10/up", "share/10", "steps"]


OUTPUTS = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))


class Seen(Probe):
    """Notes what each expert of a layer is called, in what serves that layer alone."""

    name, question, needs = "seen", "?", frozenset({Need.OUTPUTS})

    def begin_layer(self, view):
        self.labels = []

    def update_expert(self, view, expert):
        self.labels.append(expert.label)

    def update(self, view):
        self.arrays[f"labels/{view.index}"] = np.array(self.labels)


def test_a_layer_begins_anew_after_one_that_failed_halfway():
    class Broken(GivenOutputs):
        def run_experts(self, x, watch=None, beside=None):
            yield from list(super().run_experts(x, watch))[:2]
            raise UserError("unreadable")

    def run(*layers):
        views = [output_view(OUTPUTS, [[0]] * 4, layer, {"SE": torch.ones(4, 2)}) for layer in layers]
        views[-1].reference_output = torch.ones(4, 2)
        for view in views[:-1]:
            view.weights = Broken(OUTPUTS)
        looking = [kind for kind in PROBES.values() if kind.needs & PER_EXPERT]
        return run_probes(views, [kind() for kind in (Seen, *looking)])

    both, alone = run(0, 1), run(1)
    assert alone["seen"].arrays["labels/1"].tolist() == ["0", "1", "2", "SE", "F"]
    assert len(alone) > 4
    for name, result in alone.items():
        assert both[name].arrays.keys() == result.arrays.keys() != set(), name
        for key, value in result.arrays.items():
            np.testing.assert_array_equal(both[name].arrays[key], value, err_msg=f"{name} {key}")


def made(name, sources=(), optional=()):
    """A probe that takes its numbers from others."""
    return type(name, (Probe,), {"name": name, "needs": frozenset(), "sources": sources, "optional_sources": optional})


def test_what_a_probe_takes_its_numbers_from_runs_before_it():
    known = {"a": made("a", ("b",), ("d",)), "b": made("b", ("c",)), "c": made("c"), "d": made("d", ("c",))}
    assert in_order(["a"], known) == ("c", "b", "a")
    found = in_order(["a", "d", "c"], known)
    assert sorted(found) == ["a", "b", "c", "d"]
    assert found.index("c") < found.index("b") < found.index("a") > found.index("d")


@pytest.mark.parametrize(
    ("b", "said"),
    [
        (made("b", ("a",)), "probes: (a and b|b and a) take their numbers from one another"),
        (made("b", (), ("a",)), "probes: (a and b|b and a) take their numbers from one another"),
        (made("b", ("c",)), "probes: b takes its numbers from 'c', which is no probe here"),
    ],
)
def test_sources_that_cannot_be_had_are_refused_in_one_line(b, said):
    known = {"a": made("a", ("b",)), "b": b}
    with pytest.raises(ConfigError, match=f"^{said}$"):
        in_order(["a"], known)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        run_probes([], [probe() for probe in known.values()])
