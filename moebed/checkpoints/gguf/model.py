"""A GGUF file as the checkpoint that it was made from: its family's settings, and tensors under the published names.

E experts, F their width, H hidden, D numbers of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moebed.checkpoints.families.base import Family, Stored
from moebed.checkpoints.families.registry import family_of
from moebed.checkpoints.files import RawFile, TensorEntry
from moebed.checkpoints.gguf.architectures import ARCHITECTURES, Architecture, Facts, llama3_scaling, settings_of
from moebed.checkpoints.gguf.entries import LatentEntry, entry_of
from moebed.checkpoints.gguf.finding import files_of
from moebed.checkpoints.gguf.header import Header, TensorInfo, read_header
from moebed.checkpoints.gguf.rounding import notes_on_rounding
from moebed.checkpoints.gguf.types import require_unpacker
from moebed.errors import ConfigError, UserError

# Their tensor -> our parameter. Experts, and what has a part of them, are below.
_MATRICES = {
    **{"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"},
    **{"attn_q_a": "q_a", "attn_q_b": "q_b", "attn_kv_a_mqa": "kv_a", "attn_kv_b": "kv_b"},
}
_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "pre_attn_norm.weight",
    "attn_output_norm.weight": "post_attn_norm.weight",
    "ffn_norm.weight": "pre_ffn_norm.weight",
    "layer_output_norm.weight": "post_ffn_norm.weight",
    "post_ffw_norm.weight": "post_ffn_norm.weight",
    "post_attention_norm.weight": "pre_ffn_norm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "attn_q_a_norm.weight": "self_attn.q_a_norm.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_norm.weight",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
    "exp_probs_b.bias": "mlp.router.expert_bias",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    **{f"{theirs}.weight": f"self_attn.{ours}_proj.weight" for theirs, ours in _MATRICES.items()},
    **{f"{theirs}.bias": f"self_attn.{ours}_proj.bias" for theirs, ours in _MATRICES.items()},
    **{f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"},
    **{f"ffn_{matrix}.weight": f"mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")},
    **{f"ffn_{matrix}_shexp.weight": f"mlp.shared_expert.{matrix}_proj.weight" for matrix in ("gate", "up", "down")},
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ALL_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)_exps\.weight")
_ALL_BIASES = re.compile(r"ffn_(gate|up|down)_exps\.bias")
_HALF_OF_LATENT = re.compile(r"(blk\.(\d+)\.attn_)([kv])_b\.weight")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)\.weight")  # as files had them before April 2024
_DIVISORS = "rope_freqs.weight"


class GgufModel(NamedTuple):
    """What a GGUF file holds.

    Args:
        settings: As a ``config.json`` of its family has them.
        entries: Tensors by the family's names; by the file's where the family has none.
        notes: What a person should know of it.
        called: What the file calls, or would call, one of the entries.
    """

    settings: dict[str, Any]
    entries: dict[str, TensorEntry]
    notes: list[str]
    called: Callable[[str], str]


def open_gguf(path: Path) -> GgufModel:
    """The model of a GGUF file, or of several that belong together.

    Raises:
        UserError: A file is missing or damaged, of an architecture that is not known, or no model.
    """
    header, files = _read_all(path)
    kind = header.get("general.type", str, "model")
    if kind != "model":
        raise UserError(f"{path} holds no model but what its maker calls {kind!r}; give the file of the model itself")
    name = header.get("general.architecture", str)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{path}: architecture {name!r} is not supported; the known ones are {known}")
    facts = Facts(header, name)
    settings = settings_of(facts, architecture)
    family = family_of(settings["model_type"], str(path))
    infos, left = _without_further(header.tensors, settings["num_hidden_layers"])
    if _DIVISORS in infos:
        settings["rope_scaling"] = _scaling(path, files, infos.pop(_DIVISORS), settings)
    entries = dict(_entries(infos, files, family, architecture, settings))
    if any(info.kind.packed for info in infos.values()):
        require_unpacker()
    notes = [*notes_on_rounding(header), *(f"{path}: {note}" for note in architecture.notes)]
    if left:
        notes.append(f"{path}: {left[0]} and its like ({len(left)}) predict further tokens and are left aside")
    if settings["model_type"] == "mistral" and settings["sliding_window"] is None:
        notes.append(
            f"{path}: whether this Mistral has a sliding window does not stand in the file; none is taken, which "
            "matters to texts of more than 4,096 tokens alone"
        )
    if unread := facts.unread():
        notes.append(f"{path}: {', '.join(unread)}: not read, and no setting that is known here")
    return GgufModel(settings, entries, notes, partial(_called, family))


def _read_all(path: Path) -> tuple[Header, dict[Path, RawFile]]:
    """The first file's metadata and the tensors of all."""
    paths = files_of(path)
    headers = [read_header(one) for one in paths]
    first = headers[0]
    count = first.get("split.count", int, 1)
    if count != len(paths):
        raise UserError(
            f"{paths[0]} is one of {count} files by its metadata; their names must end as in 00001-of-00002"
        )
    for number, header in enumerate(headers):
        if len(headers) > 1 and header.get("split.no", int, number) != number:
            raise UserError(f"{header.path} is file {header.get('split.no', int)} by its metadata, counted from 0")
        for name, info in header.tensors.items():
            if first.tensors.setdefault(name, info) is not info:
                raise UserError(
                    f"tensor {name} is in {first.tensors[name].path} and in {info.path}; get the files again"
                )
    total = first.get("split.tensors.count", int, len(first.tensors))
    if len(headers) > 1 and total != len(first.tensors):
        raise UserError(f"{path}: {len(first.tensors)} tensors are there of {total}; get the files again")
    return first, {one: RawFile(one) for one in paths}


