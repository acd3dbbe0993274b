"""Bad studies are refused in one line that says what is wrong, before anything runs."""

import contextlib
import json

import pytest
import yaml

from moebed.cli import main
from moebed.errors import ConfigError, UserError
from moebed.study.recipe import read_recipe
from moebed.study.runner import check_unchanged
from moebed.study.runs import Arm, _check_comparable, plan_study

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
BASE = {
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6},
    "model": {"config": SIZES},
    "data": {"tokenizer": {"kind": "bytes"}, "sequence_length": 32, "batch_size": 2},
}
TOP1 = {"model.config.num_experts_per_tok": 1}
DENSE = {"model.config.num_experts": 0, "model.config.intermediate_size": 32, "trainer.max_steps": 4}
UPCYCLED = {"steps": [{"fit": DENSE}, {"upcycle": {"method": "copy", "num_experts": 4}}, {"fit": {}}]}


@pytest.fixture
def study(tmp_path):
    """Writes a study that is right but for the changes given, and returns its file."""

    def write(**changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        content = {
            "base": "base.yaml",
            "arms": {"topk": {}, "raw": {"model.config.norm_topk_prob": False}},
            "seeds": [1, 2, 3],
        }
        path = tmp_path / "try.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return write


def test_text_that_cannot_be_trained_on_is_found_before_a_run_is_begun(study, tmp_path, capsys):
    """And once, where every run would have found it; --collect, which trains nothing, reads none."""
    (tmp_path / "short.txt").write_text("one document, of which nothing is left to validate on. " * 20)
    source = {"name": "short", "kind": "files", "path": str(tmp_path / "short.txt")}
    path = study(settings={"data.sources": [source], "data.cache_dir": str(tmp_path / "cache")})
    arguments = ["study", str(path), "--out", str(tmp_path / "out")]
    main([*arguments, "--collect"])
    assert "do not fill one sequence" not in capsys.readouterr().err
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("do not fill one sequence of 32 + 1 as all its text is one document") == 1
    assert said.count("moebed: error: runs/topk/seed_1 and what has the same text: data source 'short'") == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_a_study_like_another_has_its_arms_and_says_what_is_its_own(study, tmp_path):
    small = read_recipe(study(settings={"trainer.max_steps": 3, "data.batch_size": 4}, question="Which?"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "large.yaml"
    path.write_text(yaml.safe_dump({"like": "../try.yaml", "seeds": [7], "settings": {"data.batch_size": 2}}))
    large = read_recipe(path)
    assert (large.name, large.seeds, large.question) == ("large", [7], "Which?")
    assert (large.arms, large.base.resolve()) == (small.arms, small.base.resolve())
    assert large.settings == {"trainer.max_steps": 3, "data.batch_size": 2}
    base = elsewhere / "own.yaml"
    base.write_text(yaml.safe_dump(BASE))
    path.write_text(yaml.safe_dump({"like": "../try.yaml", "base": "own.yaml"}))
    assert read_recipe(path).base == base


@pytest.mark.parametrize("other", ["none.yaml", "try.yaml"])
def test_a_study_like_none_or_like_itself_is_refused(study, other):
    with pytest.raises(ConfigError, match="is no study with arms of its own"):
        read_recipe(study(like=other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": {}}, ["unknown key 'arm'", "did you mean 'arms'"]),
        ({"seeds": []}, ["seeds is missing"]),
        ({"seeds": [1, 1]}, ["[1, 1]", "twice"]),
        ({"seeds": ["one"]}, ["whole numbers"]),
        ({"arms": {"topk": {}}}, ["one arm", "at least two"]),
        ({"arms": {"a b": {}, "c": {}}}, ["'a b'", "folder"]),
        ({"baseline": "topc"}, ["'topc' is no arm", "did you mean 'topk'"]),
        ({"base": "none.yaml"}, ["none.yaml does not exist"]),
        ({"match": "flops"}, ["match is 'flops'", "active_flops"]),
        ({"budget": {"hours": 3}}, ["budget", "steps or tokens"]),
        ({"settings": {"data.seed": 3}}, ["data.seed", "the study sets"]),
        ({"arms": {"topk": {}, "other": {"seed_everything": 3}}}, ["arm 'other'", "seed_everything"]),
        ({"arms": {"topk": {}, "two": {"steps": [{"fit": {}}, {"upcycle": {}}]}}}, ["arm 'two'", "fit, upcycle, fit"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_is_no_study_is_refused(study, changes, words):
    with pytest.raises(ConfigError) as caught:
        read_recipe(study(**changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"arms": {"topk": {}, "typo": {"model.config.num_expert": 8}}},
            ["arm 'typo'", "unknown key 'model.config.num_expert'", "did you mean 'model.config.num_experts'"],
        ),
        (
            {"arms": {"topk": {}, "many": {"model.config.num_experts_per_tok": 5}}},
            ["arm 'many'", "num_experts_per_tok is 5"],
        ),
        (
            {"arms": {"topk": {}, "longer": {"trainer.max_steps": 7}}},
            ["arm 'longer' trains on 448 tokens", "'topk' on 384", "budget"],
        ),
        (
            {"arms": {"topk": {}, "longer": {"trainer.max_steps": 7}}, "budget": {"steps": 6}},
            ["arm 'longer'", "trainer.max_steps", "budget decides"],
        ),
        ({"arms": {"topk": {}, "odd": {"data.batch_size": 5}}, "budget": {"tokens": 384}}, ["'odd'", "384 tokens"]),
        (
            {"settings": {"trainer.devices": 2, "trainer.num_nodes": 2}, "budget": {"tokens": 64}},
            ["64 tokens", "of 256"],
        ),
        ({"settings": {"trainer.devices": "many"}}, ["trainer.devices 'many'", "how many a node has"]),
        ({"settings": {"trainer.limit_val_batches": 0}}, ["limit_val_batches is 0", "held-out text"]),
        (
            {"arms": {"topk": {}, "text": {"data.validation_fraction": 0.2}}},
            ["arm 'text'", "data.validation_fraction", "same text"],
        ),
        (
            {"arms": {"topk": {}, "wide": {"model.config.moe_intermediate_size": 64}}, "match": ["active_flops"]},
            ["arm 'wide'", "active flops", "outside the tolerance of 0.02", "1."],
        ),
        (
            {"arms": {"topk": {}, "dense": {**UPCYCLED, "steps": [*UPCYCLED["steps"][:2], {"fit": {"x.y": 1}}]}}},
            ["arm 'dense'", "unknown key 'x.y'"],
        ),
        (
            {"arms": {"topk": {}, "no": {"steps": [{"fit": DENSE}, {"upcycle": {"method": "copies"}}, {"fit": {}}]}}},
            ["arm 'no'", "copies"],
        ),
        (
            {"arms": {"topk": {}, "no": {"steps": [{"fit": {}}, {"upcycle": {"method": "copy"}}, {"fit": {}}]}}},
            ["arm 'no'", "the step before has experts already"],
        ),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(study, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        plan_study(read_recipe(study(**changes)), tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flops", "words"), [(97, "0.970"), (99, ""), (101, ""), (103, "1.030")])
def test_arms_are_neither_larger_nor_smaller_than_the_tolerance(study, flops, words):
    recipe = read_recipe(study(match=["active_flops"]))
    arms = {name: Arm(None, {}, 6, 384, 1, 1, found) for name, found in (("topk", 100), ("raw", flops))}
    refused = pytest.raises(ConfigError, match=f"arm 'raw' has {flops} active flops .*: {words} times as many")
    with refused if words else contextlib.nullcontext():
        _check_comparable(recipe, arms, {"topk": {}, "raw": {}})


def test_arms_of_equal_tokens_get_the_steps_for_it(study, tmp_path):
    arms = {"topk": {}, "small_batches": {"data.batch_size": 1}}
    plan = plan_study(read_recipe(study(arms=arms, budget={"tokens": 640})), tmp_path / "out")
    assert [(arm.steps, arm.tokens) for arm in plan.arms.values()] == [(10, 640), (20, 640)]
    assert plan.runs["runs/small_batches/seed_2"].steps == 20
    assert "--trainer.max_steps=20" in plan.runs["runs/small_batches/seed_2"].arguments


def test_every_process_of_a_layout_sees_tokens_of_its_own(study, tmp_path):
    layouts = {
        "topk": {"trainer.devices": 4},
        "split": {"trainer.devices": "auto", "parallel.data": 2, "parallel.expert": 2},
        "accumulated": {"trainer.accumulate_grad_batches": 4},
    }
    plan = plan_study(read_recipe(study(arms=layouts, budget={"tokens": 512})), tmp_path / "out")
    assert [(arm.steps, arm.tokens) for arm in plan.arms.values()] == [(2, 512)] * 3


def test_a_seed_decides_data_and_weights_and_nothing_else_differs(study, tmp_path):
    plan = plan_study(read_recipe(study()), tmp_path / "out")
    assert list(plan.runs)[:3] == ["runs/topk/seed_1", "runs/raw/seed_1", "runs/topk/seed_2"]  # pairs complete early
    for name in ("topk", "raw"):
        arguments = plan.runs[f"runs/{name}/seed_2"].arguments
        assert {"--seed_everything=2", "--data.seed=2", "--ckpt_path=last"} <= set(arguments)
    first, second = (plan.runs[f"runs/topk/seed_{seed}"].identity for seed in (1, 2))
    assert {key for key in first if first[key] != second[key]} == {"seed"}


def test_arms_share_the_steps_before_and_match_by_what_they_become(study, tmp_path):
    """An upcycling decides over the settings of all arms, and the step after it over both: all have two of four."""
    one, two = ({"model.config.num_experts_per_tok": count} for count in (1, 2))
    upcycled = {"method": "drop", "num_experts": 4, "num_experts_per_tok": 3, "fraction": 0.5}
    arms = {"scratch": two, "copy": UPCYCLED, "drop": {"steps": [{"fit": DENSE}, {"upcycle": upcycled}, {"fit": two}]}}
    recipe = read_recipe(study(arms=arms, settings=one, seeds=[1], match=["total_parameters", "active_flops"]))
    plan = plan_study(recipe, tmp_path / "out")
    dense = [name for name in plan.runs if name.startswith("stages/fit")]
    upcycled = [name for name in plan.runs if name.startswith("stages/upcycle")]
    assert (len(dense), len(upcycled), len(plan.runs)) == (1, 2, 6)
    assert {plan.runs[name].needs for name in upcycled} == set(dense)
    assert {plan.runs[f"runs/{arm}/seed_1"].needs for arm in ("copy", "drop")} == set(upcycled)
    assert len({arm.total_parameters for arm in plan.arms.values()}) == 1
    assert any("one seed" in note for note in plan.notes)


def test_text_of_an_upcycling_is_part_of_what_a_run_is(study, tmp_path):
    """Several domains, each an option of its own; other text in the same file is another run."""
    files = [tmp_path / f"{name}.txt" for name in ("one", "two")]
    for path in files:
        path.write_text("the cat sat on the mat")
    domains = [f"{path.stem}={path}" for path in files]
    inner = {"method": "partition", "by": "inner", "num_experts": 4, "router": "noisy", "domain": domains}
    arms = {"copy": UPCYCLED, "inner": {"steps": [{"fit": DENSE}, {"upcycle": inner}, {"fit": {}}]}}
    found = []
    for text in ("the cat", "the dog"):
        files[1].write_text(text)
        plan = plan_study(read_recipe(study(arms=arms, seeds=[1])), tmp_path / "out")
        name = plan.runs["runs/inner/seed_1"].needs
        found.append(name)
        arguments = plan.runs[name].arguments
        assert [one for one in arguments if one.startswith("--domain=")] == [f"--domain={one}" for one in domains]
    assert found[0] != found[1]
    assert plan.arms["inner"].config.router == "noisy_topk"
    del inner["domain"]
    with pytest.raises(ConfigError, match="method partition needs text: by inner takes"):
        plan_study(read_recipe(study(arms=arms, seeds=[1])), tmp_path / "out")


def test_an_arm_against_itself_is_said_to_be_one(study, tmp_path):
    plan = plan_study(read_recipe(study(arms={"a": {}, "b": {}})), tmp_path / "out")
    assert plan.notes == ["arms 'a' and 'b' have the same config: their runs will be equal"]


def test_slurm_script_and_refusals_on_the_command_line(study, tmp_path, capsys):
    path, out = study(), tmp_path / "out"
    assert main(["study", str(path), "--out", str(out), "--slurm", "--jobs", "3"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash")
    assert "--array=0-5%3" in script
    assert f'moebed study {path} --out {out} --run "$SLURM_ARRAY_TASK_ID"' in script
    assert f"moebed study {path} --out {out} --collect" in script
    three = study(arms={"topk": {}, "raw": {"model.config.norm_topk_prob": False}, "top1": TOP1}, seeds=[1, 2])
    for arms, numbers in (("raw", "0,1,3,4"), ("top1", "0,2,3,5"), ("raw,top1", "0-5")):  # and the baseline's
        assert main(["study", str(three), "--out", str(out), "--slurm", "--arms", arms]) == 0
        assert f"--array={numbers}%1 " in capsys.readouterr().out
    for arguments, words in (
        ([str(path), "--arms", "rwa"], "'rwa' is no arm"),
        ([str(path), "--run", "6"], "runs 0 to 5"),
        ([str(path), "--jobs", "0"], "--jobs is '0'"),
        ([str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
        ([str(tmp_path / "study.json")], "study.json does not exist"),
    ):
        assert main(["study", *arguments, *(["--out", str(out)] if len(arguments) > 1 else [])]) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_nothing_half_written_is_read(tmp_path, capsys):
    (tmp_path / "study.json").write_text('{"format": 1, "arms"')
    assert main(["study", str(tmp_path / "study.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "study.json").write_text(json.dumps({"format": 0}))
    assert main(["study", str(tmp_path / "study.json")]) == 2
    assert "no study.json of this version" in capsys.readouterr().err


def test_what_is_compared_was_run_with_this_config(study, tmp_path, capsys):
    """Collecting alone, too, refuses a folder that was begun with another config."""
    path, out = study(), tmp_path / "out"
    run = plan_study(read_recipe(path), out).runs["runs/raw/seed_1"]
    (out / run.name).mkdir(parents=True)
    record = {"hash": "another", "identity": {**run.identity, "model.config.num_experts": 8}}
    (out / "status/runs/raw").mkdir(parents=True)
    (out / "status/runs/raw/seed_1.json").write_text(json.dumps(record))
    assert main(["study", str(path), "--out", str(out), "--collect"]) == 2
    assert (
        "raw/seed_1 was begun with another config (model.config.num_experts was 8 and is 4)" in capsys.readouterr().err
    )
    assert not (out / "study.json").exists()


def test_settings_that_came_later_and_have_their_default_change_nothing(study, tmp_path):
    """A study is continued by a moebed that has more settings than the one that began it, in callbacks as well."""
    probing = {"class_path": "probes.ProbeCallback", "init_args": {"probes": ["balance"]}}
    path, out = study(settings={"trainer.callbacks": [probing]}), tmp_path / "out"
    run = plan_study(read_recipe(path), out).runs["runs/raw/seed_1"]
    (out / run.name).mkdir(parents=True)
    (out / "status/runs/raw").mkdir(parents=True)

    def begun(**changes):
        kept = json.loads(json.dumps({**run.identity, **changes}))
        del kept["model.config.experts_bias"], kept["trainer.callbacks"][0]["init_args"]["earlier"]
        record = {"hash": "another", "identity": kept}
        (out / "status/runs/raw/seed_1.json").write_text(json.dumps(record))

    begun()
    check_unchanged([run], out)
    begun(torch="1.0")
    with pytest.raises(UserError, match=r"another config .torch was '1.0' and is"):
        check_unchanged([run], out)
    begun(**{"model.config.num_experts": 8})
    with pytest.raises(UserError, match=r"another config .model.config.num_experts was 8 and is 4.;"):
        check_unchanged([run], out)
    begun(**{"model.config.of_another_day": 1})
    with pytest.raises(UserError, match="another config"):
        check_unchanged([run], out)
    run.identity["model.config.experts_bias"] = True
    begun()
    with pytest.raises(UserError, match="experts_bias was False and is True"):
        check_unchanged([run], out)


def test_earlier_steps_keep_their_folders_where_settings_came_later(study, tmp_path):
    path, out = study(arms={"topk": {}, "copy": UPCYCLED}), tmp_path / "out"
    runs = plan_study(read_recipe(path), out).runs
    trained = next(name for name in runs if name.startswith("stages/fit_"))
    identity = {key: value for key, value in runs[trained].identity.items() if key != "model.config.experts_bias"}
    (out / "status/stages/fit_ofanotherday").mkdir(parents=True)
    (out / "status/stages/fit_ofanotherday/seed_1.json").write_text(json.dumps({"hash": "x", "identity": identity}))
    runs = plan_study(read_recipe(path), out).runs
    assert trained not in runs
    assert "stages/fit_ofanotherday/seed_2" in runs
    upcycled = next(run for name, run in runs.items() if name.startswith("stages/upcycle_"))
    assert upcycled.identity["after"] == "ofanotherday"
    longer = {**UPCYCLED["steps"][0]["fit"], "trainer.max_steps": 5}
    path = study(arms={"topk": {}, "copy": {"steps": [{"fit": longer}, *UPCYCLED["steps"][1:]]}})
    assert not any("anotherday" in name for name in plan_study(read_recipe(path), out).runs)


def test_tasks_come_after_every_run_that_counts(study, tmp_path):
    tasks = {"tasks": ["moebed_recall", "moebed_addition"], "limit": 5, "text": ["one=a.txt", "two=b.txt"]}
    plan = plan_study(read_recipe(study(arms={"topk": {}, "copy": UPCYCLED}, tasks=tasks)), tmp_path / "out")
    assert set(plan.tasks) == set(plan.final)
    run = plan.runs[plan.tasks["copy", 2]]
    assert (run.name, run.needs) == ("tasks/copy/seed_2", "runs/copy/seed_2")
    checkpoint = tmp_path / "out" / "runs" / "copy" / "seed_2" / "checkpoints" / "last.ckpt"
    assert run.arguments[:2] == ["tasks", str(checkpoint)]
    wanted = {"--tasks=moebed_recall,moebed_addition", "--limit=5", "--text=one=a.txt", "--text=two=b.txt"}
    assert wanted | {"--probes=none"} <= set(run.arguments)
    assert list(plan.runs).index(run.name) > list(plan.runs).index(str(run.needs))
    # Other tasks, another training: another run.
    changed = read_recipe(study(arms={"topk": {}, "copy": UPCYCLED}, tasks={**tasks, "limit": 6}))
    assert plan_study(changed, tmp_path / "out").runs[run.name].hash != run.hash
    assert run.identity["after"] == plan.runs[str(run.needs)].hash


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"task": "moebed_recall"}, "unknown key 'task'; did you mean 'tasks'?"),
        ({"limit": 5}, "tasks names none"),
        ({"tasks": "moebed_recall", "limit": "all"}, "limit 'all'; give a whole number"),
    ],
)
def test_tasks_that_cannot_be_meant_are_refused(study, tasks, said):
    with pytest.raises(ConfigError, match=said):
        read_recipe(study(tasks=tasks))
