"""The LightningModule that trains a decoder.

B sequences, S positions, T = B·S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.whole import fill
from moebed.data.loader import documents_of_tokens, domains_of_tokens
from moebed.data.mixing import MixingConfig
from moebed.data.mixing_rules import Static
from moebed.errors import ConfigError, UserError
from moebed.machine.progress import say
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder, MoE, evaluating
from moebed.model.locality import Placement
from moebed.model.losses import IGNORE_INDEX, token_losses
from moebed.model.routers import RouterSteps, cautions
from moebed.model.routers.locmoe_plus import choosing_tokens
from moebed.model.routers.reference import check_domains
from moebed.parallel.gathered import GatheredModel
from moebed.parallel.strategy import MeshStrategy
from moebed.training.callbacks import validation_is_due
from moebed.training.lightning_private import forget_step_values
from moebed.training.loggers import log_numbers
from moebed.training.metrics import TextLoss, bits_per_byte
from moebed.training.not_finite import NotFinite
from moebed.training.optim import OptimizerConfig, build_optimizer, gradient_norm, scale_gradients
from moebed.training.routing_log import StepRouting
from moebed.training.same_config import require_same_run, require_start
from moebed.training.schedule import SchedulePlan
from moebed.training.step_log import StepLog, is_due, is_logged
from moebed.training.step_losses import StepLosses, Told
from moebed.views.layer import HeadView, LayerView, Need, ProbeText
from moebed.views.live import walk, walk_model

Batch = dict[str, Tensor]


class MoEModule(LightningModule):
    """Trains a decoder on next-token prediction, with all other losses logged apart from the language-model loss.

    Args:
        config: Shape and behaviour of the decoder.
        optimizer: The optimizer and its schedule.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
        compile: Compile the forward pass and the loss with torch.compile, with static shapes and without graph breaks;
            more recompilations than its limit are an error, not a silent fall back to eager. The first step takes
            from ten seconds to a minute longer. Of a model that ranks share, attention and the FFNs that every token
            passes are compiled.
        on_nan: What happens when the loss or the gradient of a step is not finite, on any rank: stop with an error that
            names step, rank and layer, or skip the step (ten in a row stop the run).
        init_from: Folder or ``.ckpt`` file of a checkpoint of this very config, such as `moebed upcycle` writes, whose
            weights training starts from; random weights if not given. It may lack adapters, and all shared experts:
            they begin as they are drawn, and silent. A run that is continued reads its own checkpoint instead.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        on_nan: Literal["stop", "skip"] = "stop",
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        for said in cautions(config):
            rank_zero_warn(f"model.config: {said}")
        self.config = config
        self.optimizer_config = optimizer or OptimizerConfig()
        self.not_finite = NotFinite(on_nan, config.moe_layers)
        self.init_from = init_from
        self.decoder = Decoder(config, activation_checkpointing)
        if compile and not all(router.compiles for router in self.decoder.routers):
            raise ConfigError(
                f"model.compile is on, but router {config.router} decides anew in each step which graph it is; "
                "turn compile off"
            )
        if compile and not self.decoder.adapters_compile:
            raise ConfigError(
                "model.compile is on, but there can be more sets of experts than hyper_experts makes adapters of at a "
                "time; turn compile off"
            )
        self.router_steps = RouterSteps(self.decoder.routers)
        self.step_log = StepLog()
        self.losses = StepLosses(self.decoder, self.step_log)
        self._compiled_terms = torch.compile(self.losses.terms, fullgraph=True, dynamic=False) if compile else None
        self._laid_out = False
        self.step_routing: StepRouting | None = None  # of the last step that was logged
        self._begins_step = True
        self._plan: SchedulePlan | None = None
        self._former_plan: dict[str, Any] = {}
        self._rng: dict[str, Any] | None = None
        self._val_loss: TextLoss | None = None
        self._expert_choice_loss: TextLoss | None = None  # of routers that see a batch, as they route in training
        self._mixing = Static(MixingConfig(), [])
        self.last_validated_step: int | None = None

    # What other parts of moebed read ------------------------------------------------------------------------------

    @property
    def notes(self) -> list[str]:
        """What a person should know who reads the probes' numbers."""
        dtype = self.decoder.embed_tokens.weight.dtype
        if dtype == torch.float32:
            return []
        return [f"the parameters are {str(dtype).removeprefix('torch.')}, and what the probes show was computed in it"]

    def views(self, text: ProbeText | None, needs: frozenset[Need]) -> Iterator[LayerView | HeadView]:
        """Layer views of the model as it is now, for the probes; rank 0's, where ranks share the model."""
        if not self._laid_out:
            yield from walk(self.decoder, text, needs)
            return
        model = GatheredModel(self.decoder)
        with model.leading(), evaluating(self.decoder):
            yield from walk_model(model, text, needs)

    def assist_views(self) -> None:
        """What the other ranks do while rank 0 looks at views of a model that they share."""
        if self._laid_out:
            GatheredModel(self.decoder).follow()

    def configure_model(self) -> None:
        """Lay the decoder out over ranks, where the strategy has a layout."""
        strategy = self.trainer.strategy
        if isinstance(strategy, MeshStrategy) and not self._laid_out:
            strategy.layout.apply(self.decoder, strategy.root_device)
            self._laid_out = True
            if self._compiled_terms is not None:
                self._compile_parts()

    def _compile_parts(self) -> None:
        """Compile what lies between the points where ranks meet: attention, and FFNs that every token passes."""
        self._compiled_terms = None
        for block in self.decoder.blocks:
            ffn = block.mlp.shared_expert if isinstance(block.mlp, MoE) else block.mlp
            for part in (block.self_attn, ffn):
                if part is not None:
                    part.compile(fullgraph=True, dynamic=False)

    # Training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data against the model."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("MoEModule needs a data module with labels and bytes; pass datamodule=TextDataModule(...)")
        self.check_data(data, self.trainer.world_size)
        self.decoder.stand_for(self.trainer.global_rank, self.trainer.world_size)
        self._mixing = getattr(data, "mixing", self._mixing)
        self.losses.num_domains = len(self._mixing.domains)
        if stage == "fit":
            self._mixing.check(data, self.trainer, self.config.moe_layers)
        self._val_loss = TextLoss(len(data.domains)).to(self.device)
        if any(router.sees_batch for router in self.decoder.routers):
            self._expert_choice_loss = TextLoss(len(data.domains)).to(self.device)

    def check_data(self, data: Any, processes: int = 1) -> None:
        """Raise ConfigError if the model cannot take what the data module gives to each of so many processes."""
        data.check_vocabulary(self.config.vocab_size)
        if (place := Placement.of(self.config, 0, processes)).parts > 1:
            place.check_batch(data.batch_size)
        if self.decoder.needs_context:
            check_domains(self.config, data.num_token_domains)
        if data.sequence_length > self.config.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length is {data.sequence_length} but the model's max_position_embeddings is "
                f"{self.config.max_position_embeddings}; lower the one or raise the other"
            )

    def on_fit_start(self) -> None:
        """Take the weights of ``init_from``, unless the run continues from a checkpoint of its own."""
        # Lightning says which checkpoint it restores only once it has, so not in setup.
        if self.init_from is not None and self.trainer.ckpt_path is None:
            fill(self.decoder, self.initial_checkpoint())

    def initial_checkpoint(self) -> Checkpoint:
        """The checkpoint that training starts from; raises UserError if it is missing or of another model."""
        assert self.init_from is not None
        checkpoint = Checkpoint.open(self.init_from)
        require_start(self.config, checkpoint, self.init_from)
        return checkpoint

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, stepped once an optimizer step."""
        optimizer = build_optimizer(self.decoder, self.optimizer_config)
        self._plan = SchedulePlan.of(self.optimizer_config, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._plan.build(optimizer), "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The accumulation window ends: routers adapt to its load, and the gradient is clipped; or the step is skipped.

        Lightning's own clipping refuses fused optimizers under mixed precision, although bf16 has no loss scaling.
        The norm before clipping is logged.
        """
        self.losses.end_step()
        parameters = list(self.decoder.parameters())
        norm = gradient_norm(parameters)
        self.step_log.note("grad_norm", norm)
        if self.not_finite.skips(self.trainer, norm):
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves a parameter without a gradient as it is
            self.router_steps.forget()
            self._mixing.forget()
            self._log_step()
            return
        numbers: dict[str, Tensor | float] = {**self.router_steps.end(), **self._mixing.numbers()}
        for name, value in numbers.items():
            self.step_log.note(name, value)
        self._mixing.end_step()
        self._log_step()
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val, foreach=False)
        elif gradient_clip_val:
            scale_gradients(parameters, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Routers learn which optimizer step this is part of; the log of the one before is closed."""
        self.router_steps.begin(self.global_step, self.global_rank, self.trainer.world_size)
        self.losses.is_shown = is_due(self.trainer, self.global_step + 1)
        if self._begins_step:
            self._begins_step = False
            self.step_log.clear()
            forget_step_values(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Language-model loss plus the weighted balancing losses of one micro-batch."""
        if self.losses.needs_window:
            self.losses.look_ahead([self._inputs(one) for one in self._window(batch, batch_idx)], self.router_steps)
        domain = batch["domain"] if self._mixing.counts_load else None
        terms = (self._compiled_terms or self.losses.terms)(*self._inputs(batch), domain)
        tokens = (batch["labels"] != IGNORE_INDEX).sum()
        nats = terms.nats.sum()
        loss = nats / tokens
        self.step_log.note("loss", loss)
        self.step_log.note("bits_per_byte", bits_per_byte(nats, batch["label_bytes"].sum()))
        group = self.trainer.optimizers[0].param_groups[0]
        self.step_log.note("learning_rate", group["lr"] / group.get("width", 1.0))
        total = self.losses.total(loss, terms)
        self.router_steps.add(terms.counts, tokens, terms.statistics)
        if terms.domain_counts is not None:
            self._mixing.add(terms.domain_counts)
        self.not_finite.watch(total, terms.z_losses)
        return total

    def _window(self, batch: Batch, batch_idx: int) -> list[Batch]:
        """The micro-batches of the optimizer step that begins with this one."""
        left = self.trainer.num_training_batches - batch_idx  # an epoch may end within a step
        count = int(min(self.trainer.accumulate_grad_batches, left))
        if count == 1:
            return [batch]
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "upcoming"):
            raise UserError(
                f"model.config.router_aux_loss_scope is window, but {type(data).__name__} does not say which batches "
                "come next (upcoming); use global"
            )
        return [batch, *(self.transfer_batch_to_device(later, self.device, 0) for later in data.upcoming(count - 1))]

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Told]:
        """Ids and labels (B, S), and what routers are told of the tokens beside."""
        return batch["input_ids"], batch["labels"], self._told(batch)

    def _told(self, batch: Batch) -> dict[str, Tensor]:
        """What routers are told of the tokens beside their ids, where one asks for it: domain, and document, (B, S).

        Documents are of training alone: evaluation routes as generation does, where later tokens are not there yet.
        """
        if not self.decoder.needs_context:
            return {}
        told = {"domain": domains_of_tokens(batch)}
        if self.training:
            end = self.trainer.datamodule.tokenizer.eos_id  # type: ignore[attr-defined]
            told["document"] = documents_of_tokens(batch["input_ids"], end)
        return told

    def _log_step(self) -> None:
        """The step has ended: log it, means over its micro-batches and over ranks, if it is one that is logged."""
        self._begins_step = True
        if not is_logged(self.trainer, self.global_step + 1):
            return
        numbers, vectors = self.step_log.read(self.trainer.world_size)
        self.step_routing = StepRouting.read(self.config, vectors)
        if self.step_routing is not None:
            numbers |= self.step_routing.numbers()
            if is_due(self.trainer, self.global_step + 1):
                log_numbers(self.trainer, self.step_routing.by_layer(), self.global_step)
        for name, value in numbers.items():
            shown = name in ("train/loss", "train/bits_per_byte")
            self.log(name, torch.tensor(value), prog_bar=shown)  # in main memory: nobody waits to show it

    def step_metrics(self) -> dict[str, float]:
        """Numbers of the last step, whether it was logged or not; all ranks call this together."""
        return self.step_log.read(self.trainer.world_size)[0]

    # Validation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum up the text loss of every domain."""
        assert self._val_loss is not None
        self._add_text_loss(self._val_loss, batch)
        if self._expert_choice_loss is not None:
            with choosing_tokens(self.decoder.routers):
                self._add_text_loss(self._expert_choice_loss, batch)

    def _add_text_loss(self, total: TextLoss, batch: Batch) -> None:
        nats = self.losses.terms(*self._inputs(batch)).nats
        tokens = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
        total.update(nats, tokens, batch["label_bytes"].sum(dim=1), batch["domain"])

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte, over all text and by domain; domains' weights may follow the loss."""
        losses = self._log_text_loss("val")
        self.last_validated_step = self.global_step
        # What stops a run validates it too: a run that is continued must not have learned from that.
        if self.trainer.state.fn == TrainerFn.FITTING and validation_is_due(self.trainer):
            self._mixing.end_validation(losses)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same as validation, on the test text."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte, over all text and by domain."""
        self._log_text_loss("test")

    def _log_text_loss(self, stage: str) -> Tensor:
        """The loss of each domain (D,), which is logged too."""
        assert self._val_loss is not None
        found = {name: value.cpu() for name, value in self._val_loss.compute().items()}
        self._val_loss.reset()
        if self._expert_choice_loss is not None:
            self.log(f"{stage}/loss_by_expert_choice", self._expert_choice_loss.compute()["loss"].cpu())
            self._expert_choice_loss.reset()
        domains = self.trainer.datamodule.domains  # type: ignore[attr-defined]
        for name in ("loss", "perplexity", "bits_per_byte"):  # sums over ranks already
            self.log(f"{stage}/{name}", found[name], prog_bar=name == "bits_per_byte")
        if len(domains) > 1:
            for index, domain in enumerate(domains):
                if found["loss_by_domain"][index].isfinite():
                    self.log(f"{stage}/loss/{domain}", found["loss_by_domain"][index])
                    self.log(f"{stage}/bits_per_byte/{domain}", found["bits_per_byte_by_domain"][index])
        return found["loss_by_domain"]

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """``nats (B, S)`` of every next token, 0 where nothing is predicted; its ``labels`` and ``domain (B,)``."""
        logits = self.decoder(batch["input_ids"], **self._told(batch)).logits
        nats = token_losses(logits, batch["labels"])
        return {"nats": nats, "labels": batch["labels"], "domain": batch["domain"]}

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the model's config, the learning rates' plan, and the random states, so that a resumed run draws what it
        would have drawn: those of the CPU, and of the device that the first rank computes on."""
        checkpoint["model_config"] = self.config.to_dict()
        if self._plan is not None:
            checkpoint["schedule"] = self._plan.to_dict()
        checkpoint["rng"] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model; the rest is taken up when training starts."""
        saved = checkpoint.get("model_config")
        if saved is not None:
            require_same_run(self.config, saved)
        self._former_plan = checkpoint.get("schedule", {})
        self._rng = checkpoint.get("rng")

    def on_train_start(self) -> None:
        """Restore the random states of a resumed run; its config says what the optimizer does, not its checkpoint."""
        if self._plan is not None:
            for change in self._plan.changes(self._former_plan):
                say(f"{change} from step {self.global_step} on")
            new, schedule = build_optimizer(self.decoder, self.optimizer_config), self.trainer.lr_scheduler_configs[0]
            self._plan.hold(self.trainer.optimizers[0], schedule.scheduler, new)
        rng, self._rng = self._rng, None
        if rng is None:
            return
        torch.set_rng_state(rng["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in rng:
            states = rng["cuda"]  # older checkpoints have those of all devices
            own = states if isinstance(states, Tensor) else states[min(self.device.index or 0, len(states) - 1)]
            torch.cuda.set_rng_state(own.cpu(), self.device)
