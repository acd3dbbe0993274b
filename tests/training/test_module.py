"""The LightningModule: what it learns, what it logs, and what must not change its course."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from moebed.data.datamodule import TextDataModule
from moebed.data.sources import SourceConfig
from moebed.data.tokenizer import TokenizerConfig
from moebed.errors import ConfigError, UserError
from moebed.plan.setup import Setup
from moebed.training import callbacks
from moebed.training.callbacks import AtomicCheckpointIO, TrainingRate
from moebed.training.metrics import TextLoss
from moebed.training.module import MoEModule
from moebed.training.optim import OptimizerConfig, build_optimizer
from tests.conftest import tiny_config


class Record(Callback):
    """Keeps what was logged at each optimizer step, which has a log when its last micro-batch is done."""

    def __init__(self):
        self.steps = {}
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop._should_accumulate():
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.losses.append(logged["train/loss"])
        self.steps[trainer.global_step] = logged


@pytest.fixture
def data(tmp_path):
    """Two small domains as a function of the batch size."""
    for name, line in (("rhyme", "the cat sat on the mat, and the rat sat on the hat.\n"), ("sum", "1+2=3; 4+5=9; ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{i} {line * 8}" for i in range(300)))

    def build(batch_size=4, sequence_length=32):
        return TextDataModule(
            sources=[
                SourceConfig(name=name, kind="files", path=str(tmp_path / f"{name}.txt")) for name in ("rhyme", "sum")
            ],
            tokenizer=TokenizerConfig(kind="bytes"),
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_validation_windows=4,
            cache_dir=str(tmp_path / "cache"),
        )

    return build


def _module(seed=0, optimizer=None, **changes):
    torch.manual_seed(seed)
    config = tiny_config(vocab_size=260, **{"initializer_range": 0.05, **changes})
    return MoEModule(config, optimizer or OptimizerConfig(learning_rate=5e-3, warmup_steps=2, weight_decay=0.0))


def _trainer(tmp_path, max_steps, *callbacks, **changes):
    options = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(max_steps=max_steps, callbacks=list(callbacks), default_root_dir=tmp_path, **{**options, **changes})


def test_overfits_one_batch(data):
    torch.manual_seed(0)
    module, module_data = _module(router_aux_loss_coef=0.01), data(sequence_length=16)
    module_data.setup()
    batch = next(iter(module_data.train_dataloader()))
    optimizer = build_optimizer(module.decoder, OptimizerConfig(learning_rate=1e-2, weight_decay=0.0))
    for _ in range(150):
        terms = module.losses.terms(batch["input_ids"], batch["labels"])
        loss = terms.nats.sum() / batch["labels"].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What one cannot know is each sequence's first prediction from one token alone.
    positions = module.decoder(batch["input_ids"]).logits.log_softmax(-1)
    wrong = (positions.argmax(-1) != batch["labels"])[:, 2:]
    assert wrong.sum() == 0
    assert loss.item() < 0.1


def _losses_by_step(record):
    return [record.steps[step]["train/loss"] for step in sorted(record.steps)]


@pytest.mark.parametrize(
    ("scope", "coefficient"), [("micro", 0.0), ("global", 0.0), ("sequence", 0.1), ("window", 1.0)]
)
def test_gradient_accumulation_gives_the_same_run(tmp_path, data, scope, coefficient):
    """z-loss and LM loss are means over tokens, that of sequences a mean over them; where the load-balancing loss is
    of a micro-batch, it is off (see the next test)."""
    weights = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        module = _module(router_aux_loss_coef=coefficient, router_z_loss_coef=1e-3, router_aux_loss_scope=scope)
        _trainer(tmp_path, 6, accumulate_grad_batches=accumulate).fit(module, datamodule=data(batch_size))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in _module().parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_global_scope_counts_the_window_so_far_and_window_scope_all_of_it(tmp_path, data):
    """With the first only the last micro-batch balances against the load of a large batch; with the other all do."""
    seen = {}
    for scope, batch_size, accumulate in (("global", 4, 1), ("global", 2, 2), ("window", 2, 2), ("window", 4, 1)):
        module = _module(router_aux_loss_coef=0.01, router_aux_loss_scope=scope)
        windows, passes = [], []
        module.decoder.register_forward_hook(lambda *_, passes=passes: passes.append(0))
        original = module.losses.batch_counts.of_all

        def spy(sums, original=original, windows=windows):
            windows.append(torch.cat([layer["counts"] for layer in original(sums)]))
            return [{"counts": part} for part in windows[-1].chunk(len(sums))]

        module.losses.batch_counts.of_all = spy
        _trainer(tmp_path, 1, accumulate_grad_batches=accumulate).fit(module, datamodule=data(batch_size))
        seen[scope, accumulate] = windows
        planned = Setup(module.config, batch_size, 32, accumulate=accumulate)
        assert len(passes) == (1 + planned.looks_ahead) * accumulate
        assert module.losses.batch_counts._whole is module.losses.batch_counts._so_far is None
    (large,) = seen["global", 1]
    assert large.sum() == 2 * 4 * 32 * 2
    first, last = seen["global", 2]
    assert torch.equal(last, large)
    assert first.sum() == large.sum() / 2
    assert all(torch.equal(counts, large) for counts in (*seen["window", 2], *seen["window", 1]))
    dense = _module(router_aux_loss_scope="window", num_experts=0, intermediate_size=32)
    _trainer(tmp_path, 1, accumulate_grad_batches=2).fit(dense, datamodule=data(2))  # nothing to balance


class Gradients(Callback):
    """Keeps a step's before they are clipped, and after."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = [p.grad.clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after = [p.grad for p in pl_module.parameters()]


