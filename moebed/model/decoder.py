"""The one decoder: every family of the paper is a ModelConfig of it.

B sequences, S positions, T = B·S tokens, E experts, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebed.errors import ConfigError, UserError
from moebed.machine.float32 import exact_products
from moebed.model.attention import KVCache, build_norm
from moebed.model.config import LayerConfig, ModelConfig
from moebed.model.experts import weighted_sum
from moebed.model.fused import GATINGS
from moebed.model.hyper_experts import AdapterGenerator, build_adapters, build_generator
from moebed.model.latent_attention import build_attention
from moebed.model.locality import Placement
from moebed.model.losses import output_similarity, weight_similarity
from moebed.model.orthogonality import (
    coupling_loss,
    gram_distance,
    negative_variance,
    perturbed,
    projections,
    squared_cosines,
)
from moebed.model.rope import Rope, RotaryEmbedding
from moebed.model.routers import Router, Routing, TokenContext, build_router
from moebed.model.routers.controls import uniform_numbers
from moebed.model.routing import require_routing
from moebed.model.width import Factors, is_bias, width_factors


class DecoderOutput(NamedTuple):
    """What a forward pass gives back."""

    logits: Tensor  # (B, S, V)
    routings: tuple[Routing, ...]  # one for each layer that has experts, in order; tokens flattened to T


class FeedForward(nn.Module):
    """Gated FFN: dense layers, and the shared experts of an MoE layer as one wide expert."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gating = GATINGS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H) -> (..., H)."""
        return self.down_proj(self.gating(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """Router, routed experts, and shared experts and adapters where the layer has them. Dropless."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, generator: AdapterGenerator | None = None) -> None:
        super().__init__()
        self.router = build_router(config, layer)
        self.experts = self.router.build_experts(config, layer)
        self.shared_expert: FeedForward | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if layer.num_shared_experts:
            self.shared_expert = FeedForward(config, layer.shared_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.hyper_experts = build_adapters(config, layer, generator)
        self.config, self.index, self.num_experts = config, layer.index, layer.num_experts
        # What a router from elsewhere decides is checked.
        self.checks_routing = not type(self.router).__module__.startswith("moebed.")
        self.diversity_losses = frozenset(name for name, coefficient in config.diversity_losses.items() if coefficient)
        self._check_gate()

    def _check_gate(self) -> None:
        """Refuse losses on gate embeddings that the router has not; SimBal's begin orthogonal."""
        asked = self.diversity_losses & {"router_orthogonality", "router_coupling"}
        if not asked:
            return
        if self.router.gate() is None:
            raise ConfigError(
                f"model config: {min(asked)}_loss_coef is of gate embeddings, but router {self.config.router} has "
                "none; set it to 0"
            )
        if "router_orthogonality" in asked and self.config.router_orthogonality == "simbal":
            for parameter in self.router.parameters():
                if parameter.ndim == 2:
                    parameter.draw = nn.init.orthogonal_  # type: ignore[attr-defined]

    def forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        """Tokens x (T, H) of which a context (T,) is known -> outputs (T, H) and the router's decisions."""
        routing = self.router(x, self.experts, context)
        if self.checks_routing:
            require_routing(routing, self.router, len(x), self.num_experts)
        outputs = self.experts.known_outputs(routing)
        if self.training and self.diversity_losses:
            routing, outputs = self._with_diversity(x, routing, outputs)
        return self.combine(x, routing, outputs), routing.without_precomputed()

    def _with_diversity(self, x: Tensor, routing: Routing, outputs: Tensor | None) -> tuple[Routing, Tensor | None]:
        """The routing with the losses that are on, and the outputs (T, K, H) that some of them look at."""
        asked, losses = self.diversity_losses, dict(routing.losses or {})
        losses |= {name: value.expand(len(x)) for name, value in self._parameter_losses().items()}
        if "probability_variance" in asked:
            losses["probability_variance"] = negative_variance(routing.router_probs)
        if asked & {"output_diversity", "output_orthogonality"} and outputs is None:
            outputs = self.experts.each(x, routing.topk_index, routing.precomputed)
        if "output_diversity" in asked:
            assert outputs is not None
            losses["output_diversity"] = output_similarity(outputs)
        if "output_orthogonality" in asked:
            assert outputs is not None
            losses["output_orthogonality"] = projections(outputs)
        return routing._replace(losses=losses), outputs

    def _parameter_losses(self) -> dict[str, Tensor]:
        """Those () of parameters alone; here, not from outside, since only here are a sharded layer's weights whole."""
        asked, losses = self.diversity_losses, {}
        gate = self.router.gate_copy() if asked & {"router_orthogonality", "router_coupling"} else None
        if "weight_diversity" in asked:
            losses["weight_diversity"] = weight_similarity(list(self.experts.mean_neurons().values()))
        if "router_orthogonality" in asked:
            assert gate is not None
            losses["router_orthogonality"] = (
                gram_distance(gate) if self.config.router_orthogonality == "simbal" else squared_cosines(gate)
            )
        if "router_coupling" in asked:
            assert gate is not None
            # Of the step and the layer, so that all ranks and a recomputed pass draw the same.
            uniform = uniform_numbers((self.index, self.router.optimizer_step), gate.shape, gate.device)
            asking = perturbed(gate if self.config.router_coupling_gradient else gate.detach(), uniform)
            answers = self.experts.responses(asking)
            losses["router_coupling"] = coupling_loss(answers, self.config.router_coupling_alpha)
        return losses

    def combine(self, x: Tensor, routing: Routing, outputs: Tensor | None = None) -> Tensor:
        """Outputs (T, H) for tokens x (T, H) that are routed already; from the chosen experts' (T, K, H), if given."""
        beside = None if self.shared_expert is self.hyper_experts is None else partial(self.beside, x, routing)
        if outputs is None:
            return self.experts(x, routing, beside)
        # What is left needs none of the experts' weights: no rank gathers them once more.
        total = weighted_sum(routing.topk_weight, outputs)
        return total if beside is None else total + beside()

    def beside(self, x: Tensor, routing: Routing) -> Tensor:
        """What is added beside the routed experts for tokens x (T, H): (T, H)."""
        if self.hyper_experts is None:
            return self.shared_output(x)
        adapted = self.hyper_experts(x, routing)
        return adapted if self.shared_expert is None else adapted + self.shared_output(x)

    def shared_output(self, x: Tensor) -> Tensor:
        """What the shared experts add for tokens x (T, H): (T, H)."""
        assert self.shared_expert is not None
        shared = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        return shared


class Block(nn.Module):
    """One decoder layer. The three steps are apart so that a walk over layers can look between them.

    Args:
        config: The model.
        index: Of the layer.
        generator: What the layers of HyperMoE share.
    """

    def __init__(self, config: ModelConfig, index: int, generator: AdapterGenerator | None = None) -> None:
        super().__init__()
        layer = config.layer(index)

        def norm(there: bool) -> nn.Module:
            return build_norm(config) if there else nn.Identity()

        self.pre_attn_norm, self.pre_ffn_norm = norm(config.pre_norms), norm(config.pre_norms)
        self.post_attn_norm, self.post_ffn_norm = norm(config.post_norms), norm(config.post_norms)
        self.self_attn = build_attention(config, index)
        self.residual_multiplier = config.residual_multiplier
        self.mlp: MoE | FeedForward
        if layer.num_experts:
            self.mlp = MoE(config, layer, generator)
        else:
            assert config.intermediate_size is not None
            self.mlp = FeedForward(config, config.intermediate_size)

    def attend(self, hidden: Tensor, rope: Rope, cache: KVCache | None = None) -> Tensor:
        """Residual stream after attention, (B, S, H)."""
        return self._added(hidden, self.post_attn_norm(self.self_attn(self.pre_attn_norm(hidden), rope, cache)))

    def feed_forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing | None]:
        """Output of the FFN or MoE on its normalised input x (B, S, H), and the routing of an MoE."""
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(x.flatten(0, 1), None if context is None else context.changed(torch.flatten))
            return out.view_as(x), routing
        return self.mlp(x), None

    def leave(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Residual stream that leaves the layer, from that after attention and what FFN or MoE makes, all (..., H)."""
        return self._added(hidden, self.post_ffn_norm(output))

    def _added(self, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden + _scaled(output, self.residual_multiplier)

    def forward(
        self,
        hidden: Tensor,
        rope: Rope,
        cache: KVCache | None = None,
        context: TokenContext | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """hidden (B, S, H) of tokens of a context (B, S) -> (B, S, H) and the routing of an MoE layer."""
        hidden = self.attend(hidden, rope, cache)
        out, routing = self.feed_forward(self.pre_ffn_norm(hidden), context)
        return self.leave(hidden, out), routing


class Decoder(nn.Module):
    """Embedding, blocks, norm and head, as ModelConfig says.

    Args:
        config: Shape and behaviour.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.seed = int(torch.randint(2**62, (), device="cpu"))  # before any part draws numbers of its own
        self.placement = Placement.of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config)
        generator = build_generator(config)
        self.layers = nn.ModuleList(Block(config, index, generator) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.adapter_generator = generator
        self.needs_context = any(router.needs_context for router in self.routers)  # for more than the ids of tokens
        self.needs_domain = any(router.needs_domain for router in self.routers)
        self.width_factors = width_factors(self, config)  # by name
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices from N(0, initializer_range), biases 0, norm scales 1, routers' state at its start.

        Each parameter is drawn by its name from one seed of torch's generator: two models under one seed share every
        parameter of equal name and shape, and a rank can draw its parts of a model without the rest. What a router
        has filled itself stays as it is.
        """
        for name, parameter in self.named_parameters():
            if not parameter.is_meta and self._own_router(name, parameter) is None:
                parameter.copy_(self.initial(name, parameter))
        for router in self.routers:
            router.reset_state()

    def initial(self, name: str, parameter: Tensor) -> Tensor:
        """What a parameter begins with: a tensor of its full shape, on the CPU.

        Args:
            name: Of the parameter, within the decoder.
            parameter: It, or one like it without memory. Of what a router makes and fills itself, only one without:
                in memory it stays as it is.

        Raises:
            ConfigError: It is such a parameter, and the router does not say how it begins.
        """
        router = self._own_router(name, parameter)
        if router is not None:
            return router.initial(name.rpartition(".router.")[2], parameter)
        value = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
        draw = getattr(parameter, "draw", None)  # where a part says how its own begin
        if draw is None and is_bias(name):
            return value
        if draw is None and parameter.ndim == 1:
            return value.fill_(1.0)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        draw = draw or partial(nn.init.normal_, mean=0.0, std=self.config.initializer_range)
        factor = self.width_factors.get(name, Factors()).initial
        return draw(value, generator=generator) if factor == 1 else draw(value, generator=generator).mul_(factor)

    def _own_router(self, name: str, parameter: Tensor) -> Router | None:
        """The router that decides by itself how a parameter begins."""
        owner, found, _ = name.rpartition(".router.")
        return self.get_submodule(f"{owner}.router") if found and not hasattr(parameter, "is_drawn") else None  # type: ignore[return-value]

    def stand_for(self, process: int, processes: int) -> None:
        """Say which of several processes this is: which of the ranks that share the experts its tokens are of.

        Raises:
            ConfigError: The ranks cannot be spread over so many processes.
        """
        self.placement = Placement.of(self.config, process, processes)
        for router in self.routers:
            router.token_parts = self.placement.parts

    @property
    def routers(self) -> list[Router]:
        """Those of the layers that have experts, in order."""
        return [block.mlp.router for block in self.blocks if isinstance(block.mlp, MoE)]

    @property
    def adapters_compile(self) -> bool:
        """Whether the forward passes of the adapters, if there are any, are one graph."""
        adapters = [block.mlp.hyper_experts for block in self.blocks if isinstance(block.mlp, MoE)]
        return all(layer is None or layer.compiles for layer in adapters)

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name: every parameter, tied ones once, and the state of routers."""
        kept = self.state_dict(keep_vars=True).keys()
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor for name, tensor in tensors.items() if name in kept}

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return cast(list[Block], list(self.layers))

    def embed(self, input_ids: Tensor, start: int = 0) -> tuple[Tensor, Rope]:
        """Residual stream (B, S, H) that enters the first layer, and the rotary cos and sin of its positions."""
        stop = start + input_ids.shape[1]
        if stop > self.config.max_position_embeddings:
            raise UserError(
                f"a sequence of {stop} tokens is longer than the model's max_position_embeddings "
                f"{self.config.max_position_embeddings}; shorten the text or raise it"
            )
        rope = self.rotary(start, input_ids.shape[1], input_ids.device)
        return _scaled(self.embed_tokens(input_ids), self.config.embedding_multiplier), rope

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, S, V) from the residual stream that leaves the last layer."""
        return _scaled(self.lm_head(self.norm(hidden)), self.config.logits_multiplier)

    def forward(
        self,
        input_ids: Tensor,
        caches: list[KVCache] | None = None,
        domain: Tensor | None = None,
        document: Tensor | None = None,
    ) -> DecoderOutput:
        """Logits for every position of input_ids (B, S).

        Args:
            input_ids: (B, S) int64.
            caches: One for each layer; then input_ids are the positions that follow those already cached.
            domain: (B, S) which of the data's domains each token is of; only a router that ``needs_context`` asks.
            document: (B, S) which document each token is of, as the loader numbers them; the same.

        Raises:
            UserError: A router needs what is not given.
        """
        context = TokenContext(input_ids)
        if caches and self.needs_domain:
            raise UserError(f"router {self.config.router} needs the domain of each token: it cannot generate text")
        if self.needs_context and not caches:  # text that is not written yet is of no domain and no document
            context = TokenContext.of_batch(input_ids, domain, document)
        hidden, rope = self.embed(input_ids, start=caches[0].length if caches else 0)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        routings = []
        for index, block in enumerate(self.blocks):
            if recompute:
                hidden, routing = checkpoint(block, hidden, rope, None, context, use_reentrant=False)
            else:
                hidden, routing = block(hidden, rope, caches[index] if caches else None, context)
            if routing is not None:
                routings.append(routing)
        return DecoderOutput(self.head(hidden), tuple(routings))


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor, without a pass over memory where the factor is 1."""
    return x if factor == 1 else x * factor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast and with exact products in float32, undone at the end."""
    modes = [(module, module.training) for module in model.modules()]  # a part may be frozen in evaluation mode
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.autocast(device, enabled=False), exact_products():
            yield
    finally:
        for module, training in modes:
            module.training = training
