"""No setting and no tensor passes in silence: used as transformers uses it, refused by name, or noted."""

import itertools
import json
from collections import Counter

import pytest
import torch
from odd_checkpoints import (
    COMMON,
    IDS,
    SIZES,
    Base,
    build,
    by_transformers,
    classless_cases,
    judge,
    setting_cases,
    tensor_cases,
    tied_cases,
    write_base,
)
from safetensors.torch import load_file

from moebed.checkpoints import write_checkpoint
from moebed.model.config import ModelConfig
from moebed.model.decoder import Decoder

ONE_OF = 26  # in the quick test, which begins at another case in each family
FAMILIES_WITH_CLASS = list(SIZES)
MODEL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": [0, 4],
         "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 24, "norm_topk_prob": False,
         "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
CLASSLESS = {
    "deepseek": {**MODEL, "num_shared_experts": 1},
    "emo": {**MODEL, "num_shared_experts": 1},
    "olmo2_noqknorm_prenorm": {**MODEL, "num_experts": 0},
    "grok-1": {**MODEL, "num_experts": 4, "post_norms": True, "hidden_act": "gelu", "tie_word_embeddings": True,
               "attn_logit_softcapping": 30.0, "embedding_multiplier": 8.0, "logits_multiplier": 0.5},
}  # fmt: skip
SLOW = ("deepseek", "emo", "olmo2_noqknorm_prenorm")


def cases_of(config, folder):
    settings = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    return [*setting_cases(config, settings), *tensor_cases(settings, tensors), *tied_cases(settings)]


def judged(cases, tmp_path, with_class=True):
    """Outcomes by kind; the test fails with every case that went wrong."""
    base, wrong, kinds = Base.of(tmp_path / "base"), [], Counter()
    for case in cases:
        folder = build(case, tmp_path / "base", tmp_path / "case")
        outcome = judge(case, folder, base, by_transformers(folder) if with_class else None)
        kinds[outcome.kind] += 1
        if outcome.kind == "wrong":
            wrong.append(f"{case.name}: {outcome.said}")
    assert not wrong, "\n".join(wrong)
    return kinds


def said(capsys, family, kinds):
    total = sum(number for kind, number in kinds.items() if kind != "no case")
    with capsys.disabled():
        print(f"\n{family}: {total} odd checkpoints: {dict(kinds)}")
    return total


@pytest.mark.parametrize("family", FAMILIES_WITH_CLASS)
def test_some_odd_checkpoints_are_read_as_transformers_reads_them(family, tmp_path, capsys):
    config = write_base(family, tmp_path / "base")
    cases = cases_of(config, tmp_path / "base")
    chosen = list(itertools.islice(cases, FAMILIES_WITH_CLASS.index(family), None, ONE_OF))
    assert said(capsys, family, judged(chosen, tmp_path)) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES_WITH_CLASS)
def test_every_odd_checkpoint_is_read_as_transformers_reads_it(family, tmp_path, capsys):
    config = write_base(family, tmp_path / "base")
    kinds = judged(cases_of(config, tmp_path / "base"), tmp_path)
    assert said(capsys, family, kinds) >= 200
    assert min(kinds[kind] for kind in ("used", "harmless", "noted", "refused")) >= 10


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in CLASSLESS]
)
def test_a_family_without_a_class_uses_what_it_says_or_refuses_it_by_name(family, tmp_path, capsys):
    torch.manual_seed(1)
    decoder = Decoder(ModelConfig(**CLASSLESS[family]))
    write_checkpoint(decoder, family, tmp_path / "base", torch.float32)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    kinds = judged(classless_cases(family, settings), tmp_path, with_class=False)
    assert said(capsys, family, kinds) >= 100


def test_an_odd_thing_that_is_missed_is_found(tmp_path):
    """The judge itself: a model whose logits differ, and one that is refused without a name."""
    write_base("llama", tmp_path / "base")
    base = Base.of(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    case = next(setting_cases(write_base("llama", tmp_path / "again"), settings))
    folder = build(case, tmp_path / "base", tmp_path / "case")
    assert judge(case, folder, base, base.logits + 1).kind == "wrong"
    assert judge(case._replace(words=("unheard_of",)), folder, base, None).kind == "wrong"
    assert COMMON["max_position_embeddings"] >= IDS.shape[1]
