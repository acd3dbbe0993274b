"""A checkpoint as a model that text goes through, and its layers as probes see them: weights are read when needed.

T tokens, N some tokens or rows, E experts, K experts per token, H hidden, F expert intermediate, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.checkpoints.open_ffn import OpenFfn, Precision
from moebed.checkpoints.pool import Piece, WeightPool
from moebed.checkpoints.reading_order import ReadingPlan
from moebed.model.attention import build_norm
from moebed.model.config import ModelConfig
from moebed.model.decoder import Block, MoE
from moebed.model.experts import bias_name
from moebed.model.fused import GATINGS
from moebed.model.hyper_experts import AdapterGenerator, build_generator
from moebed.model.routers import Routing, build_router
from moebed.views.beside import ExpertSums, Rows
from moebed.views.layer import MATRICES, ExpertKind, ExpertView, Watch
from moebed.views.text_pass import band_rows, logits_in_bands

_HEAD_BAND = 1 << 26  # bytes
_GAP = 16  # rows of the embedding that are read for nothing rather than with a read of their own
_FFN = re.compile(r"mlp\.(experts\.|shared_expert\.|(gate|up|down)_proj\.)")
_ROUTER = "mlp.router."
HEAD = -1  # in a plan, what comes after the last layer


class StreamedModel:
    """A checkpoint as a TextPass asks for it; see ``moebed.views.text_pass.TextModel``.

    Args:
        checkpoint: Its files.
        pool: Where its weights are read.
        plan: What is read when.
        precision: How it is computed.
        role: What the names of its steps in the plan begin with.
    """

    def __init__(
        self, checkpoint: Checkpoint, pool: WeightPool, plan: ReadingPlan, precision: Precision, role: str = ""
    ) -> None:
        self.checkpoint, self.pool, self.plan, self.precision, self.role = checkpoint, pool, plan, precision, role
        self.config: ModelConfig = checkpoint.config
        self.current: Block | None = None
        self._generator: AdapterGenerator | None = None

    def computing(self) -> AbstractContextManager[object]:
        """The precision of products."""
        return self.precision.computing()

    def embed(self, ids: Tensor) -> Tensor:
        """Residual stream (N, H) of ids (N,): only the rows of these ids are read."""
        return self._rows("embed_tokens.weight", ids) * self.config.embedding_multiplier

    def _rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows (N, H) float32 of a table, of ids (N,)."""
        part = self.checkpoint.keys.parameter(name)[0].part
        wanted, where = ids.cpu().unique(return_inverse=True)
        rows = torch.empty(len(wanted), part.columns, device=self.precision.device)
        numbers = wanted.tolist()
        start = 0
        while start < len(numbers):
            stop = start + 1
            while stop < len(numbers) and numbers[stop] - numbers[stop - 1] <= _GAP:
                stop += 1
            first = numbers[start]
            found = self.checkpoint.read(part._replace(first=first, rows=numbers[stop - 1] - first + 1))
            rows[start:stop] = self.precision.seen(found[wanted[start:stop] - first]).float()
            start = stop
        return rows[where.to(rows.device)]

    def block(self, index: int) -> Block:
        """A layer's attention, norms and router, read; its experts or FFN have no weights here."""
        if self._generator is None:
            self._generator = self._read_generator()
        with torch.device("meta"):
            block = Block(self.config, index, self._generator).eval()
        self.pool.enter(self.plan.group(index, f"{self.role}block"))
        state = {}
        for name, piece in block_pieces(self.checkpoint, index).items():
            shape = self.checkpoint.keys.shapes[f"layers.{index}.{name}"]
            weights = self.precision.seen(self.pool.get(piece)).view(shape)
            exact = len(shape) == 1 or name.startswith(_ROUTER)
            state[name] = weights.to(torch.float32 if exact else self.precision.compute)
            if state[name].data_ptr() == weights.data_ptr():
                state[name] = state[name].clone()  # the pool will read over it
        block.load_state_dict(state, strict=False, assign=True)
        self.current = block
        return block

    def _read_generator(self) -> AdapterGenerator | None:
        """What the layers of HyperMoE share, read beside the plan and kept; None where there is none."""
        with torch.device("meta"):
            generator = build_generator(self.config)
        if generator is None:
            return None
        state = {}
        for name in generator.state_dict():
            part = self.checkpoint.keys.parameter(f"adapter_generator.{name}")[0].part
            weights = self.precision.seen(self.checkpoint.read(part))
            state[name] = weights.view(part.shape).to(self.precision.compute)
        generator.load_state_dict(state, assign=True)
        return generator

    def gate(self, index: int) -> Tensor | None:
        """The gate embeddings (E, H) of a layer, float32; None where its router has none."""
        planned = self.plan.has(index, f"{self.role}block")
        if planned:
            self.pool.enter(self.plan.group(index, f"{self.role}block"))
        with torch.device("meta"):
            router = build_router(self.config, self.config.layer(index))
        if router.gate() is None:
            return None
        state = {}
        for name, piece in block_pieces(self.checkpoint, index).items():
            if name.startswith(_ROUTER):
                weights = self.pool.get(piece) if planned else self.checkpoint.read(piece.part)
                shape = self.checkpoint.keys.shapes[f"layers.{index}.{name}"]
                state[name.removeprefix(_ROUTER)] = self.precision.seen(weights).float().clone().view(shape)
        router.load_state_dict(state, assign=True)
        gate = router.gate()
        return None if gate is None else gate.detach()

    def layer_weights(self, index: int) -> StreamedWeights:
        """The layer's FFN or experts."""
        return StreamedWeights(self, index)

    def head(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits (N, v), band after band of the vocabulary."""
        norm, bias = final_norm(self.checkpoint, self.precision.seen), head_bias(self.checkpoint)
        x = norm(hidden)
        bias = None if bias is None else self.precision.seen(bias)
        yield from logits_in_bands(x, self._head_rows(len(x)), bias, self.config.logits_multiplier)

    def _head_rows(self, num_tokens: int) -> Iterator[Tensor]:
        """Rows (v, H) of the output embedding, band after band."""
        for number, piece in enumerate(head_pieces(self.checkpoint)):
            self.pool.enter(self.plan.group(HEAD, number))
            for rows in self.precision.seen(self.pool.get(piece)).split(band_rows(num_tokens)):
                yield rows.to(self.precision.compute)

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows (N, H) of the head, with the last norm's scale: only the rows of these ids are read."""
        return self._rows(head_name(self.checkpoint), ids) * (self._last_scale() * self.config.logits_multiplier)

    def _last_scale(self) -> Tensor:
        """(H,) of the norm before the head."""
        return final_norm(self.checkpoint, self.precision.seen).weight.view(-1)  # type: ignore[operator]


class StreamedWeights:
    """The weights of one layer of a checkpoint; see ``moebed.views.layer.LayerWeights``.

    Args:
        model: The checkpoint's model.
        layer: Index of the layer.
        reference: The layer of the dense reference.
    """

    def __init__(self, model: StreamedModel, layer: int, reference: StreamedModel | None = None) -> None:
        self._model, self._layer, self._reference = model, layer, reference
        self._config = model.config.layer(layer)
        self._gating = GATINGS[model.config.hidden_act]

    def expert_matrix(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one routed expert's matrix, as stored or rounded."""
        first, *rest = factor_pieces(self._model.checkpoint, self._layer, name, index)
        found = self._seen(name, first, rows)
        for factor in rest:
            found = found.float() @ self._seen(name, factor).float()
        return found

    def expert_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one routed expert's matrix."""
        parts = self._model.checkpoint.keys.factors(self._layer, name, 0)
        return parts[0].rows, parts[-1].columns

    def shared_matrix(self, name: str) -> Tensor | None:
        """The shared expert's matrix."""
        part = self._model.checkpoint.keys.shared(self._layer, name)
        return None if part is None else self._seen(name, Piece(self._model.checkpoint, part))

    def reference_matrix(self, name: str) -> Tensor | None:
        """The matrix of the dense reference model's FFN at this layer."""
        piece = dense_piece(self._reference.checkpoint, self._layer, name) if self._reference is not None else None
        return None if piece is None else self._seen(name, piece)

    def run_experts(
        self, x: Tensor, watch: Watch | None = None, beside: ExpertSums | None = None
    ) -> Iterator[ExpertView]:
        """What every expert, the shared one last, makes of tokens x (T, H); each expert's weights are read once."""
        count, runs = self._config.num_experts, [len(x)] if beside is None else [len(x), beside.num_rows]
        if beside is not None:
            beside.begin()
        for index in range(count):
            ffn = self._open(index, runs)
            output = ffn.run(x, None if watch is None else partial(watch, index))
            if beside is not None:
                beside.add(index, ffn.run, ffn.most)
            yield ExpertView(index, output)
        if self._config.num_shared_experts:
            ffn = self._open("shared", runs)
            output = ffn.run(x) * self._shared_gate(x)
            if beside is not None:
                self._add_shared(ffn, beside)
            yield ExpertView(count, output, ExpertKind.SHARED)
        if beside is not None:
            self._add_adapted(beside)

    def each(self, x: Tensor, topk_index: Tensor) -> Tensor:
        """What the experts topk_index (T, K) make of tokens x (T, H): (T, K, H) float32."""
        outputs = x.new_zeros(*topk_index.shape, x.shape[1], dtype=torch.float32)
        for index in range(self._config.num_experts):
            token, choice = torch.where(topk_index == index)
            if len(token):
                outputs[token, choice] = self._open(index, [len(token)], routing_step(index)).run(x[token])
        return outputs

    def combine(self, parts: Sequence[Rows]) -> list[Tensor]:
        """What the layer makes of streams by the chosen experts alone, or by its dense FFN: (T, H) of each."""
        sums = ExpertSums(parts).begin()
        if not self._config.num_experts:
            ffn = self._open(f"{self._model.role}ffn", [len(part.x) for part in parts])
            sums.add_to_all(ffn.run, ffn.most)
            return sums.totals
        for index in range(self._config.num_experts):
            if rows := sums.rows_of(index):
                ffn = self._open(index, [rows])
                sums.add(index, ffn.run, ffn.most)
        if self._config.num_shared_experts:
            self._add_shared(self._open("shared", [len(part.x) for part in parts]), sums)
        self._add_adapted(sums)
        return sums.totals

    def _add_shared(self, ffn: OpenFfn, sums: ExpertSums) -> None:
        sums.add_to_all(lambda rows: ffn.run(rows) * self._shared_gate(rows), ffn.most)

    def _add_adapted(self, sums: ExpertSums) -> None:
        for part, total in zip(sums.parts, sums.totals, strict=True):
            adapted = None if part.routing is None else self.adapted(part.x, part.routing)
            if adapted is not None:
                total += adapted

    def adapted(self, x: Tensor, routing: Routing) -> Tensor | None:
        """What HyperMoE's adapters add for tokens x (T, H): (T, H)."""
        mlp = self._model.current.mlp if self._model.current is not None else None
        if not isinstance(mlp, MoE) or mlp.hyper_experts is None:
            return None
        with self._model.computing():
            return mlp.hyper_experts(x, routing).float()

    def _open(self, ffn: int | str, runs: Sequence[int], step: Hashable | None = None) -> OpenFfn:
        """One FFN, read.

        Args:
            ffn: An expert's index, ``shared`` or ``ffn``.
            runs: Rows of each run that it is opened for.
            step: Of the plan; called as the FFN is, if not given.
        """
        model, weights = self._model, ffn_pieces(self._model.checkpoint, self._layer, ffn)
        model.pool.enter(model.plan.group(self._layer, ffn if step is None else step))
        matrices = {name: [model.pool.get(piece) for piece in pieces] for name, pieces in weights.items()}
        return OpenFfn(matrices, model.precision, self._gating, runs)

    def _shared_gate(self, x: Tensor) -> Tensor | float:
        mlp = self._model.current.mlp if self._model.current is not None else None
        if not isinstance(mlp, MoE) or mlp.shared_expert_gate is None:
            return 1.0
        with self._model.computing():
            return mlp.shared_expert_gate(x).float().sigmoid()

    def _seen(self, name: str, piece: Piece, rows: slice = slice(None)) -> Tensor:
        self._model.pool.enter(self._model.plan.group(self._layer, name))
        return self._model.precision.seen(self._model.pool.rows(piece, rows))


def block_pieces(checkpoint: Checkpoint, layer: int) -> dict[str, Piece]:
    """What a layer has beside its experts or FFN, by the name of the Block's parameter."""
    prefix, found = f"layers.{layer}.", {}
    for name in checkpoint.keys.shapes:
        if name.startswith(prefix) and not _FFN.search(name):
            found[name.removeprefix(prefix)] = Piece(checkpoint, checkpoint.keys.parameter(name)[0].part)
    return found


def routing_step(expert: int) -> Hashable:
    """What the plan calls running an expert because the router asks for its outputs."""
    return "routing", expert


def ffn_pieces(checkpoint: Checkpoint, layer: int, step: int | str) -> dict[str, list[Piece]]:
    """The three matrices of a routed expert, given by its index, of the shared expert, or of a dense layer's FFN.

    Each is the product of its pieces, which is one piece for most. Beside them the biases of an expert that has some.
    """
    if isinstance(step, int):
        weights = {name: factor_pieces(checkpoint, layer, name, step) for name in MATRICES}
        if checkpoint.config.experts_bias:
            biases = {name: checkpoint.keys.bias(layer, name, step) for name in MATRICES}
            weights |= {bias_name(name): [Piece(checkpoint, part)] for name, part in biases.items()}
        return weights
    found = {}
    for name in MATRICES:
        part = checkpoint.keys.shared(layer, name) if step == "shared" else checkpoint.keys.dense(layer, name)
        assert part is not None
        found[name] = [Piece(checkpoint, part)]
    return found


def factor_pieces(checkpoint: Checkpoint, layer: int, name: str, expert: int) -> list[Piece]:
    """The pieces whose product is one matrix of a routed expert."""
    return [Piece(checkpoint, part) for part in checkpoint.keys.factors(layer, name, expert)]


def matrix_pieces(checkpoint: Checkpoint, reference: Checkpoint | None, layer: int, name: str) -> list[Piece]:
    """One matrix of all experts of a layer, of the shared expert, and of the dense reference's FFN."""
    keys, experts = checkpoint.keys, range(checkpoint.config.layer(layer).num_experts)
    pieces = [piece for expert in experts for piece in factor_pieces(checkpoint, layer, name, expert)]
    shared, dense = keys.shared(layer, name), dense_piece(reference, layer, name)
    pieces += [Piece(checkpoint, shared)] if shared is not None else []
    return pieces + ([dense] if dense is not None else [])


def dense_piece(checkpoint: Checkpoint | None, layer: int, name: str) -> Piece | None:
    """A matrix of a dense layer's FFN; None where there is no such layer."""
    if checkpoint is None or layer >= checkpoint.config.num_hidden_layers:
        return None
    part = checkpoint.keys.dense(layer, name)
    return Piece(checkpoint, part) if part is not None else None


def final_norm(checkpoint: Checkpoint, seen: Callable[[Tensor], Tensor] = lambda weights: weights) -> nn.Module:
    """The norm before the head, float32, of weights as they are seen; without gradients."""
    norm = build_norm(checkpoint.config).requires_grad_(False)
    for name, parameter in norm.named_parameters():
        parameter.data = seen(checkpoint.read(checkpoint.keys.parameter(f"norm.{name}")[0].part)).float()
    return norm


def head_bias(checkpoint: Checkpoint) -> Tensor | None:
    """The bias (V,) of the head, as it is stored; None without one."""
    if not checkpoint.config.lm_head_bias:
        return None
    return checkpoint.read(checkpoint.keys.parameter("lm_head.bias")[0].part)


def head_name(checkpoint: Checkpoint) -> str:
    """The parameter that is the output embedding, which may be the input's."""
    return "lm_head.weight" if "lm_head.weight" in checkpoint.keys.shapes else "embed_tokens.weight"


def head_pieces(checkpoint: Checkpoint) -> list[Piece]:
    """The output embedding in bands of rows."""
    whole = checkpoint.keys.parameter(head_name(checkpoint))[0].part
    band = max(1, _HEAD_BAND // (whole.columns * checkpoint.dtype(whole).itemsize))
    return [
        Piece(checkpoint, whole._replace(first=first, rows=min(band, whole.rows - first)))
        for first in range(0, whole.rows, band)
    ]
