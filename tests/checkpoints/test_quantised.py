"""fp8 and MXFP4 in safetensors: the numbers that their formulas give, however they are cut; the others by their name.

R rows, C columns, E experts, F their width.
"""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moebed.checkpoints import Checkpoint, load_decoder
from moebed.checkpoints import quantised as reading
from moebed.checkpoints.files import open_safetensors
from moebed.checkpoints.quantised import Quantisation, unquantised
from moebed.cli import main
from moebed.errors import UserError

FP8 = torch.float8_e4m3fn
SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 32, "initializer_range": 0.3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CASES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
}
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 48]}


def saved(folder, family="mixtral", **options):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **SIZES, **CASES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder, **options)
    return model


def configured(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def with_scales(value, shape, block):
    """fp8 of a matrix (..., R, C), its scales, and the numbers that it then is."""
    wide = torch.empty(shape).uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(value)))
    expanded = wide
    for dimension, size in zip((-2, -1), block, strict=True):
        expanded = expanded.repeat_interleave(size, dim=dimension)
    expanded = expanded[..., : value.shape[-2], : value.shape[-1]]
    codes = (value / expanded).to(FP8)
    return codes, wide, codes.float() * expanded


def grid(value, block):
    return *value.shape[:-2], -(-value.shape[-2] // block[0]), -(-value.shape[-1] // block[1])


SCALES = {
    "blocks": lambda value: (grid(value, (32, 48)), (32, 48), lambda scale: scale),
    "rows": lambda value: ((value.shape[0], 1), (1, value.shape[1]), lambda scale: scale),
    "rows in a vector": lambda value: ((value.shape[0], 1), (1, value.shape[1]), lambda scale: scale[:, 0]),
    "one of one": lambda value: ((1, 1), value.shape, lambda scale: scale[0]),
    "one": lambda value: ((1, 1), value.shape, lambda scale: scale[0, 0]),
}


def quantised(folder, kind, name="_scale_inv"):
    """Turn a folder's matrices but routers and embeddings into fp8; returns what they then are."""
    tensors, left = load_file(folder / "model.safetensors"), {}
    for key, value in list(tensors.items()):
        if value.ndim > 1 and not re.search(r"gate\.weight|embed|lm_head", key):
            shape, block, store = SCALES[kind](value)
            codes, scale, left[key] = with_scales(value.float(), shape, block)
            tensors |= {key: codes, key + name: store(scale).contiguous()}
    save_file(tensors, folder / "model.safetensors")
    return left


def same_as(decoder, model, left):
    """Logits of a decoder are those of transformers' model with these numbers, as rounded to bfloat16."""
    state = model.state_dict()
    for key, value in left.items():
        if key in state:
            state[key].copy_(value.bfloat16().float())
    experts = [key for key in left if ".experts." in key]
    for key in experts:
        layer, expert = (int(number) for number in re.findall(r"\.(\d+)\.", key))
        held = model.model.layers[layer].mlp.experts
        stored = key.split(".")[-2]
        matrix = {"w1": "gate", "w3": "up", "w2": "down"}.get(stored, stored.removesuffix("_proj"))
        with torch.no_grad():
            width = held.down_proj.shape[-1]
            target = {"gate": held.gate_up_proj[expert, :width], "up": held.gate_up_proj[expert, width:],
                      "down": held.down_proj[expert]}[matrix]  # fmt: skip
            target.copy_(left[key].bfloat16().float())
    with torch.no_grad():
        found, wanted = decoder(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_gives_the_logits_of_its_numbers(kind, tmp_path):
    model = saved(tmp_path)
    left = quantised(tmp_path, kind, "_scale_inv" if kind == "blocks" else "_scale")
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    configured(tmp_path, quantization_config=BLOCKS if kind == "blocks" else method)
    checkpoint = Checkpoint.open(tmp_path)
    assert any("weights are read from fp8, expected relative error .026" in note for note in checkpoint.notes)
    same_as(load_decoder(checkpoint), model, left)


def test_fp8_is_within_the_stated_error(tmp_path):
    torch.manual_seed(0)
    value = torch.randn(512, 384)
    _, _, left = with_scales(value, grid(value, (128, 128)), (128, 128))
    assert ((left - value).norm() / value.norm()).item() == pytest.approx(0.026, rel=0.05)


def entries_of(tensors, path, block=(128, 128)):
    save_file(tensors, path)
    return unquantised(open_safetensors(path), Quantisation("quantization_config", "fp8", block), "config.json")[0]


def whole(entry, first=0, rows=None):
    count = 1
    for size in entry.shape[:-1]:
        count *= size
    out = torch.empty(rows or count - first, entry.shape[-1], dtype=entry.dtype)
    entry.read(first, out)
    return out


@pytest.fixture(params=[1 << 20, 1000], ids=["at once", "in parts"])
def _numbers_at_a_time(request, monkeypatch):
    monkeypatch.setattr(reading, "_AT_A_TIME", request.param)


@pytest.mark.usefixtures("_numbers_at_a_time")
def test_the_last_blocks_of_a_matrix_are_short(tmp_path):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows and 5 scales, from which no size of blocks follows."""
    torch.manual_seed(0)
    value = torch.randn(576, 7 * 128 + 32)
    codes, scale, left = with_scales(value, (5, 8), (128, 128))
    entry = entries_of({"w.weight": codes, "w.weight_scale_inv": scale}, tmp_path / "x.safetensors")["w.weight"]
    looped = torch.stack([codes[r].float() * scale[r // 128].repeat_interleave(128)[:928] for r in range(576)])
    assert torch.equal(looped, left)
    assert torch.equal(whole(entry), left.bfloat16())
    assert torch.equal(whole(entry, 300, 70), left.bfloat16()[300:370])
    assert entry.stored_bytes(10) == 9280


@pytest.mark.usefixtures("_numbers_at_a_time")
def test_all_experts_of_a_layer_in_one_tensor(tmp_path):
    torch.manual_seed(0)
    value = torch.randn(3, 200, 256)
    codes, scale, left = with_scales(value, (3, 2, 2), (128, 128))
    entry = entries_of({"gate_up_proj": codes, "gate_up_proj_scale_inv": scale}, tmp_path / "x.safetensors")[
        "gate_up_proj"
    ]
    assert torch.equal(whole(entry, 150, 300), left.flatten(0, 1).bfloat16()[150:450])
    for number, scale in enumerate((torch.tensor([0.5]), torch.tensor([0.5, 1.0, 2.0]))):  # of all, and of each
        path = tmp_path / f"{number}.safetensors"
        entry = entries_of({"down_proj": codes, "down_proj_scale": scale}, path)["down_proj"]
        wanted = (codes.float() * scale.expand(3)[:, None, None]).flatten(0, 1).bfloat16()
        assert torch.equal(whole(entry, 150, 300), wanted[150:450])


def test_scales_of_rows_do_not_say_which_of_several_matrices_they_are_of(tmp_path):
    tensors = {"gate_up_proj": torch.randn(3, 200, 256).to(FP8), "gate_up_proj_scale": torch.ones(200, 1)}
    with pytest.raises(UserError, match=r"scales of shape \[200, 1\] do not fit a tensor of shape \[3, 200, 256\]"):
        entries_of(tensors, tmp_path / "x.safetensors")


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_be_powers_of_two(stored, tmp_path):
    codes = torch.randn(256, 128).to(FP8)
    exponents = torch.tensor([[120], [131]], dtype=torch.uint8)
    tensors = {"w.weight": codes, "w.weight_scale_inv": exponents.view(stored)}
    entry = entries_of(tensors, tmp_path / "x.safetensors")["w.weight"]
    factor = torch.tensor([2.0**-7, 2.0**4]).repeat_interleave(128)[:, None]
    assert torch.equal(whole(entry), (codes.float() * factor).bfloat16())


def to_mxfp4(value):
    """Codes (R, C / 32, 16) and exponents (R, C / 32) of numbers (R, C), and the numbers that they are."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = value.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    left = table[codes] * scaled.sign() * torch.exp2(exponents)[..., None]
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8), left.flatten(-2)


def mxfp4(folder, experts=4):
    """Turn a folder's experts into MXFP4, as gpt-oss has them; returns what they then are."""
    tensors, left = load_file(folder / "model.safetensors"), {}
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            matrices = [[tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for part in parts] for e in range(experts)]
            stacked = torch.stack([torch.stack(pair, dim=1).flatten(0, 1) for pair in matrices])  # rows in turn
            codes, exponents, numbers = to_mxfp4(stacked.float())
            tensors |= {f"{prefix}.{name}_proj_blocks": codes.contiguous(), f"{prefix}.{name}_proj_scales": exponents}
            for expert in range(experts):
                for place, part in enumerate(parts):
                    left[f"{prefix}.{expert}.{part}_proj.weight"] = numbers[expert, place :: len(parts)]
    save_file(tensors, folder / "model.safetensors")
    configured(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]})
    return left


