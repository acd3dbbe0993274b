"""Interventions on a streamed checkpoint: the effects of a live model, whatever S; each weight once; memory counted."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write
from streamed_cases import CASES, Reads, make_text, stopped_and_continued

from moebed.checkpoints import load_decoder, open_ffn
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.commands.probe import read_options
from moebed.model.config import ModelConfig
from moebed.views.beside import Rows
from moebed.views.intervention_names import parse
from moebed.views.interventions import LayerContext
from moebed.views.layer import HeadView, Need
from moebed.views.live import LiveModel, ModuleWeights, _views, evaluating, intervene
from moebed.views.text_pass import TextPass
from probes.figures.drawing import to_rgb
from probes.registry import PROBES
from probes.running import store
from probes.running.driver import needs_of, run_probes
from tests.conftest import ORACLES

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
THREE = ("identity", "mask 2 refill @ layer 1", "random_set 5 @ layer 1")
MANY = (
    *THREE,
    "mask 0 zero",
    "mask 0,3 drop_norm @ layer 2",
    "keep 1,2,4",
    "keep_top 1 zero",
    "drop_top 1 refill @ layer 1",
    "force 4 @ layer 1",
    "shift 1,2 by -0.5",
    "swap",
)


@torch.no_grad()
def streamed(folder, text, names, needs=frozenset({Need.PREDICTIONS}), told=True, **options):
    model = PretrainedMoE(str(folder), text=text, **options)
    interventions = [parse(name) for name in names]
    model.prepare([], needs, interventions=interventions if told else ())
    try:
        for view in model.views(text, needs):
            if isinstance(view, HeadView):
                return view.under(interventions)
            if Need.OUTPUTS in needs and view.num_experts:
                list(view.experts())
    finally:
        model.close()


def by_continuing(decoder, text, intervention):
    """The reference, for an intervention at one layer: the layer's output under it, and on with the plain model."""
    model = LiveModel(decoder)
    with evaluating(decoder), torch.no_grad():
        run = TextPass(model, text)
        views = run.layers(_views(model, 0))
        (at,) = intervention.layers_of(decoder.config)
        for view in views:
            if view.index == at:
                mlp = decoder.layers[at].mlp
                routing = intervention.apply(view.routing, view.moe_input, LayerContext(at, mlp.router))
                (output,) = ModuleWeights(mlp).combine([Rows(view.moe_input, routing)])
                rest = run.continued(output)
                for _ in rest.layers(_views(model, at + 1)):
                    pass
        return rest.head().loss - run.head().loss


def by_the_router(decoder, text, intervention):
    """Another reference, for a text without padding: routers that decide otherwise, in the model's forward pass."""

    def loss():
        logits = decoder(text.input_ids).logits[text.token_mask]
        found = torch.nn.functional.cross_entropy(logits, text.targets.clamp(min=0), reduction="none")
        return found.masked_fill(text.targets < 0, torch.nan)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        before = loss()
        for index in intervention.layers_of(decoder.config):
            router = decoder.layers[index].mlp.router
            layer = LayerContext(index, router)

            def forward(x, experts, context=None, decide=router.forward, layer=layer):
                return intervention.apply(decide(x, experts, context), x, layer)

            patch.setattr(router, "forward", forward)
        return loss() - before


@pytest.mark.parametrize("needs", [{Need.PREDICTIONS}, {Need.PREDICTIONS, Need.OUTPUTS}], ids=["chosen", "every"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("no experts", "one expert")])
def test_three_in_one_pass_are_three_live_ones(case, needs, tmp_path):
    decoder, text = write(tmp_path, **CASES[case]), make_text(9, 4, 1, 12)
    names = [name for name in THREE if name != "identity"]
    found = streamed(tmp_path, text, THREE, frozenset(needs))
    for name in names:
        wanted = by_continuing(decoder, text, parse(name))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, equal_nan=True)
        assert float(wanted.nan_to_num().abs().max()) > 1e-3  # or nothing would have been compared
    assert float(found["identity"].nan_to_num().abs().max()) < 1e-5


@pytest.mark.parametrize("case", ["fp32", "shared, a dense layer", "tied"])
def test_all_kinds_are_what_other_routers_would_have_done(case, tmp_path):
    decoder, text = write(tmp_path, **CASES[case]), make_text(12, 12, 12)
    found = streamed(tmp_path, text, MANY)
    for name in MANY:
        wanted = by_the_router(decoder, text, parse(name))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.shared("oracles")
@pytest.mark.parametrize(
    "name",
    [pytest.param("mixtral", marks=pytest.mark.slow), "deepseekmoe", pytest.param("grok-1", marks=pytest.mark.slow)],
)
def test_the_oracles(name):
    """Published layouts: the effects of a live model, and every probe that asks for effects, pictures drawn."""
    model = PretrainedMoE(str(ORACLES / name))
    decoder, config = load_decoder(model.checkpoint).eval(), model.config
    layer = config.moe_layers[-1]
    text = make_text(16, 16, 16, 16, vocab_size=config.vocab_size)
    names = [f"mask 1 zero @ layer {layer}", "mask 1 refill", "swap", f"random_set 2 @ layer {layer}"]
    names.append("drop_top 1 zero alone")
    found = streamed(ORACLES / name, text, names)
    for one in names[:-1]:
        wanted = by_the_router(decoder, text, parse(one))
        torch.testing.assert_close(found[one], wanted, rtol=0, atol=1e-5, equal_nan=True, msg=one)
    alone = intervene(decoder, text, [parse(names[-1])])
    torch.testing.assert_close(found[names[-1]], alone[names[-1]], rtol=0, atol=1e-5, equal_nan=True)
    probes = [PROBES[probe]() for probe in ("interventions", "keep_k", "super_experts")]
    probes[0].options = probes[0].Options("swap; drop_top 1 alone")
    with_text = PretrainedMoE(str(ORACLES / name), text=text)
    try:
        results = run_probes(with_text.views(text, needs_of(probes)), probes)
    finally:
        with_text.close()
    for probe in probes:
        result = results[probe.name]
        assert result.headlines
        assert all(np.isfinite(value) for value in result.scalars.values())
        for build in result.figures.values():
            to_rgb(build())


