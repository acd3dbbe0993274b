"""Routers over optimizer steps: state that changes once a step, is resumed, exported, and seen by streamed readers."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.checkpoints.whole import load_decoder, write_checkpoint
from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig
from moebed.errors import ConfigError
from moebed.model.decoder import Decoder
from moebed.model.routers import ROUTERS, RouterSteps
from moebed.training.callbacks import AtomicCheckpointIO
from moebed.training.module import MoEModule
from moebed.training.optim import OptimizerConfig, build_optimizer
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from moebed.views.live import LiveModel, walk, walk_model
from moebed.views.text_pass import TextPass
from tests.model.routers.router_cases import ALL, config_of, domains_of

SEQUENCE = 16
ADAPTIVE = tuple(name for name, router in ROUTERS.items() if router.adaptive)
STATES = {
    "quantile": ("expert_bias",),
    "threshold": (".threshold", ".steps"),
    "expert_choice": (".threshold", ".steps"),
    "kmeans": (".centroids", ".started"),
}


# What they draw follows from the step; with these options they draw nothing.
DRAWS = {"grap": {"jitter": 0.0}, "locmoe_plus": {"jitter": 0.0}, "document_pool": {"least_pool": 4}}


@pytest.fixture
def data(tmp_path):
    """A small text as a function of the batch size."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} the cat sat on the mat of the rat. " * 3 for i in range(200)))

    def build(batch_size=4):
        return TextDataModule(
            sources=[SourceConfig(name="text", kind="files", path=str(tmp_path / "text.txt"))],
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=SEQUENCE,
            batch_size=batch_size,
            max_validation_windows=2,
            cache_dir=str(tmp_path / "cache"),
        )

    return build


def _module(name, seed=0, activation_checkpointing=False, weight_decay=0.5, **changes):
    torch.manual_seed(seed)
    config = config_of(name, vocab_size=260, **{"initializer_range": 0.1, **changes})
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=2, weight_decay=weight_decay)
    return MoEModule(config, optimizer, activation_checkpointing)


def _fit(module, data, steps, *callbacks, ckpt_path=None, **changes):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        check_val_every_n_epoch=None,
        val_check_interval=changes.pop("val_check_interval", 1000),
        gradient_clip_val=1e-3,
        plugins=[AtomicCheckpointIO()],
        **changes,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def _watch(module):
    """What each end_step of the first layer's router was told."""
    router, told = module.decoder.routers[0], []
    original = router.end_step

    def end_step(load):
        told.append(load)
        original(load)

    router.end_step = end_step
    return told


def test_the_bias_moves_once_an_optimizer_step_with_the_load_of_all_of_it(data):
    """As one large batch, whether in micro-batches, with recomputation, or with validation between."""
    found = []
    for batch_size, accumulate, recompute in ((4, 1, False), (1, 4, False), (2, 2, True)):
        module = _module("sigmoid_topk", activation_checkpointing=recompute, router_aux_loss_coef=0.0)
        told = _watch(module)
        _fit(module, data(batch_size), 3, accumulate_grad_batches=accumulate, val_check_interval=accumulate)
        assert len(told) == 3
        assert all(load.counts.sum() == 4 * SEQUENCE * 2 and load.density == 1 for load in told)
        found.append([router.expert_bias.clone() for router in module.decoder.routers])
    signs = sum(torch.sign(load.counts.mean() - load.counts) for load in told)
    torch.testing.assert_close(found[-1][0], 1e-3 * signs)
    assert found[-1][0].abs().max() > 0
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_validation_leaves_what_routers_learn_alone(name, data):
    """As often as it comes, the run is the same."""
    found = []
    for every in (1, 1000):
        module = _module(name)
        _fit(module, data(), 3, val_check_interval=every)
        found.append(module.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_no_optimizer_and_no_reset_but_its_own_touches_the_bias(data):
    module = _module("sigmoid_topk", router_options={"bias_update_rate": 0.0})
    for router in module.decoder.routers:
        router.expert_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    groups = build_optimizer(module.decoder, OptimizerConfig()).param_groups
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    assert not any(id(router.expert_bias) in optimized for router in module.decoder.routers)
    _fit(module, data(), 3)  # with weight decay .5 and clipping at 1e-3
    for router in module.decoder.routers:
        assert torch.equal(router.expert_bias, torch.tensor([0.1, -0.2, 0.3, 0.0]))
        assert router.expert_bias.dtype == torch.float32
    module.decoder.reset_parameters()
    assert all(router.expert_bias.abs().sum() == 0 for router in module.decoder.routers)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "locmoe_plus"])  # which only counts for the log
def test_a_step_that_is_skipped_leaves_the_routers_alone(name, data):
    """Its loss is not a number: neither weights nor state may move, and its counts may not enter the next step's."""
    module, states = _module(name), []
    module.not_finite.choice = "skip"
    told, forward = _watch(module), module.losses.terms

    def third_is_nan(*batch):
        terms = forward(*batch)
        return terms._replace(nats=terms.nats * float("nan")) if module.global_step == 2 else terms

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept = module.decoder.routers[0].state_dict()
            states.append(torch.cat([value.flatten().clone() for value in kept.values()]))

    module.losses.terms = third_is_nan
    _fit(module, data(), 4, Keep())
    assert len(states) == 4
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])
    assert len(told) == 3
    if module.decoder.routers[0].fixed_top_k:
        assert [load.counts.sum() for load in told] == [4 * SEQUENCE * 2] * 3


