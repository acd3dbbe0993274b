"""The same run in every layout: the same losses, balancing, validation and probes; and one layout continues another."""

import json

import pytest
import torch

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import load_decoder
from probes.registry import PROBES
from probes.running.tags import COST, is_of_probes
from tests.parallel.forked import run
from tests.parallel.parallel_runs import LAYOUTS, curves, fit, recipe

STEPS = 20
TRAINED = ("train/loss", "train/grad_norm", "train/load_balancing_loss", "train/router_z_loss", "val/bits_per_byte")


def is_probed(tag: str) -> bool:
    """Whether a tag has what a probe found, which is the same in every layout, as times are not."""
    return is_of_probes(tag, PROBES) and not tag.startswith(f"{COST}/")


def _largest(found: dict, wanted: dict, tags: list[str]) -> float:
    """Largest relative difference over all steps of these tags."""
    return max(
        abs(found[tag][step] - value) / max(abs(value), 1e-3) for tag in tags for step, value in wanted[tag].items()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What twenty steps in one process log."""
    folder = tmp_path_factory.mktemp("whole")
    run(*fit(recipe(folder, STEPS), folder / "run", "1 process"), folder / "logs")
    return curves(folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_layout_trains_the_same_model(tmp_path, whole):
    path, rows = recipe(tmp_path, STEPS), []
    probed = [tag for tag in whole if is_probed(tag)]
    assert len(probed) > 20
    for layout in [one for one in LAYOUTS if one != "1 process"]:
        arguments, ranks = fit(path, tmp_path / layout, layout)
        run(arguments, ranks, tmp_path / "logs" / layout)
        found = curves(tmp_path / layout)
        assert len(found["train/loss"]) == STEPS
        assert probed == [tag for tag in found if is_probed(tag)]
        row = {tag: _largest(found, whole, [tag]) for tag in TRAINED} | {"probes": _largest(found, whole, probed)}
        rows.append((layout, row))
    print("\nlargest relative difference from one process, over 20 steps")
    print(f"{'':14}" + "".join(f"{tag.split('/')[-1]:>22}" for tag in rows[0][1]))
    for layout, row in rows:
        print(f"{layout:14}" + "".join(f"{value:22.1e}" for value in row.values()))
    for layout, row in rows:
        assert max(row[tag] for tag in TRAINED) < 1e-5, layout
        assert row["probes"] < 1e-2, layout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_layout_has_the_same_selection_bias(tmp_path):
    """Loss-free balancing moves each bias by the assignments of all ranks, once an optimizer step."""
    path, biases = recipe(tmp_path, 6, router="sigmoid_topk", router_options={"bias_update_rate": 0.001}), {}
    for layout in ("1 process", "DDP-2", "FSDP2-2", "EP-2"):
        arguments, ranks = fit(path, tmp_path / layout, layout)
        run(arguments, ranks, tmp_path / "logs" / layout)
        decoder = load_decoder(Checkpoint.open(tmp_path / layout / "checkpoints" / "last.ckpt"))
        biases[layout] = torch.stack([router.expert_bias for router in decoder.routers])
    assert biases["1 process"].abs().max() > 0.001  # more than one step has moved it
    for layout, bias in biases.items():
        assert torch.equal(bias, biases["1 process"]), layout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapters", ["unchosen", "constant", "free"])
def test_every_layout_trains_the_same_hyper_experts(tmp_path, adapters):
    """Each rank generates the adapters of its own tokens; the generator's gradient is the mean over all of them."""
    settings = {"hyper_experts": {"adapters": adapters}, "num_experts_per_tok": 1, "norm_topk_prob": False}
    path, weights, found = recipe(tmp_path, 6, **settings), {}, {}
    for layout in ("1 process", "DDP-2", "FSDP2-2", "EP-2"):
        arguments, ranks = fit(path, tmp_path / layout, layout, "--trainer.val_check_interval", "3")
        run(arguments, ranks, tmp_path / "logs" / layout)
        found[layout] = curves(tmp_path / layout)
        weights[layout] = load_decoder(Checkpoint.open(tmp_path / layout / "checkpoints" / "last.ckpt")).stored()
    for layout, numbers in found.items():
        for tag in ("train/loss", "train/grad_norm", "val/bits_per_byte"):
            assert len(numbers[tag]) > 1
            assert _largest(numbers, found["1 process"], [tag]) < 1e-5, (layout, tag)
        for name, weight in weights[layout].items():
            if "adapter" in name or "hyper_experts" in name:
                # In norm: where a gradient is nearly 0, Adam's step has the size of the others whatever its sign.
                wanted = weights["1 process"][name]
                assert torch.dist(weight, wanted) < 1e-3 * wanted.norm(), (layout, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ("FSDP2×EP", "1 process", []),
        ("1 process", "FSDP2-2", []),
        ("EP-2", "DDP-2", []),
        ("DDP-2", "EP-2", ["--parallel.checkpoint", "file"]),
    ],
)
def test_another_layout_continues_a_run(tmp_path, whole, first, second, options):
    """Ten steps in one layout and ten in another are twenty steps in one process."""
    path, parts = recipe(tmp_path, STEPS), tmp_path / "parts"
    # The learning rate still warms up, so it does not depend on how many steps there will be.
    stop = ["--trainer.max_steps", "10"]
    arguments, ranks = fit(path, parts, first, *stop)
    run(arguments, ranks, tmp_path / "logs" / "first")
    arguments, ranks = fit(path, parts, second, "--ckpt_path", "last", *options)
    said = run(arguments, ranks, tmp_path / "logs" / "second")
    assert "continuing the run" in said
    found = curves(parts)
    for tag in TRAINED:
        assert found[tag].keys() == whole[tag].keys(), tag
        assert _largest(found, whole, [tag]) < 1e-5, tag


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_accumulated_gradients_are_the_same(tmp_path):
    """Two micro-batches a step; replicas average their gradients after the last one alone."""
    path, found = recipe(tmp_path, 5), {}
    for layout in ("1 process", "replicated-2", "FSDP2-2", "EP-2"):
        arguments, ranks = fit(path, tmp_path / layout, layout, "--trainer.accumulate_grad_batches", "2")
        run(arguments, ranks, tmp_path / "logs" / layout)
        found[layout] = curves(tmp_path / layout)["train/grad_norm"]
    assert len(found["1 process"]) == 5
    for layout, norms in found.items():
        assert norms == pytest.approx(found["1 process"], rel=1e-5), layout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["FSDP2-2", "EP-2"])