def _without_further(infos: Mapping[str, TensorInfo], layers: int) -> tuple[dict[str, TensorInfo], list[str]]:
    """Tensors of the model's layers, and names of those that come after the last one."""
    further = [name for name in infos if (found := _LAYER.fullmatch(name)) and int(found[1]) >= layers]
    return {name: info for name, info in infos.items() if name not in set(further)}, further


def _entries(
    infos: Mapping[str, TensorInfo],
    files: Mapping[Path, RawFile],
    family: Family,
    architecture: Architecture,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, TensorEntry]]:
    seen: dict[str, str] = {}
    for stored, info in infos.items():
        if half := _HALF_OF_LATENT.fullmatch(stored):
            if half[3] == "k":
                yield _latent(half[1], int(half[2]), infos, files, family)
            continue
        for name, entry in _named(stored, info, files[info.path], family, architecture, settings):
            if name in seen:
                raise UserError(f"{info.path}: tensors {seen[name]} and {stored} are both {name}; download it again")
            seen[name] = stored
            yield name, entry


def _latent(
    prefix: str, layer: int, infos: Mapping[str, TensorInfo], files: Mapping[Path, RawFile], family: Family
) -> tuple[str, TensorEntry]:
    """What makes keys and values of the latent, of two tensors that newer files have of it."""
    keys, values = infos[f"{prefix}k_b.weight"], infos.get(f"{prefix}v_b.weight")
    if values is None or len(keys.shape) != 3 or len(values.shape) != 3 or keys.shape[0] != values.shape[0]:
        raise UserError(f"{keys.path}: tensors {prefix}k_b and v_b are not those of the same heads; download it again")
    name = Stored.of(family.tensors["layers.{i}.self_attn.kv_b_proj.weight"]).name.format(i=layer)
    return name, LatentEntry(*(entry_of(files[one.path], one, one.shape) for one in (keys, values)))


