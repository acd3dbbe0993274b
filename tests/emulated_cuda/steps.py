"""Training steps of every router and kind of block: the losses of the device beside a CPU's, and how often it waits.

``python -m tests.emulated_cuda python -m tests.emulated_cuda.steps [CASE...]`` prints a line of JSON for each case.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from moebed.check.runs import SMALL, WARM, WATCHED, Run, Watch, fit, largest_difference, steps
from moebed.model.routers import ROUTERS

OPTIONS = {"d_low": 8, "competition_rate": 1.0, "num_domains": 1}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
HYPER = {"adapter_size": 8, "expert_embedding_size": 6, "layer_embedding_size": 4, "generator_size": 10}
BLOCKS = {
    "shared expert": {"num_shared_experts": 1},
    "other sizes by layer": {"num_experts": (4, 8), "num_experts_per_tok": (1, 2), "moe_intermediate_size": (64, 32)},
    "dense layer": {"num_experts": (0, 8), "num_experts_per_tok": (0, 2), "intermediate_size": 64},
    "latent attention": LATENT,
    "no balancing": {"router_aux_loss_coef": 0.0},
    "z-loss": {"router_z_loss_coef": 1e-3},
    "sequence scope": {"router_aux_loss_scope": "sequence"},
    "window scope": {"router_aux_loss_scope": "window"},
    "diversity losses": {
        "output_orthogonality_loss_coef": 1.0, "probability_variance_loss_coef": 1.0,
        "router_orthogonality_loss_coef": 1.0, "router_coupling_loss_coef": 1.0,
    },
    "HyperMoE": {"hyper_experts": HYPER},
}  # fmt: skip
CASES = {
    **{f"router {name}": {"router": name, "router_options": OPTIONS} for name in ROUTERS},
    **BLOCKS,
}


def case(name: str, folder: Path) -> dict[str, object]:
    """Losses, gradient norms and waits of one case."""
    config = replace(SMALL, **{"experts_backend": "grouped_mm", **CASES[name]})
    watch, total = Watch(), WARM + WATCHED + 1
    wanted, _ = steps(Run(folder / "cpu", "cpu", total, config))
    found, _ = steps(Run(folder / "cuda", "cuda", total, config))
    fit(Run(folder / "waits", "cuda", total, config, "bf16-mixed", callbacks=[watch]))
    places = {where: watch.found.count(where) / WATCHED for where in set(watch.found)}
    return {"case": name, "difference": largest_difference(found, wanted), "waits": places}


def main() -> None:
    """Each case named, or all."""
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = case(name, Path(folder))
            except Exception as error:  # noqa: BLE001  # the other cases are asked too
                found = {"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