def test_compiled_parts_train_the_same_model(tmp_path, layout):
    path, found = recipe(tmp_path, 4), []
    for compiled in ("false", "true"):
        arguments, ranks = fit(path, tmp_path / compiled, layout, "--model.compile", compiled)
        run(arguments, ranks, tmp_path / "logs" / compiled)
        found.append(curves(tmp_path / compiled)["train/loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bfloat16_gathering_is_close(tmp_path):
    path, found = recipe(tmp_path, 6), []
    for dtype in ("float32", "bfloat16"):
        options = ["--trainer.precision", "bf16-mixed", "--parallel.gather_dtype", dtype, "--parallel.expert", "2"]
        arguments, ranks = fit(path, tmp_path / dtype, "FSDP2-2", *options, "--parallel.data", "1")
        run(arguments, ranks, tmp_path / "logs" / dtype)
        found.append(curves(tmp_path / dtype)["train/loss"])
    assert found[1] == pytest.approx(found[0], rel=5e-3)
    assert found[1] != found[0]


MIXING = {
    "excess_loss": {"rule": "excess_loss", "reference": {"code": 5.0, "prose": 5.5, "math": 5.0}, "step_size": 3.0},
    "gate_load": {"rule": "gate_load", "every_n_steps": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rule", MIXING)
def test_every_layout_gives_the_domains_the_same_weights(tmp_path, rule):
    """And so the same samples: the loss of a step is that of one process."""
    path = recipe(tmp_path, 6)
    options = ["--data.mixing", json.dumps(MIXING[rule]), "--trainer.val_check_interval", "2"]
    wanted = {}
    for layout in ("1 process", "DDP-2", "FSDP2-2", "EP-2"):
        arguments, ranks = fit(path, tmp_path / layout, layout, *options)
        run(arguments, ranks, tmp_path / "logs" / layout)
        found = curves(tmp_path / layout)
        tags = [f"train/weight/{name}" for name in ("code", "prose", "math")]
        wanted = wanted or found
        assert _largest(found, wanted, ["train/loss", "val/loss", *tags]) < 1e-5, layout
        assert len(set(found[tags[0]].values())) == 3  # of steps 1 and 2, 3 and 4, 5 and 6
