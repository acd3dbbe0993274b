"""What people hand in where a checkpoint is wanted, recognised, so that the error says what it is and what to give.

Quantised weights among it: codes that would be no error as numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from moebed.checkpoints.files import CodeEntry, TensorEntry, UnknownEntry
from moebed.errors import UserError

_PARTS = (".safetensors", ".bin", ".json", ".model", ".txt", ".pth", ".msgpack", ".h5")  # of a checkpoint's folder
_ADAPTER = "adapter_config.json"
_PREFIXES = {
    "_orig_mod.": "torch.compile puts it there",
    "module.": "DataParallel puts it there",
    "base_model.model.": "peft puts it there",
    "model.language_model.": "it is the language model of a larger one",
    "language_model.": "it is the language model of a larger one",
}
# Beside codes, or in place of the weights: fp8, compressed-tensors, GPTQ, AWQ, MLX, bitsandbytes, MXFP4.
_QUANTISED = re.compile(
    r"(\.(weight_scale(_inv|_2)?|weight_zero_point|weight_packed|weight_shape|qweight|qzeros|g_idx|scales|SCB"
    r"|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+)|_(scales|blocks|scale_inv))$"
)
_CODES = re.compile(r"^(F[48]_|F6_|[IU](4|8|16|32)$|float[48]|u?int(8|16|32)$)")
WAYS_OUT = "get the model in bfloat16, in fp8 with its scales, or as a GGUF file"


def require_no_other_file(path: Path) -> None:
    """Raise UserError for a file that is a part of a checkpoint where a run's ``.ckpt`` may be given."""
    if path.suffix == ".gguf":
        raise UserError(f"{path} does not begin as GGUF files do; download it again")
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path} is a recipe or a config; give the checkpoint itself, or the file of options as --config {path}"
        )
    if path.suffix in _PARTS:
        raise UserError(f"{path} is one file of a checkpoint; give the folder that it lies in, with its config.json")


def require_no_adapter(folder: Path) -> None:
    """Raise UserError for a folder that holds an adapter: with peft, transformers applies it to a base model."""
    path = folder / _ADAPTER
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError):
        base = None
    raise UserError(
        f"{folder} holds an adapter ({_ADAPTER}) of {base or 'a base model'}; merge it into its base model, and give "
        "the folder of the merged one"
    )


def other_folder(folder: Path) -> str | None:
    """What a folder is that has no ``config.json`` or no weights of ours; None where nothing tells."""
    original = sorted(path.name for path in folder.glob("consolidated*"))
    if original or (folder / "params.json").is_file():
        return (
            f"{folder} holds a model in its makers' original layout ({(original or ['params.json'])[0]}); get the one "
            "in Hugging Face's layout, with config.json and model.safetensors"
        )
    if runs := [path for path in (folder / "checkpoints" / "last.ckpt", folder / "last.ckpt") if path.exists()]:
        return f"{folder} is the folder of a run; give its checkpoint, {runs[0]}"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"{folder} is no checkpoint itself; give a folder in it, such as {folder / inner[0]}"
    return None


def prefix_of(missing: Iterable[str], present: Iterable[str]) -> str | None:
    """What every name in a file begins with where the missing ones do not, in words; None if it is not so."""
    wanted, there = list(missing), set(present)
    for prefix, why in _PREFIXES.items():
        stripped = {prefix + name for name in wanted} | {prefix + name.removeprefix("model.") for name in wanted}
        if stripped & there:
            return f"names in the file begin with {prefix!r} ({why}); save it again without that"
    inner = [name for name in wanted if name.startswith("model.layers.")]
    if inner and all(name.removeprefix("model.") in there for name in inner):
        return "names in the file lack 'model.'; it was saved from the model without its head: save the whole model"
    return None


def quantised_names(entries: Mapping[str, TensorEntry], needed: Iterable[str] = ()) -> list[str]:
    """Tensors that only come with codes or are codes; of the ``needed`` ones also those of integer types."""
    beside = [tensor for tensor, entry in entries.items() if _QUANTISED.search(tensor) or _is_fp8(entry)]
    found = ((tensor, entries.get(tensor)) for tensor in needed)
    return beside + [name for name, entry in found if isinstance(entry, UnknownEntry) and _CODES.match(entry.stored)]


def _is_fp8(entry: TensorEntry) -> bool:
    return isinstance(entry, CodeEntry) and entry.stored.startswith("F8")


def require_unquantised(entries: Mapping[str, TensorEntry], needed: Iterable[str] = ()) -> None:
    """Raise UserError if weights are stored as codes that nothing was made of."""
    for tensor in quantised_names(entries, needed):
        entry = entries[tensor]
        kind = f" as {entry.stored}" if isinstance(entry, UnknownEntry) else ""
        raise UserError(f"{entry.path}: the weights are quantised (there is a tensor {tensor}{kind}); {WAYS_OUT}")
