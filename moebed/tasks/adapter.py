"""A decoder as lm-eval asks for a model. The one file that imports lm-eval, which is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moebed.checkpoints.texts import CheckpointTokenizer
from moebed.machine.progress import Progress
from moebed.model.decoder import Decoder
from moebed.model.generate import generate
from moebed.tasks.scoring import BATCH_TOKENS, Pair, Score, log_likelihoods


class DecoderLM(TemplateLM):
    """Any model that moebed reads, its own layouts included, for lm-eval's tasks.

    ``texts`` has what the requests of each task said, in order and each once, so that probes can look at the same text.

    Args:
        decoder: The model.
        tokenizer: That of its checkpoint.
        batch_tokens: Of one forward pass, padding included.
    """

    def __init__(self, decoder: Decoder, tokenizer: CheckpointTokenizer, batch_tokens: int = BATCH_TOKENS) -> None:
        super().__init__()
        self.decoder, self.words, self.batch_tokens = decoder, tokenizer, batch_tokens
        self.texts: dict[str, dict[str, None]] = {}

    @property
    def eot_token_id(self) -> int:
        """What ends a text, and stands before the first one."""
        return self.words.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the string alone: training texts are cut anywhere, so that nothing stands before them."""
        return self.words.encode_plain(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation)."""
        for request in requests:
            self._keep(request, "".join(request.args))
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        scores = self._scored([Pair(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, in windows that overlap by one token, each token predicted once."""
        windows: list[Pair] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            self._keep(request, text)
            found = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.decoder.config.max_position_embeddings, 1
            )
            pairs = [Pair(*make_disjoint_window(one)) for one in found]
            windows += pairs
            of += [number] * len(pairs)
        sums = [0.0] * len(requests)
        for number, score in zip(of, self._scored(windows), strict=True):
            sums[number] += score.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of the strings that end them."""
        found = []
        for request in requests:
            context, options = request.args
            self._keep(request, context)
            until = options.get("until") or []
            new = int(options.get("max_gen_toks", 128))
            room = self.decoder.config.max_position_embeddings - new
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-max(1, room) :]
            prompt = torch.tensor([ids], device=self.decoder.embed_tokens.weight.device)
            out = generate(self.decoder, prompt, new, temperature=0, eos_id=self.eot_token_id)
            text = self.words.decode(out[0, len(ids) :].tolist())
            for end in [until] if isinstance(until, str) else until:
                text = text.split(end)[0] if end else text
            found.append(text)
        return found

    def _keep(self, request: Instance, text: str) -> None:
        if text.strip():
            self.texts.setdefault(request.task_name or "task", {})[text] = None

    def _scored(self, pairs: Sequence[Pair]) -> list[Score]:
        with Progress(len(pairs), "request", description="scoring") as bar:
            return log_likelihoods(self.decoder, pairs, self.batch_tokens, bar.update)