def test_clipping_by_hand(tmp_path, data):
    """By the norm of all together, which leaves a smaller gradient as it is, or each number."""
    for most, algorithm in ((1e-2, "norm"), (1e2, "norm"), (1e-3, "value")):
        module, seen = _module(num_hidden_layers=1), Gradients()
        options = {"gradient_clip_val": most, "gradient_clip_algorithm": algorithm}
        _trainer(tmp_path, 1, seen, **options).fit(module, datamodule=data())
        norm = torch.cat([gradient.flatten() for gradient in seen.before]).norm()
        assert 0.1 < norm < 10
        for before, after in zip(seen.before, seen.after, strict=True):
            scaled = before * min(1.0, most / norm) if algorithm == "norm" else before.clamp(-most, most)
            torch.testing.assert_close(after, scaled, rtol=1e-3, atol=0)


def test_window_scope_survives_a_step_that_is_left_out(tmp_path, data):
    """What was counted for a step whose loss is not finite is of no other step."""

    module = MoEModule(
        tiny_config(vocab_size=260, router_aux_loss_coef=0.1, router_aux_loss_scope="window"), on_nan="skip"
    )
    original, known = module.training_step, []

    def step(batch, batch_idx):
        total = original(batch, batch_idx)
        known.append(module.losses.batch_counts._whole.clone())
        return total * (float("nan") if batch_idx == 3 else 1)

    module.training_step = step
    _trainer(tmp_path, 3, accumulate_grad_batches=2).fit(module, datamodule=data(2))
    assert len(known) == 6  # the second of three steps was left out
    assert all(torch.equal(known[i], known[i + 1]) for i in (0, 2, 4))
    assert not torch.equal(known[2], known[4])


def test_the_scope_decides_what_is_balanced_and_the_log_says_what_it_punishes(tmp_path, data):
    """Specialisation by sequence costs the one scope and not the other, and sinks where it does."""
    last = {}
    for scope in ("micro", "sequence"):
        record = Record()
        module = _module(router_aux_loss_coef=1.0, router_aux_loss_scope=scope, num_experts=8)
        _trainer(tmp_path, 60, record).fit(module, datamodule=data())
        last[scope] = [record.steps[step] for step in range(40, 61)]
    specialised = {
        scope: sum(step["train/sequence_specialisation"] for step in steps) / 21 for scope, steps in last.items()
    }
    assert specialised["sequence"] < 0.8 * specialised["micro"]
    assert specialised["sequence"] > 0
    by_sequence = last["sequence"][-1]
    # What is minimised is the loss of all together and, on top, the covariance.
    assert by_sequence["train/load_balancing_loss"] - by_sequence["train/sequence_specialisation"] >= 0.99


def test_the_logged_loss_is_the_language_model_loss_alone(tmp_path, data):
    records = []
    for coefficient in (0.0, 10.0):
        record = Record()
        module = _module(router_aux_loss_coef=coefficient)
        _trainer(tmp_path, 1, record).fit(module, datamodule=data())
        records.append(record.steps[1])
    assert records[0]["train/loss"] == records[1]["train/loss"]
    assert records[1]["train/load_balancing_loss"] >= 0.9
    assert records[0]["train/loss"] == pytest.approx(math.log(260), rel=0.05)


def test_aux_loss_balances(tmp_path, data):
    """With a strong coefficient the load evens out; without one it does not have to."""
    violations = []
    for coefficient in (0.0, 1.0):
        record = Record()
        module = _module(router_aux_loss_coef=coefficient, num_experts=8)
        _trainer(tmp_path, 60, record).fit(module, datamodule=data())
        violations.append(sum(record.steps[step]["train/max_violation"] for step in range(50, 61)) / 11)
    assert violations[1] < 0.75 * violations[0]