def test_counts_are_summed_over_ranks(monkeypatch):
    """Two ranks, the other one with all of its tokens on expert 0: the bias goes by the sum."""
    decoder = Decoder(config_of("sigmoid_topk", num_hidden_layers=1))
    steps = RouterSteps(decoder.routers)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(torch.tensor([20.0, 0, 0, 0, 10])))
    steps.add([torch.tensor([0.0, 8, 6, 6])], torch.tensor(10))
    steps.end()
    assert decoder.routers[0].expert_bias.tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, 1e-3])
    steps.end()  # nothing was counted since
    assert decoder.routers[0].expert_bias.tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, 1e-3])


def test_relu_takes_the_sparsity_of_all_layers(data):
    module = _module("relu", num_experts=[4, 8])
    told = _watch(module)
    _fit(module, data(2), 2, accumulate_grad_batches=2)
    assert len(told) == 2
    first, second = (router.l1_coefficient.item() for router in module.decoder.routers)
    assert first == second
    ups = sum(1 if load.density > 1 else -1 for load in told)
    assert first == pytest.approx(1e-8 * 1.2**ups, rel=1e-5)


class Losses(Callback):
    """Keeps the logged losses of each batch, and a checkpoint of one step."""

    def __init__(self, save_at=None, path=None):
        self.logged, self.save_at, self.path = [], save_at, path

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if trainer.global_step == self.save_at and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", [*ADAPTIVE, "competesmoe_v2", "noisy_topk", *sorted(DRAWS.keys() - ADAPTIVE)])
def test_a_resumed_run_is_bit_identical(name, tmp_path, data):
    """State, coins and losses after 3 steps, a checkpoint and 3 more are those of 6 at a stretch."""
    options = {"router_options": {"competition_rate": 0.5, "jitter": 0.2}}
    whole, path = Losses(3, tmp_path / "three.ckpt"), tmp_path / "three.ckpt"
    module = _module(name, **options)
    _fit(module, data(), 6, whole)
    resumed, again = _module(name, seed=9, **options), Losses()
    _fit(resumed, data(), 6, again, ckpt_path=path)
    assert [logged["train/loss"] for logged in whole.logged[3:]] == [logged["train/loss"] for logged in again.logged]
    ours, theirs = module.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    if name == "competesmoe_v2":
        competed = ["train/router_competition_loss" in logged for logged in whole.logged]
        assert any(competed)
        assert whole.logged[-1]["train/winner_similarity_loss"] <= 1
    elif name == "noisy_topk":
        assert whole.logged[-1]["train/load_loss"] > 0
    elif name in DRAWS:
        assert ("train/dropped_share" in whole.logged[-1]) == (name == "locmoe_plus")
        still = _module(name, router_options=DRAWS[name])
        _fit(still, data(), 6)
        assert any(not torch.equal(value, still.state_dict()[key]) for key, value in ours.items())
    else:
        kept = STATES.get(name, ("expert_bias", "l1_coefficient"))
        state = [key for key in ours if key.endswith(kept)]
        assert len(state) in (2, 4)  # one or two of each layer
        begun = _module(name, **options).state_dict()
        assert all(not torch.equal(ours[key], begun[key]) for key in state)


def test_router_losses_are_added_and_logged_apart(data):
    """The reported loss is the language model's alone; the gate learns from the competition's loss."""
    first, moved = {}, {}
    for coefficient in (0.0, 100.0):
        record = Losses()
        options = {"competition_loss_coef": coefficient, "competition_rate": 1.0}
        module = _module("competesmoe", weight_decay=0.0, router_options=options, router_aux_loss_coef=0.0)
        before = module.decoder.routers[0].weight.detach().clone()
        _fit(module, data(), 1, record)
        first[coefficient] = record.logged[0]
        moved[coefficient] = module.decoder.routers[0].weight.detach() - before
    assert first[0.0]["train/loss"] == first[100.0]["train/loss"]
    assert first[0.0]["train/router_competition_loss"] == first[100.0]["train/router_competition_loss"] > 0
    # With every layer competing, nothing but that loss reaches the gate.
    assert moved[0.0].abs().max() == 0
    assert moved[100.0].abs().max() > 0


def _decoder(name, **changes):
    torch.manual_seed(1)
    decoder = Decoder(config_of(name, **changes))
    for router in decoder.routers:
        for state in router.buffers():
            torch.nn.init.uniform_(state, -0.2, 0.2)
        if name == "expert_choice":  # whose thresholds are of logarithms
            router.threshold += router.first_threshold()
    return decoder


