"""What ids say that a text does not have: by the tokenizer of a checkpoint, of a run, of a model that trains."""

from types import SimpleNamespace

import torch

from moebed.checkpoints.texts import CheckpointTokenizer, put_together
from moebed.data.tokenizer import BytesTokenizer
from moebed.views.layer import ProbeText
from probes.measures.words import keep_words, word_of, words_of
from probes.running.offered import probe_text

LIMITS = SimpleNamespace(vocab_size=300, max_position_embeddings=9)


class Pieces:
    """As transformers' slow tokenizers: a head may have more rows than they have pieces."""

    eos_token_id = bos_token_id = 0

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return ["</s>", "▁a", "b"][ids[0]]


def test_any_id_has_the_text_that_its_tokenizer_gives_it(tmp_path):
    ids = torch.tensor([[65, 256, 65]])
    batch = {"input_ids": ids, "labels": torch.tensor([[256, 65, -100]]), "domain": torch.zeros(1, dtype=torch.long)}
    data = SimpleNamespace(probe_batch=lambda count: batch, domains=["a"], tokenizer=BytesTokenizer())
    live = probe_text(SimpleNamespace(datamodule=data), 1)
    assert live.token_text == ("A", "<|endoftext|>")
    assert live.words([66, 256, 299]) == {66: "B", 256: "<|endoftext|>", 299: ""}

    BytesTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    of_run = put_together([(ids[0], "a", "it")], LIMITS, CheckpointTokenizer(tmp_path / "checkpoints" / "last.ckpt"))
    assert of_run.words([66, 256, 299]) == live.words([66, 256, 299])

    beside = put_together([(torch.tensor([1]), "a", "it")], LIMITS, CheckpointTokenizer.of(Pieces()))
    assert beside.words([0, 2, 3]) == {0: "</s>", 2: "b", 3: ""}


def test_without_a_tokenizer_the_text_tells_its_own():
    text = ProbeText(torch.tensor([[4, 7]]), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1), token_text=("a b", ""))
    arrays = {}
    keep_words(arrays, text, [7, 4, 4, 9])
    keep_words(arrays, ProbeText(text.input_ids, text.token_mask, text.domain), [5], "text_ids_predicted")
    assert arrays["text_ids"].tolist() == [4, 7]
    assert [word_of(words_of(arrays), one) for one in (4, 7, 9)] == ["a␣b", "#7", "#9"]