def test_validation_reports_bits_per_byte_by_domain(tmp_path, data):
    record = Record()
    module, module_data = _module(), data()
    trainer = _trainer(tmp_path, 3, record, val_check_interval=3)
    trainer.fit(module, datamodule=module_data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    batches = list(module_data.val_dataloader())
    nats = sum(module.predict_step(batch, 0)["nats"].double().sum().item() for batch in batches)
    text_bytes = sum(batch["label_bytes"].sum().item() for batch in batches)
    assert found["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert {"val/bits_per_byte/rhyme", "val/bits_per_byte/sum", "val/loss/sum"} <= set(found)


def test_text_loss_by_hand():
    metric = TextLoss(2)
    metric.update(torch.tensor([2.0, 6.0]), torch.tensor([2, 3]), torch.tensor([4, 8]), torch.tensor([0, 1]))
    metric.update(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([1]), torch.tensor([0]))
    found = metric.compute()
    assert found["loss"].item() == pytest.approx(9 / 6)
    assert found["bits_per_byte"].item() == pytest.approx(9 / math.log(2) / 13)
    assert found["bits_per_byte_by_domain"].tolist() == pytest.approx([3 / math.log(2) / 5, 6 / math.log(2) / 8])


def test_resume_is_bit_identical(tmp_path, data):
    """12 steps at a stretch, against 7, a checkpoint, and 5 more in a new process state."""
    whole = Record()
    trainer = _trainer(tmp_path, 12, whole, accumulate_grad_batches=2, val_check_interval=4)
    module = _module()
    trainer.fit(module, datamodule=data())

    first = Record()
    stopped = _trainer(tmp_path, 12, first, accumulate_grad_batches=2, val_check_interval=4)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")
                trainer.should_stop = True

    stopped.callbacks.append(Stop())
    stopped.fit(_module(), datamodule=data())
    torch.manual_seed(999)
    second, resumed = Record(), _module(seed=5)
    _trainer(tmp_path, 12, second, accumulate_grad_batches=2, val_check_interval=4).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "seven.ckpt"
    )
    assert whole.losses[-len(second.losses) :] == second.losses
    assert max(second.steps) == 12
    for one, other in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_training_tracks_eager(tmp_path, data):
    """The same 5 steps with torch.compile, in one graph: the same losses within float32 rounding."""
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        config = tiny_config(vocab_size=260, num_hidden_layers=2, router_aux_loss_coef=0.01)
        record, module = Record(), MoEModule(config, OptimizerConfig(learning_rate=5e-3), compile=compile)
        _trainer(tmp_path, 5, record).fit(module, datamodule=data())
        losses.append(_losses_by_step(record))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]


def test_nan_loss_stops_with_the_step(tmp_path, data):
    module = _module()
    with torch.no_grad():
        module.decoder.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan, first seen after the last router on rank 0, at step 0"):
        _trainer(tmp_path, 3).fit(module, datamodule=data())


def test_vocabulary_and_length_are_checked_before_training(tmp_path, data):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="vocab_size"):
        _trainer(tmp_path, 1).fit(MoEModule(tiny_config(vocab_size=100)), datamodule=data())
    with pytest.raises(ConfigError, match="sequence_length is 200 but the model's max_position_embeddings is 128"):
        _trainer(tmp_path, 1).fit(_module(), datamodule=data(sequence_length=200))


def test_checkpoint_of_another_model_is_refused(tmp_path, data):
    trainer = _trainer(tmp_path, 1)
    trainer.fit(_module(), datamodule=data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match="differs from the config in hidden_act"):
        _trainer(tmp_path, 2).fit(_module(hidden_act="gelu"), datamodule=data(), ckpt_path=tmp_path / "one.ckpt")


def test_a_failed_save_leaves_the_checkpoint_whole(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    class Unsaveable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        io.save_checkpoint({"step": Unsaveable()}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_damaged_or_missing_checkpoint_is_one_line(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"bad\.ckpt cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"no\.ckpt does not exist"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "no.ckpt")


def test_tokens_per_second_counts_waiting_for_data_and_nothing_else(tmp_path, data, monkeypatch):
    """By a clock that stands still but for these: a fifth of a second for each micro-batch's data and an eighth for its
    step; and more after each step for a callback, and for validation.
    """
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Callback):
        def on_before_optimizer_step(self, *_):
            passes(0.125)

        def on_train_batch_end(self, *_):
            passes(1.0)

        def on_validation_start(self, *_):
            passes(2.0)

    class Waits:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            for batch in self.loader:
                passes(0.2)
                yield batch

    module_data = data(batch_size=2)
    given = module_data.train_dataloader
    module_data.train_dataloader = lambda: Waits(given())
    trainer = _trainer(tmp_path, 6, TrainingRate(), Slow(), val_check_interval=3)
    trainer.fit(_module(), datamodule=module_data)
    assert float(trainer.callback_metrics["train/tokens_per_second"]) == pytest.approx(64 / 0.325)


def test_a_run_in_bfloat16_validates_and_keeps_its_routers_state(tmp_path, data):
    module = _module(router="sigmoid_topk")
    trainer = _trainer(tmp_path, 3, precision="bf16-true", val_check_interval=3)
    trainer.fit(module, datamodule=data())
    assert 0 < float(trainer.callback_metrics["val/loss"]) < 10
    norm = torch.tensor(float(trainer.callback_metrics["train/grad_norm"]))
    assert norm != norm.bfloat16()  # which it would be if it were computed in that
    assert module.decoder.embed_tokens.weight.dtype == torch.bfloat16
    for router in module.decoder.routers:
        assert router.expert_bias.dtype == torch.float32
        assert router.expert_bias.abs().max() == pytest.approx(0.003)