TEXT = ProbeText(
    torch.randint(96, (3, 11), generator=torch.Generator().manual_seed(5)),
    torch.arange(11) < torch.tensor([11, 4, 7]).unsqueeze(1),
    torch.zeros(3, dtype=torch.long),
    token_domain=domains_of(torch.zeros(3, 11)),
)
NEEDS = frozenset({Need.WEIGHTS, Need.ROUTING, Need.OUTPUTS, Need.ACTIVATIONS, Need.PREDICTIONS})


def _seen(views):
    """All that a walk shows, by name."""
    found = {}
    for view in views:
        if isinstance(view, HeadView):
            found["loss"] = view.loss[view.loss.isfinite()]
            continue
        assert isinstance(view, LayerView)
        assert view.text_error is None
        outputs = torch.stack([expert.output.clone() for expert in view.experts()])
        matrices = {name: view.matrix(name).clone() for name in ("up", "gate", "down")}
        shown = {"x": view.moe_input, "out": view.moe_output, "W_g": view.gate, "outputs": outputs}
        shown |= matrices | view.routing.without_precomputed()._asdict() | {"ragged": None}
        found |= {f"{view.index} {key}": value for key, value in shown.items() if value is not None}
    return found


@pytest.mark.parametrize("name", ALL)
def test_live_exported_and_streamed_are_the_same_model(name, tmp_path):
    """A folder and a run's file keep every weight and the state; streamed, an expert at a time too, all is as live."""
    decoder = _decoder(name)
    folder = write_checkpoint(decoder, "moebed", tmp_path / "model", dtype=torch.float32)
    back = load_decoder(folder)
    assert back.config == decoder.config
    for key, value in decoder.stored().items():
        assert torch.equal(value, back.stored()[key]), key
    run = tmp_path / "last.ckpt"
    state = {f"decoder.{key}": value for key, value in decoder.state_dict().items()}
    torch.save({"state_dict": state, "model_config": decoder.config.to_dict()}, run)
    live = _seen(walk(decoder, TEXT, NEEDS))
    for path, budget in ((folder, "1GiB"), (run, "1GiB"), (run, "170kB")):
        model = PretrainedMoE(str(path), text=TEXT, memory_budget=budget)
        streamed = _seen(model.views(TEXT, NEEDS))
        model.close()
        assert streamed.keys() == live.keys()
        for key, value in live.items():
            torch.testing.assert_close(streamed[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", [name for name in ALL if name != "balanced"])  # which goes by the place in the batch
def test_what_a_walk_shows_is_what_the_model_computes(name):
    """The walk's loss is the forward pass's."""
    decoder = _decoder(name).eval()
    views = list(walk(decoder, TEXT, NEEDS))
    assert (views[0].gate is None) == (
        name in ("expert_norm", "autonomy", "hash", "noisy_topk", "oracle_hash", "kmeans")
    )
    with torch.no_grad():
        for row in range(3):
            length = int(TEXT.token_mask[row].sum())
            ids, domain = (of[row : row + 1, :length] for of in (TEXT.input_ids, TEXT.token_domain))
            logits = decoder(ids, domain=domain).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits, TEXT.input_ids[row, 1:length], reduction="none")
            start = int(TEXT.sequence_start[row])
            torch.testing.assert_close(views[-1].loss[start : start + length - 1], expected, rtol=1e-4, atol=1e-4)


def test_a_pass_makes_views_of_its_own():
    """What text did in a layer is in the view that is shown, all of it, and not in the one that was made without."""
    model = LiveModel(_decoder("relu").eval())
    bare = list(walk_model(model, None, NEEDS))
    with torch.no_grad():
        shown = list(TextPass(model, TEXT).layers(bare))
    assert [(view.text, view.routing, view.moe_input) for view in bare] == [(None, None, None)] * len(bare)
    for view, made in zip(shown, bare, strict=True):
        assert (view.index, view.weights, view.text) == (made.index, made.weights, TEXT)
        assert view.routing.topk_index.shape[1] == view.num_experts > view.num_experts_per_tok  # as it is applied


@pytest.mark.parametrize("name", ALL)
def test_ablation_runs_and_changes_something(name):
    decoder = _decoder(name).eval()
    views = walk(decoder, TEXT, NEEDS)
    view = next(iter(views))
    whole, without = view.ablate(-1), view.ablate(int(view.routing.topk_index[0, 0]))
    kept = whole.isfinite()
    assert not torch.equal(whole[kept], without[kept])
    assert bool(without[kept].isfinite().all())


@pytest.mark.parametrize("name", [name for name in ALL if "softmax_topk" not in (name, ROUTERS[name].evaluated_as)])
def test_families_of_others_refuse_it(name, tmp_path):
    with pytest.raises(ConfigError, match=f"router is '{name}', which a mixtral checkpoint cannot express"):
        write_checkpoint(_decoder(name, norm_topk_prob=True), "mixtral", tmp_path / "model")


def test_options_of_other_routers_do_not_stand_in_the_way(tmp_path):
    folder = write_checkpoint(_decoder("softmax_topk"), "mixtral", tmp_path / "model")
    assert Checkpoint.open(folder).config.router == "softmax_topk"
