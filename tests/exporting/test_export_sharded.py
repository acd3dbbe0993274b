"""A run whose checkpoint is a folder of parts: what its tokenizer and its card were goes with the export."""

import pytest
import transformers

from moebed.checkpoints.sharded import is_sharded
from moebed.cli import main
from moebed.data.tokenizer import load_tokenizer
from tests.parallel.forked import run
from tests.small_run import made_up_text, small_recipe, write_recipe


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_export_of_a_sharded_run_keeps_its_tokenizer(tmp_path, kind):
    tokenizer, sizes = {"kind": kind, "vocab_size": 320}, {"vocab_size": 320}
    content = small_recipe(tmp_path, trainer={"max_steps": 2}, config=sizes, data={"tokenizer": tokenizer})
    content["parallel"] = {"data": 1}
    run(["fit", "--config", str(write_recipe(tmp_path, content))], 1, tmp_path / "logs")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert is_sharded(last)
    assert main(["export", str(last), "--out", str(tmp_path / "out")]) == 0
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = made_up_text(3) + " é\n"
    wanted = load_tokenizer(tmp_path / "run" / "tokenizer")
    ids = wanted.encode(text)
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.eos_token_id == wanted.eos_id
    assert "AutoTokenizer" in (tmp_path / "out" / "README.md").read_text()
