"""A study in TensorBoard's HParams dashboard: the runs, settings and numbers of ``study.json``, read back."""

import json
import math
import subprocess
import sys

from study_runs import made_up_study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from moebed.study.hparams import write_hparams

LOSSES = {"softmax": [3.0, 3.1], "competition": [2.9, 2.95]}


def plugin_data(folder, tag):
    events = EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata(tag).plugin_data.content
    return {
        metadata.EXPERIMENT_TAG: metadata.parse_experiment_plugin_data,
        metadata.SESSION_START_INFO_TAG: metadata.parse_session_start_info_plugin_data,
    }[tag](content)


def test_each_finished_run_is_a_row_with_its_settings_and_numbers(tmp_path):
    study = made_up_study(LOSSES)
    study["arms"]["competition"]["runs"]["2"]["status"] = "diverged"
    study["arms"]["competition"]["settings"] |= {
        "data.rows_by_domain": {"code": 2},
        "model.config.norm_topk_prob": True,
    }
    out = write_hparams(study, tmp_path)
    rows = {path.parent.relative_to(out).as_posix() for path in out.rglob("*tfevents*")} - {"."}
    assert rows == {"softmax/seed_1", "softmax/seed_2", "competition/seed_1"}

    known = plugin_data(out / "competition" / "seed_1", metadata.SESSION_START_INFO_TAG).hparams
    assert known["arm"].string_value == known["model.config.router"].string_value == "competition"
    assert known["seed"].number_value == 1
    assert known["data.rows_by_domain"].string_value == "{'code': 2}"
    assert known["model.config.norm_topk_prob"].string_value == "True"

    events = EventAccumulator(str(out / "competition" / "seed_1")).Reload()
    run = study["arms"]["competition"]["runs"]["1"]
    wanted = {"loss": 2.9, "bits_per_byte": 1.45, "tokens_per_second": 1001.0}
    wanted |= {name: series["value"][-1] for name, series in run["headlines"].items()}
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert found.keys() == wanted.keys()
    assert all(math.isclose(found[tag], value, rel_tol=1e-6) for tag, value in wanted.items())


def test_a_study_without_a_finished_run_has_no_row(tmp_path):
    study = made_up_study(LOSSES)
    for arm in study["arms"].values():
        arm["runs"] = {seed: {**run, "status": "not run"} for seed, run in arm["runs"].items()}
    assert [path.parent.name for path in write_hparams(study, tmp_path).rglob("*tfevents*")] == ["hparams"]


def test_what_there_is_to_choose_from_is_said_once_of_all_arms(tmp_path):
    """The dashboard takes the first experiment that it finds: of one run it would lack the others' settings."""
    study = made_up_study(LOSSES)
    study["arms"]["competition"]["runs"]["1"]["over_floor"] = 0.5
    out = write_hparams(study, tmp_path)
    said = plugin_data(out, metadata.EXPERIMENT_TAG)
    arm = next(info for info in said.hparam_infos if info.name == "arm")
    assert [value.string_value for value in arm.domain_discrete.values] == ["softmax", "competition"]
    assert {info.name for info in said.hparam_infos} == {"arm", "seed", "total_parameters", "model.config.router"}
    assert {info.name.tag for info in said.metric_infos} >= {"loss", "over_floor", "norm_vs_score/spearman"}
    runs = [EventAccumulator(str(path.parent)).Reload() for path in out.rglob("*tfevents*") if path.parent != out]
    assert len(runs) == 4
    assert not any(metadata.EXPERIMENT_TAG in run.summary_metadata for run in runs)


def test_it_is_the_same_in_every_process(tmp_path):
    """Maps are written in an order that differs from process to process, unless told otherwise."""
    study = made_up_study(LOSSES)
    study["arms"]["softmax"]["settings"] = {f"setting.{number}": number for number in range(20)}
    (tmp_path / "study.json").write_text(json.dumps(study))
    code = "import json, pathlib, sys; from moebed.study.hparams import write_hparams as write; "
    code += "write(json.load(open(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    write_hparams(study, tmp_path / "here")
    command = [sys.executable, "-c", code, str(tmp_path / "study.json"), str(tmp_path / "elsewhere")]
    subprocess.run(command, check=True, capture_output=True)
    here, elsewhere = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*tf*")}
        for name in ("here", "elsewhere")
    )
    assert here == elsewhere
    assert len(here) > 1


def test_a_second_collection_takes_the_place_of_the_first(tmp_path):
    write_hparams(made_up_study(LOSSES), tmp_path)
    out = write_hparams(made_up_study({"softmax": [3.0]}), tmp_path)
    assert len(list(out.rglob("*tfevents*"))) == 2