def test_mxfp4_gives_the_logits_of_its_numbers(tmp_path):
    model = saved(tmp_path, "qwen3_moe")
    left = mxfp4(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert any("weights are read from MXFP4, expected relative error .114" in note for note in checkpoint.notes)
    for name, values in left.items():
        assert torch.equal(whole(checkpoint.entries[name]), values.bfloat16()), name
        assert torch.equal(whole(checkpoint.entries[name], 5, 20), values[5:25].bfloat16()), name
    same_as(load_decoder(checkpoint), model, left)


def test_gpt_oss_as_it_was_published(tmp_path):
    """Experts in MXFP4, their biases and all else in bfloat16: the logits of what its numbers are."""
    model = saved(tmp_path, "gpt_oss")
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensors[name] = (parameter.normal_() if name.endswith("_bias") else parameter).bfloat16()
            parameter.copy_(tensors[name])
        for name in list(tensors):
            if name.endswith(("gate_up_proj", "down_proj")):
                codes, exponents, numbers = to_mxfp4(tensors.pop(name).float().transpose(1, 2))
                tensors |= {f"{name}_blocks": codes.contiguous(), f"{name}_scales": exponents}
                model.get_parameter(name).copy_(numbers.transpose(1, 2))
    save_file(tensors, tmp_path / "model.safetensors")
    configured(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]})
    checkpoint = Checkpoint.open(tmp_path)
    assert any("weights are read from MXFP4" in note for note in checkpoint.notes)
    part = checkpoint.keys.expert(1, "up", 2)
    assert checkpoint.stored_bytes(part) == part.rows * part.columns * 17 // 32
    same_as(load_decoder(checkpoint), model, {})


