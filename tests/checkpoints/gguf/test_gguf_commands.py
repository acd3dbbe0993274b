"""GGUF files handed to the commands: probed as the same weights in safetensors, upcycled, found in folders and hubs."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_gguf

from moebed.checkpoints import Checkpoint, find_checkpoint, load_decoder, write_checkpoint
from moebed.checkpoints.gguf.header import read_header
from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.cli import main
from moebed.errors import UserError
from moebed.views.layer import MATRICES, Need

PROBES = "matrix_similarity,gate_similarity,routing,norm_vs_score"
SIZES = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 64, "initializer_range": 0.1,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def saved(folder, model_type="mixtral", **changes):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **(EXPERTS if model_type == "mixtral" else {})})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def results(out):
    found = {}
    for path in (out / "results").glob("*.npz"):
        with np.load(path) as arrays:
            found |= {f"{path.stem}/{name}": arrays[name] for name in arrays}
    return found


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("F32", "F16", "Q8_0")), "Q4_K"]
)
def test_probes_see_what_they_see_of_the_same_weights_as_safetensors(kind, tmp_path):
    """With text, a dense reference and a budget that holds two matrices of an expert and no layer."""
    files = {"mixtral": saved(tmp_path / "moe"), "llama": saved(tmp_path / "dense", "llama")}
    files = {name: write_gguf(folder, tmp_path / f"{name}.gguf", kind) for name, folder in files.items()}
    folders = {name: write_checkpoint(load_decoder(file), name, tmp_path / name, torch.float32)
               for name, file in files.items()}  # fmt: skip
    np.save(tmp_path / "ids.npy", np.arange(3, 43))
    found = {}
    for form, models in (("gguf", files), ("folder", folders)):
        arguments = ["--reference-dense", str(models["llama"]), "--input-ids", str(tmp_path / "ids.npy")]
        arguments += ["--memory-budget", "3MiB", "--probes", PROBES, "--out", str(tmp_path / form)]
        assert main(["probe", str(models["mixtral"]), *arguments]) == 0
        found[form] = results(tmp_path / form)
    assert found["gguf"].keys() == found["folder"].keys()
    assert len(found["gguf"]) > 20
    for name, values in found["gguf"].items():
        if values.dtype.kind in "fc":
            np.testing.assert_allclose(values, found["folder"][name], atol=1e-5, rtol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(values, found["folder"][name], err_msg=name)


def test_the_error_of_packing_stands_in_the_summary_and_the_report(tmp_path):
    path = write_gguf(saved(tmp_path / "moe"), tmp_path / "moe.gguf", "Q4_K")
    out = tmp_path / "out"
    assert main(["probe", str(path), "--out", str(out), "--probes", "matrix_similarity"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    (note,) = [note for note in summary["notes"] if "dequantised" in note]
    assert "dequantised from Q4_K_M" in note
    assert "expected relative error .072" in note
    assert "seen as .9948 of what it was" in note
    assert "dequantised from Q4_K_M" in (out / "report.html").read_text()
    assert summary["model"]["name"] == "moe.gguf"


def test_the_bar_counts_bytes_of_the_file(tmp_path):
    """Of weights that are packed, memory takes more than three times as many."""
    path = write_gguf(saved(tmp_path / "moe"), tmp_path / "moe.gguf", "Q4_K")
    model, seen = PretrainedMoE(str(path), memory_budget="64MiB"), []
    model.on_read = seen.append
    for view in model.views(None, frozenset({Need.WEIGHTS})):
        for name, expert in itertools.product(MATRICES, range(4)):
            view.expert_matrix(name, expert)
    tensors = read_header(path).tensors.items()
    assert seen == sorted(seen)
    assert 0 < seen[-1] < model.bytes_total == sum(info.num_bytes for name, info in tensors if "_exps" in name)
    model.close()


@pytest.mark.parametrize("method", ["copy", "split"])
def test_upcycled_from_gguf_as_from_safetensors(method, tmp_path):
    dense = write_gguf(saved(tmp_path / "dense", "llama"), tmp_path / "dense.gguf", "Q8_0")
    assert main(["upcycle", str(dense), "--out", str(tmp_path / "moe"), "--method", method]) == 0
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = load_decoder(tmp_path / "moe")(ids).logits, load_decoder(dense)(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0)


def test_equal_experts_that_are_packed_stay_equal(tmp_path):
    dense = saved(tmp_path / "dense", "llama")
    assert main(["upcycle", str(dense), "--out", str(tmp_path / "moe"), "--method", "copy"]) == 0
    packed = Checkpoint.open(write_gguf(tmp_path / "moe", tmp_path / "moe.gguf", "Q4_K"))
    first, second = (packed.read(packed.keys.expert(0, "down", expert)) for expert in (0, 1))
    assert torch.equal(first, second)


def test_exported_from_gguf(tmp_path):
    path = write_gguf(saved(tmp_path / "moe"), tmp_path / "moe.gguf", "Q4_K")
    assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 0
    for one, other in zip(load_decoder(tmp_path / "out").parameters(), load_decoder(path).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=0)


def test_a_folder_with_one_model_stands_for_it(tmp_path):
    folder = saved(tmp_path / "moe")
    path = write_gguf(folder, tmp_path / "one" / "model.gguf") if (tmp_path / "one").mkdir() is None else None
    (tmp_path / "one" / "mmproj-model.gguf").write_bytes(b"GGUF")
    (tmp_path / "one" / "model.imatrix.gguf").write_bytes(b"GGUF")
    (tmp_path / "one" / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path / "one").name == path.name
    write_gguf(folder, tmp_path / "one" / "parts.gguf", per_file=9)
    with pytest.raises(UserError, match=r"holds 2 GGUF models; give one of them, such as .*model.gguf"):
        Checkpoint.open(tmp_path / "one")
    shutil.copy(folder / "model.safetensors", tmp_path / "one")
    shutil.copy(folder / "config.json", tmp_path / "one")
    assert Checkpoint.open(tmp_path / "one").name == "one"  # safetensors come first


def test_files_that_belong_together_are_all_needed(tmp_path):
    first = write_gguf(saved(tmp_path / "moe"), tmp_path / "model.gguf", per_file=9)
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) > 2
    content = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(UserError, match=rf"{files[1].name} is missing; the model is {len(files)} files"):
        Checkpoint.open(files[-1])
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(UserError, match="is file 2 by its metadata"):
        Checkpoint.open(first)
    files[1].write_bytes(saying(content, "split.no", 0))
    with pytest.raises(UserError, match=rf"{files[1].name} is file 0 by its metadata"):
        Checkpoint.open(first)
    files[1].write_bytes(saying(files[2].read_bytes(), "split.no", 1))
    with pytest.raises(UserError, match=rf"is in .*{files[1].name} and in .*{files[2].name}"):
        Checkpoint.open(first)
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{files[1].name} is cut short: tensor blk"):
        Checkpoint.open(first)
    files[1].write_bytes(content)
    tensors, begun = sum(len(read_header(path).tensors) for path in files), first.read_bytes()
    for told in (tensors - 1, tensors + 1):
        first.write_bytes(saying(begun, "split.tensors.count", told))
        with pytest.raises(UserError, match=rf"{tensors} tensors are there of {told}"):
            Checkpoint.open(first)


def saying(content, key, number):
    """A file's bytes, with a number of its metadata written over."""
    place = content.index(key.encode()) + len(key) + 4
    return content[:place] + bytes([number]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["model.gguf.part1of2", "model.gguf-split-a", "model.gguf.001"])
