"""Every static probe against the values computed from the published layouts' own weights."""

import dataclasses
import json

import numpy as np
import pytest
from oracle_models import load_decoder
from probe_cases import probe
from safetensors.torch import load_file

from moebed.views.layer import LayerView, Need
from moebed.views.live import walk
from probes.registry import STATIC_PROBES
from tests.conftest import ORACLES

pytestmark = pytest.mark.shared("oracles")


@dataclasses.dataclass
class ReferencedView(LayerView):
    """A view that knows the same layer of a dense model."""

    dense: dict = dataclasses.field(default_factory=dict)

    def reference_matrix(self, name):
        return self.dense[f"model.layers.{self.index}.mlp.{name}_proj.weight"]


def views(name):
    walked = walk(load_decoder(name), None, frozenset({Need.WEIGHTS}))
    if name != "mixtral":
        return walked
    folder = ORACLES / "mistral"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    dense = {key: value for file in set(index.values()) for key, value in load_file(folder / file).items()}

    def referenced():
        for view in walked:
            fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view) if field.init}
            yield ReferencedView(**fields, dense=dense)

    return referenced()


@pytest.mark.parametrize("name", ["mixtral", "deepseekmoe", "grok-1"])
def test_static(name):
    results = probe(views(name), *STATIC_PROBES)
    found = {}
    for result in results.values():
        for key, value in result.arrays.items():
            found.setdefault(key, value)
    # gate_projection keeps the routed experts alone; the whole matrix is neuron_similarity's.
    wanted = np.load(ORACLES / name / "expected_static.npz")
    for key in wanted.files:
        value = found[key.replace("_abs", "")]
        want = wanted[key]
        if key.startswith("matrix_pca_abs"):
            value = np.abs(
                value[: len(want)]
            )  # the dense FFN, which the wanted ones leave out, is projected after them
        if key.startswith("matrix_cos"):
            want = want[: len(value), : len(value)]
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=key)