@pytest.mark.usefixtures("_numbers_at_a_time")
def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.randint(256, (2, 12, 3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.randint(110, 140, (2, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_file(
        {"x.experts.gate_up_proj_blocks": codes, "x.experts.gate_up_proj_scales": scales}, tmp_path / "x.safetensors"
    )
    found, _ = unquantised(open_safetensors(tmp_path / "x.safetensors"), None, "config.json")
    theirs = convert_moe_packed_tensors(codes, scales)  # (E, C, O), rows in turn
    for expert in range(2):
        for place, name in enumerate(("gate", "up")):
            ours = whole(found[f"x.experts.{expert}.{name}_proj.weight"])
            assert torch.equal(ours, theirs[expert].T[place::2])


@pytest.mark.parametrize(
    ("blocks", "scales", "words"),
    [((2, 11, 3, 16), (2, 11, 3), "11 rows are not those of gate and up"), ((2, 12, 3, 16), (2, 12, 2), "no MXFP4")],
)
def test_mxfp4_of_shapes_that_cannot_be(tmp_path, blocks, scales, words):
    path, name = tmp_path / "x.safetensors", "x.experts.gate_up_proj_"
    tensors = {f"{name}blocks": blocks, f"{name}scales": scales}
    save_file({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=words):
        unquantised(open_safetensors(path), None, "config.json")


def test_probes_are_told_and_read_less_than_they_hold(tmp_path):
    saved(tmp_path / "model")
    quantised(tmp_path / "model", "blocks")
    configured(tmp_path / "model", quantization_config=BLOCKS)
    arguments = ["--out", str(tmp_path / "out"), "--probes", "matrix_similarity"]
    assert main(["probe", str(tmp_path / "model"), *arguments]) == 0
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert any("read from fp8, expected relative error .026" in note for note in notes)
    checkpoint = Checkpoint.open(tmp_path / "model")
    part = checkpoint.keys.expert(0, "gate", 1)
    assert 2 * checkpoint.stored_bytes(part) == checkpoint.num_bytes(part)


def test_a_config_that_was_left_in_is_a_note(tmp_path):
    """What was unpacked and saved again has plain numbers and says otherwise: the tensors decide."""
    model = saved(tmp_path)
    for method in ("fp8", "gptq", "bitsandbytes"):
        configured(tmp_path, quantization_config={"quant_method": method})
        checkpoint = Checkpoint.open(tmp_path)
        assert any(f"quantization_config ({method}) is passed over" in note for note in checkpoint.notes)
    same_as(load_decoder(checkpoint), model, {})


def rename(method, more=(), **settings):
    """A folder whose matrices lie as codes of another method."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.block_sparse_moe.experts.0.w1"
        tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{end}": torch.ones(4, 4, dtype=torch.int32) for end in more}
        save_file(tensors, folder / "model.safetensors")
        configured(folder, quantization_config={"quant_method": method, **settings})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("gptq", ("qweight", "qzeros", "scales", "g_idx"), bits=4), "by gptq,"),
        (rename("awq", ("qweight", "qzeros", "scales")), "by awq,"),
        (rename("bitsandbytes", ("weight.absmax", "weight.quant_map")), "by bitsandbytes,"),
        (rename("compressed-tensors", ("weight_packed", "weight_scale"), format="pack-quantized"), "pack-quantized,"),
        (rename("quark", ("weight_scale",)), "by quark,"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, change, words):
    saved(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Checkpoint.open(tmp_path, runs=False)
    assert "get the model in bfloat16" in str(caught.value)
    assert "\n" not in str(caught.value)


def without_a_scale(tensors, name):
    del tensors[name + "_scale_inv"]


def of_another_shape(tensors, name):
    tensors[name + "_scale_inv"] = torch.ones(7, 3)


def of_plain_numbers(tensors, name):
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_scale, "is fp8 and has no scale"),
        (of_another_shape, "scales of shape [7, 3] do not fit a tensor of shape [96, 64]"),
        (of_plain_numbers, "w1.weight_scale_inv"),
    ],
)
def test_a_scale_that_is_missing_or_does_not_fit_is_named(tmp_path, change, words):
    saved(tmp_path)
    quantised(tmp_path, "blocks")
    configured(tmp_path, quantization_config=BLOCKS)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.1.block_sparse_moe.experts.0.w1.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_nan_in_fp8_is_refused(tmp_path):
    saved(tmp_path)
    quantised(tmp_path, "blocks")
    configured(tmp_path, quantization_config=BLOCKS)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    tensors[name].view(torch.uint8)[3, 3] = 0x7F
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor {name} .* holds NaN"):
        load_decoder(tmp_path)
