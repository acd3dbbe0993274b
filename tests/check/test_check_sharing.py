"""How the minutes are shared, on the ladder's own steps."""

from dataclasses import replace

import pytest

from moebed.check import runner
from moebed.check.contract import MINUTES
from moebed.check.ladder import LADDER, MODULE
from moebed.check.sharing import rung_seconds, share
from tests.check.test_check_ladder import IDENTITY

ASKED = ("machine", "probes", "checkpoints", "ranks", "memory", "waits", "fit")


@pytest.fixture
def climbed(tmp_path, monkeypatch):
    """The ladder with steps that take given seconds, or their time; what each was given, in order."""
    given = []

    def climb(minutes, needs, cores=16, only=()):
        needs, given[:] = dict(needs), []

        def rung(steps, later, records, out, module, left, has_gpu):
            ends, used, waiting = {}, 0.0, list(steps)
            while waiting:
                if len(ends) == min(cores, len(steps)):  # a step begins where the first of them ends
                    used = min(ends.values())
                    ends = {name: end for name, end in ends.items() if end > used}
                running = [step for step in steps if step.name in ends]
                step = waiting[0]
                seconds = share(step, [[*waiting, *running], *later], left - used, cores)
                waiting.pop(0)
                if seconds < runner.LEAST_SECONDS:
                    continue
                taken = min(seconds, needs.get(step.name, 0.0))
                needs[step.name] = needs.get(step.name, 0.0) - taken
                given.append((step.name, seconds))
                ends[step.name] = used + taken
                record = records[step.name]
                record.names = ["all"]
                record.stopped = "over" if needs[step.name] > 0 else ""
                record.findings = {} if record.stopped else {"all": None}
            return max(ends.values(), default=0.0)

        monkeypatch.setattr(runner, "find_identity", lambda: {**IDENTITY, "gpus": 1})
        monkeypatch.setattr(runner, "_climb_rung", rung)
        runner.climb(MODULE, LADDER, tmp_path, minutes, only=only)
        return given

    return climb


def test_a_rung_takes_as_long_as_its_longest_step_as_often_as_cores_take_turns():
    steps = [replace(LADDER[0][0], seconds=seconds) for seconds in (10.0, 30.0, 20.0)]
    assert [rung_seconds(steps, cores) for cores in (1, 2, 3, 4)] == [90, 60, 30, 30]
    assert rung_seconds([], 2) == 0
    assert share(steps[0], [steps, steps[:1]], 70.0, 2) == 10.0


FOREVER = {step.name: 1e9 for rung in LADDER for step in rung}


def test_a_whole_ladder_has_its_own_seconds(climbed):
    own = {step.name: step.seconds for rung in LADDER for step in rung}
    assert dict(climbed(MINUTES, FOREVER)) == pytest.approx(own, rel=1e-3)


def test_what_is_not_asked_for_has_no_share(climbed):
    given = dict(climbed(2, FOREVER, only=ASKED))
    assert list(given) == list(ASKED)
    assert given["machine"] == pytest.approx(120 * 20 / 130, abs=0.1)
    assert given["fit"] == pytest.approx(120 * 110 / 130, abs=0.1)


def test_what_a_rung_leaves_over_goes_to_the_next_and_then_to_what_was_cut(climbed):
    given = climbed(2, {"machine": 12.0, "memory": 20.0, "fit": 30.0}, only=ASKED)
    assert dict(given)["fit"] == pytest.approx(108, abs=0.1)
    given = climbed(2, {"machine": 30.0, "fit": 30.0}, only=ASKED)
    assert given[0] == ("machine", pytest.approx(18.5, abs=0.1))
    assert given[-1] == ("machine", pytest.approx(120 - 18.5 - 30, abs=0.1))
    assert len(given) == len(ASKED) + 1


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_few_cores_take_turns_and_the_minutes_hold(climbed, cores):
    given = climbed(MINUTES, FOREVER, cores)
    assert sum(seconds for _, seconds in given) <= cores * 60 * MINUTES + 1
    assert {name for name, _ in given} == set(FOREVER)
    assert min(seconds for _, seconds in given) > runner.LEAST_SECONDS