def _named(
    stored: str,
    info: TensorInfo,
    file: RawFile,
    family: Family,
    architecture: Architecture,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, TensorEntry]]:
    """The family's tensors that one of the file is."""
    if info.kind.dtype is None:
        raise UserError(f"{info.path}: tensor {stored} is stored as {info.kind.name}, which is not read here")
    found = _LAYER.fullmatch(stored)
    layer, name = (int(found[1]), found[2]) if found else (-1, stored)
    if family.experts is not None and (one := _ONE_EXPERT.fullmatch(name)):
        yield _expert_name(family, one[1], layer, int(one[2])), entry_of(file, info, info.shape)
    elif family.experts is not None and (all_ := _ALL_EXPERTS.fullmatch(name)) and len(info.shape) == 3:
        matrices = all_[1].split("_")
        experts, rows, columns = info.shape
        rows //= len(matrices)
        for place in range(experts * len(matrices)):
            expert, matrix = divmod(place, len(matrices))
            entry = entry_of(file, info, (rows, columns), place * rows)
            yield _expert_name(family, matrices[matrix], layer, expert), entry
    elif family.experts is not None and (biases := _ALL_BIASES.fullmatch(name)) and len(info.shape) == 2:
        for expert in range(info.shape[0]):
            weight = _expert_name(family, biases[1], layer, expert)
            entry = entry_of(file, info, info.shape[1:], expert)
            yield f"{weight.removesuffix('.weight')}.bias", entry
    else:
        ours = f"layers.{{i}}.{_NAMES[name]}" if found and name in _NAMES else _NAMES.get(name, "")
        head = settings["head_dim"] if architecture.pairs and name in ("attn_q.weight", "attn_k.weight") else None
        one_row = name == "ffn_gate_inp_shexp.weight" and len(info.shape) == 1
        shape = (1, *info.shape) if one_row else info.shape
        if head is not None and (head % 2 or info.shape[0] % head):
            raise UserError(f"{info.path}: tensor {stored} has {info.shape[0]} rows, which are no heads of {head}")
        theirs = Stored.of(family.tensors[ours]).name.format(i=layer) if ours in family.tensors else stored
        yield theirs, entry_of(file, info, shape, head=head)


def _expert_name(family: Family, matrix: str, layer: int, expert: int) -> str:
    assert family.experts is not None
    return str(getattr(family.experts, matrix)).format(i=layer, e=expert)


def _called(family: Family, name: str) -> str:
    """What files call a tensor of the family's; the name itself where they have no other for it."""
    ours = {theirs: stored for stored, theirs in _NAMES.items()}
    templates = {
        Stored.of(stored).name: ours.get(parameter.removeprefix("layers.{i}."))
        for parameter, stored in family.tensors.items()
    }
    if family.experts is not None:
        templates |= {str(getattr(family.experts, one)): f"ffn_{one}_exps.weight" for one in ("gate", "up", "down")}
    for template, theirs in templates.items():
        pattern = re.escape(template).replace(r"\{i\}", r"(?P<layer>\d+)").replace(r"\{e\}", r"\d+")
        if theirs is not None and (found := re.fullmatch(pattern, name)):
            return f"blk.{found['layer']}.{theirs}" if "layer" in found.groupdict() else theirs
    return name


def _scaling(
    path: Path, files: Mapping[Path, RawFile], info: TensorInfo, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Llama 3's stretching of positions, out of a tensor (D/2,)."""
    if len(info.shape) != 1 or 2 * info.shape[0] != settings["head_dim"] or info.kind.name != "F32":
        raise ConfigError(f"{path}: {_DIVISORS} has shape {list(info.shape)}, not half of a head in float32")
    divisors = torch.empty(1, *info.shape)
    entry_of(files[info.path], info, info.shape).read(0, divisors)
    try:
        return {"rope_type": "llama3", **llama3_scaling(_listed(divisors), settings["rope_theta"])}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _listed(values: torch.Tensor) -> Sequence[float]:
    found: list[float] = values[0].tolist()
    return found