def test_a_part_of_a_cut_file_is_called_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF\x03")
    with pytest.raises(UserError, match="a part of a file that was cut; join"):
        Checkpoint.open(tmp_path / name)


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    path = write_gguf(saved(tmp_path / "moe"), tmp_path / "moe.gguf", "F32")
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_k.weight"
    place = content.index(name) + len(name) + 4 + 16
    content[place : place + 4] = (26).to_bytes(4, "little")  # whole numbers of 32 bits
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"blk\.0\.attn_k\.weight is stored as I32"):
        Checkpoint.open(path)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    packed = write_gguf(saved(tmp_path / "moe"), tmp_path / "packed.gguf", "Q4_K")
    plain = write_gguf(tmp_path / "moe", tmp_path / "plain.gguf", "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        Checkpoint.open(packed)
    assert load_decoder(plain) is not None


# The hub, by what it is asked for ------------------------------------------------------------------------------------

REPOSITORY = ("Model.Q4_K_M.gguf", "Model.Q4_K_S.gguf", "Model.Q8_0.gguf", "README.md",
              "Model-BF16-00001-of-00002.gguf", "Model-BF16-00002-of-00002.gguf", "IQ2_XXS/Model.gguf")  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of GGUF files; what was fetched of it."""
    import fnmatch

    fetched = []

    def download(repository, revision=None, allow_patterns=()):
        assert repository == "org/name-GGUF"
        folder = tmp_path / f"snapshot-{revision}"
        for name in REPOSITORY:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.append(name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(b"GGUF")
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, revision=None: list(REPOSITORY))
    return fetched


@pytest.mark.parametrize(
    ("name", "file", "fetched"),
    [
        ("org/name-GGUF:Q4_K_M", "Model.Q4_K_M.gguf", ["Model.Q4_K_M.gguf"]),
        ("org/name-GGUF:q8_0@abc", "Model.Q8_0.gguf", ["Model.Q8_0.gguf"]),
        ("org/name-GGUF:BF16", "Model-BF16-00001-of-00002.gguf", list(REPOSITORY[4:6])),
        ("org/name-GGUF:IQ2_XXS", "IQ2_XXS/Model.gguf", ["IQ2_XXS/Model.gguf"]),
    ],
)
def test_of_a_repository_one_kind_is_fetched(hub, name, file, fetched):
    found = find_checkpoint(name)
    assert found.as_posix().endswith(file)
    assert hub == fetched
    assert ("snapshot-abc" in found.parts) is name.endswith("@abc")


def test_a_repository_of_gguf_files_needs_a_kind(hub):
    with pytest.raises(UserError, match="name one, as in org/name-GGUF:IQ2_XXS: IQ2_XXS, BF16, Q4_K_M, Q4_K_S, Q8_0"):
        find_checkpoint("org/name-GGUF")
    with pytest.raises(UserError, match="has no GGUF file of kind Q5_K_M: it has IQ2_XXS, BF16"):
        find_checkpoint("org/name-GGUF:Q5_K_M")
    assert not hub
