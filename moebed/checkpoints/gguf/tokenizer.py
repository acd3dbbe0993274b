"""The tokenizer that stands in a GGUF file's metadata, as one of the ``tokenizers`` package.

Two kinds are read. ``llama`` is SentencePiece's BPE: pieces with scores, a merge for each way to put a piece together
of two others, the highest score first, and bytes for what has no piece. ``gpt2`` is byte-level BPE with its merges; how
text is split before it does not stand in the file but only its name, ``tokenizer.ggml.pre``.

The names and what they mean: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from moebed.checkpoints.gguf.header import Header, read_header
from moebed.errors import UserError

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # of tokenizer.ggml.token_type
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = (r"\p{N}", _GPT2)
_DEEPSEEK = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
# tokenizer.ggml.pre -> the patterns by which text is cut, one after another.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "tekken": (_TEKKEN,),
    "deepseek-llm": _DEEPSEEK,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is that one, whatever the merges
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GgufTokenizer:
    """A file's tokenizer.

    Args:
        path: The file.

    Attributes:
        backend: It.
        settings: What a ``tokenizer_config.json`` says of it.

    Raises:
        UserError: The file has none, or one of a kind that is not known.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.tokens = _tokens(header)
        kinds = header.array("tokenizer.ggml.token_type") or [_NORMAL] * len(self.tokens)
        model = header.get("tokenizer.ggml.model", str)
        if model == "llama":
            self.backend = _sentencepiece(header, self.tokens, kinds)
        elif model == "gpt2":
            self.backend = _byte_level(header, self.tokens)
        else:
            raise _unknown(path, f"is of kind {model!r}, which is not known here")
        for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
            added = [token for token, found in zip(self.tokens, kinds, strict=False) if found == kind and token]
            self.backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
        self.settings = self._settings(
            header, model == "llama" or header.get("tokenizer.ggml.pre", str) in _WHOLE_WORDS
        )
        self._add_ends()

    def _settings(self, header: Header, begins: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, theirs in _SPECIAL.items():
            number = header.get(f"tokenizer.ggml.{theirs}_token_id", int)
            if number is not None and 0 <= number < len(self.tokens):
                found[name] = self.tokens[number]
        found["add_bos_token"] = header.get("tokenizer.ggml.add_bos_token", bool, begins)
        found["add_eos_token"] = header.get("tokenizer.ggml.add_eos_token", bool, False)
        template = header.get("tokenizer.chat_template", str)
        return found | ({"chat_template": template} if template else {})

    def _add_ends(self) -> None:
        """Put the tokens that begin and end a text where the file wants them."""
        wanted = [
            self.settings.get(f"{end}_token") if self.settings[f"add_{end}_token"] else None for end in ("bos", "eos")
        ]
        if any(wanted):
            begin, end = wanted
            ends = [token for token in dict.fromkeys(wanted) if token]
            self.backend.post_processor = processors.TemplateProcessing(
                single=[*([begin] if begin else []), "$A", *([end] if end else [])],
                special_tokens=[(token, self.backend.token_to_id(token)) for token in ends],
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that begin and end one."""
        found: list[int] = self.backend.encode(text).ids
        return found

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text, without them."""
        found: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return found

    @property
    def prefix_id(self) -> int | None:
        """Id that a text may begin with: the token that begins one, or else ends one."""
        begin = self.settings.get("bos_token", self.settings.get("eos_token"))
        found: int | None = self.backend.token_to_id(begin) if begin is not None else None
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write it so that ``transformers.AutoTokenizer`` loads it."""
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _unknown(path: Path, why: str) -> UserError:
    return UserError(f"{path}: its tokenizer {why}; give --input-ids instead of text")


def _tokens(header: Header) -> list[str]:
    found = header.array("tokenizer.ggml.tokens", text=True)
    if not found:
        raise UserError(f"{header.path} has no tokenizer; give --input-ids instead of text")
    return found


def _sentencepiece(header: Header, tokens: Sequence[str], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    """BPE by scores, with bytes for what has no piece."""
    scores = header.array("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        raise _unknown(header.path, "has no score for each token")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    outside = {token for token, kind in zip(tokens, kinds, strict=False) if kind in (_UNKNOWN, _CONTROL, _BYTE)}
    unknown = tokens[next((number for number, kind in enumerate(kinds) if kind == _UNKNOWN), 0)]
    merges = _merges({token: number for token, number in vocabulary.items() if token not in outside}, scores)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = [normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence([*([normalizers.Prepend(_SPACE)] if begins else []), *spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if begins else [])])
    return backend


def _merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, the highest score of a piece first."""
    found = [
        (-scores[number], number, token[:place], token[place:])
        for token, number in vocabulary.items()
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _byte_level(header: Header, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """BPE on bytes, with the merges that stand in the file."""
    kind = header.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind not in _SPLITS:
        raise _unknown(header.path, f"splits text as {kind!r}, which is not known here")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in header.array("tokenizer.ggml.merges", text=True) or []]
    known = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys()]
    if len(known) < len(pairs):
        raise _unknown(header.path, "has merges of tokens that it has not")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, known, ignore_merges=kind in _WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[kind]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
