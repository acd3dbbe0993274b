"""A streamed expert's weights are moved and cast once for all tokens, however many blocks these go through in."""

import collections

import pytest
import torch
from checkpoint_files import SIZES, write
from streamed_cases import make_text
from torch.utils._python_dispatch import TorchDispatchMode

from moebed.checkpoints import open_ffn
from moebed.checkpoints.pretrained import PretrainedMoE
from probes.registry import PROBES
from probes.running.driver import needs_of, run_probes

MATRIX = SIZES["moe_intermediate_size"] * SIZES["hidden_size"]


class _Casts(TorchDispatchMode):
    """Counts what becomes float32 of another type, by how many numbers it has."""

    def __init__(self):
        super().__init__()
        self.sizes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._opname in ("copy_", "_to_copy"):
            source = args[1] if func._opname == "copy_" else args[0]
            self.sizes[source.numel()] += source.dtype == torch.bfloat16 and out.dtype == torch.float32
        return out


@pytest.mark.parametrize("tokens", [60, 7, 1])
def test_an_expert_is_cast_once(tmp_path, tokens, monkeypatch):
    """Every expert sees every token, in one block, in nine, and in one for each token."""
    write(tmp_path / "model")
    text = make_text(30, 30)
    found = []
    for limit in (1 << 25, tokens * SIZES["moe_intermediate_size"]):
        monkeypatch.setattr(open_ffn, "_ACTIVATIONS_AT_A_TIME", limit)
        model = PretrainedMoE(str(tmp_path / "model"), text=text)
        probes = [PROBES["activations"]()]
        with _Casts() as casts:
            found.append(run_probes(model.views(text, needs_of(probes)), probes)["activations"].arrays)
        model.close()
        assert casts.sizes[MATRIX] == 3 * SIZES["num_experts"] * SIZES["num_hidden_layers"]
    for key, values in found[0].items():
        if values.dtype.kind == "f":
            torch.testing.assert_close(torch.from_numpy(found[1][key]), torch.from_numpy(values))
