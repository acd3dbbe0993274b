"""How often all probes of a model on the device make the host wait, and how that grows.

``python -m tests.emulated_cuda python -m tests.emulated_cuda.probe_waits`` prints JSON: for a model of 2 layers and 6
experts, the same with 4 layers, with 12 experts, and with three times the text, the waits by place.
"""

import json
from collections import Counter
from dataclasses import replace

import torch

from moebed.check import probing
from moebed.model.decoder import Decoder
from moebed.views.layer import ProbeText
from moebed.views.live import walk
from probes.registry import PROBES
from probes.running.choosing import probes_for
from probes.running.driver import needs_of, run_probes
from tests.emulated_cuda.waits import noted

LAYERS, EXPERTS = 2, 6
CASES = {"base": {}, "layers": {"layers": 2 * LAYERS}, "experts": {"experts": 2 * EXPERTS}, "text": {"times": 3}}


def count(layers: int = LAYERS, experts: int = EXPERTS, times: int = 1) -> Counter[str]:
    """Waits by place, of all probes together."""
    torch.manual_seed(3)
    config = replace(probing.CONFIG, num_hidden_layers=layers, num_experts=experts)
    model, text = Decoder(config).eval().to("cuda"), probing.text()
    parts = (torch.cat([part] * times) for part in (text.input_ids, text.token_mask, text.domain))
    text, probes = ProbeText(*parts, text.domains), [PROBES[name]() for name in probes_for(["all"], True)]
    with noted() as found:
        run_probes(walk(model, text, needs_of(probes)), probes)
    return found


if __name__ == "__main__":
    count()  # what is asked once a process
    print(json.dumps({name: count(**sizes) for name, sizes in CASES.items()}))