@pytest.mark.parametrize("probed", [False, True])
def test_each_weight_is_read_once_whatever_s(probed, tmp_path, monkeypatch):
    write(tmp_path, num_experts_per_tok=2)
    reads, text = Reads(monkeypatch), make_text(20, 30)
    needs = {Need.PREDICTIONS, Need.OUTPUTS} if probed else {Need.PREDICTIONS}
    assert len(streamed(tmp_path, text, MANY, frozenset(needs))) == len(MANY)
    assert set(reads.values()) == {1}


def test_more_than_memory_takes_are_several_passes(tmp_path, monkeypatch):
    """As many copies a pass as the budget has room for, and the same effects as in one."""
    write(tmp_path, num_experts_per_tok=2)
    text, passes = make_text(200, 180, 120), []
    original = TextPass.__init__

    def counted(self, *arguments, interventions=(), **options):
        passes.append(len(interventions))
        original(self, *arguments, interventions=interventions, **options)

    monkeypatch.setattr(TextPass, "__init__", counted)
    whole = streamed(tmp_path, text, MANY)
    assert passes == [len(MANY)]
    passes.clear()
    some = streamed(tmp_path, text, MANY, memory_budget="1400kB")
    assert len(passes) > 1
    assert sum(passes) == len(MANY)
    assert max(passes[:-1]) - min(passes[:-1]) <= 1  # full ones, and what is left
    for name, wanted in whole.items():
        torch.testing.assert_close(some[name], wanted, rtol=0, atol=1e-5, equal_nan=True)
    passes.clear()
    later = streamed(tmp_path, text, MANY, told=False)  # as a probe that knows only afterwards
    assert passes == [0, len(MANY)]
    for name, wanted in whole.items():
        torch.testing.assert_close(later[name], wanted, rtol=0, atol=1e-5, equal_nan=True)


def most_bytes(run):
    """What was allocated at most at a time while a function ran."""
    gc.collect()  # what tests before left would be given back meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("every", [False, True])
def test_a_copy_takes_twelve_bytes_a_token_and_channel(every, tmp_path, monkeypatch):
    """The stream, the experts' input, the sum of outputs; counted as allocated, by how it grows with S."""
    hidden, tokens = 256, 1200
    write(tmp_path, hidden_size=hidden, num_experts=4, num_experts_per_tok=2)
    monkeypatch.setattr(open_ffn, "_ACTIVATIONS_AT_A_TIME", 24 * 64)  # rows of one expert at a time: 64
    text = make_text(*[200] * 6)
    needs = frozenset({Need.PREDICTIONS, Need.OUTPUTS} if every else {Need.PREDICTIONS})
    names = [f"random_set {seed}" for seed in range(9)]
    few, many = (most_bytes(lambda n=n: streamed(tmp_path, text, names[:n], needs)) for n in (2, 9))
    copy = (many - few) / 7 / (tokens * hidden)
    print(f"{copy:.2f} bytes a token and channel")
    assert copy < 12 * 1.05
    assert copy > 8  # or the copies were not there at all


@pytest.mark.parametrize(("name", "goes_on"), [("mask 1 zero @ layer 2", True), ("mask 1 zero @ layer 1", False)])
def test_a_stopped_pass_goes_on_where_no_branch_had_begun(name, goes_on, tmp_path, monkeypatch):
    options = ["--probes", "routing", "--intervene", name]
    probe, reads = stopped_and_continued(tmp_path, monkeypatch, "routing", *options)
    assert goes_on is not any(read.startswith("model.layers.0.") for read, _ in reads)
    whole, other = (store.load_arrays(tmp_path / out, "interventions") for out in ("whole", "out"))
    assert whole["names"].tolist() == [f"identity @ layer {name[-1]}", name]
    for key, value in whole.items():
        np.testing.assert_array_equal(other[key], value, err_msg=key)
    reads.clear()
    assert probe("out") == 0
    assert not reads
    assert main(["probe", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--probes", "routing",
                 "--intervene", "swap", "--input-ids", str(tmp_path / "ids.npy")]) == 0  # fmt: skip
    assert store.load_arrays(tmp_path / "out", "interventions")["names"].tolist() == ["identity", "swap"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--intervene", "msk 3"], "did you mean 'mask'"),
        (["--intervene", "mask 9"], "has experts 0 to 5, not 9"),
        (["--intervene", "swap", "--intervene", "swap"], "given twice"),
    ],
)
def test_what_cannot_be_changed_is_one_line(options, said, tmp_path, capsys):
    write(tmp_path / "model", num_experts_per_tok=2)
    np.save(tmp_path / "ids.npy", make_text(8).input_ids.numpy())
    asked = ["probe", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]
    assert main([*asked, "--input-ids", str(tmp_path / "ids.npy")]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert main([*asked[:4], "--intervene", "swap"]) == 2
    assert "--intervene needs text" in capsys.readouterr().err


def test_the_recipe_says_what_can_be_read():
    options = read_options(["--config", str(RECIPES / "probe_interventions_mixtral_8x7b.yaml")])
    asked = [parse(one) for one in options["intervene"]]
    assert len({one.name for one in asked}) == len(asked) > 5
    for one in asked:
        one.check(ModelConfig(num_hidden_layers=32, num_experts=8, moe_intermediate_size=8))
