"""The probes, and with them the decoder, against values computed with the published reference models."""

import numpy as np
import pytest
import torch
from oracle_models import load_decoder
from probe_cases import all_needs, probe

from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.contract import by_layer
from probes.registry import PROBES
from tests.conftest import ORACLES

pytestmark = pytest.mark.shared("oracles")
FAMILIES = ("mixtral", "deepseekmoe", "grok-1")


def assert_close(found, wanted, what):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=what)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, load_decoder(request.param)


@pytest.mark.parametrize("length", ["short", "long"])
def test_dynamic(family, length):
    name, decoder = family
    wanted = np.load(ORACLES / name / f"expected_dynamic_{length}.npz")
    ids = torch.from_numpy(wanted["input_ids"]).unsqueeze(0)
    with torch.no_grad():
        assert_close(decoder.eval()(ids).logits[0].numpy(), wanted["logits"], "logits")
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    results = probe(walk(decoder, text, all_needs()), "routing", "norm_vs_score")
    arrays = {**results["routing"].arrays, **results["norm_vs_score"].arrays}
    compared = 0
    for key in wanted.files:
        kind = key.split("/")[0]
        if kind in ("topk_index", "rank_count_score_by_norm"):
            np.testing.assert_array_equal(arrays[key], wanted[key], err_msg=key)
        elif kind in ("router_probs", "topk_weight", "output_norm"):
            assert_close(arrays[key], wanted[key], key)
        else:
            continue
        compared += 1
    assert compared == 5 * len(decoder.config.moe_layers)


def test_static(family):
    name, decoder = family
    wanted = np.load(ORACLES / name / "expected_static.npz")
    results = probe(walk(decoder, None, all_needs()), "matrix_similarity", "gate_similarity")
    layers = decoder.config.moe_layers
    assert list(by_layer(results["gate_similarity"].arrays, "gate_cos")) == layers
    for layer in layers:
        assert_close(
            results["gate_similarity"].arrays[f"gate_cos/{layer}"], wanted[f"gate_cos/{layer}"], f"gate {layer}"
        )
        for matrix in ("up", "gate", "down"):
            found = results["matrix_similarity"].arrays[f"matrix_cos/{layer}/{matrix}"]
            # Where there is one more row than experts, it is the dense reference FFN's.
            other = wanted[f"matrix_cos/{layer}/{matrix}"][: len(found), : len(found)]
            assert len(found) == decoder.config.layer(layer).num_experts
            assert_close(found, other, f"{layer} {matrix}")


def test_every_probe_describes_them(family):
    """Figures are built from arrays, which have no family: the driver's test builds those of layers of every kind."""
    _, decoder = family
    ids = torch.arange(24).view(2, 12)
    text = ProbeText(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 1]), ("one", "two"))
    for result in probe(walk(decoder, text, all_needs()), *PROBES).values():
        assert result.notes or result.headlines
