"""A ladder of steps that misbehave, for the runner; each process finds it here."""

import os
import signal
import threading
import time
from pathlib import Path

from moebed.check.contract import Finding, Found, NotRun, Row, Step, Verdict
from moebed.errors import UserError


def _count(name):
    """Note that a row was measured."""
    if folder := os.environ.get("PLANTED_COUNTS"):
        with Path(folder, name).open("a", encoding="utf-8") as file:
            file.write("x")


def _good(name, figures=None):
    def measure():
        _count(name)
        return Found(f"{name} is well", figures or {})

    return Row(name, measure)


def rank(how=""):
    """One of several; the last misbehaves if it is asked to."""
    if how and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        {"raises": _raise, "ends": lambda: os._exit(9), "hangs": lambda: time.sleep(600)}[how]()
    return os.environ["RANK"]


def _raise():
    raise ValueError(f"of rank {os.environ['RANK']}")


def good(place):
    return [_good("first", {"rate": 3.0}), _good("second"), Row("on a GPU", lambda: Found("?"), gpus=1)]


def crashes(place):
    return [_good("before"), Row("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV)), _good("behind")]


def hangs(place):
    return [Row("hang", lambda: time.sleep(600)), _good("after the hang")]


def _raiser(error):
    def measure():
        raise error

    return measure


def raises(place):
    errors = {
        "value": ValueError("no such\nvalue"),
        "words": UserError("do this instead"),
        "absent": ModuleNotFoundError("No module named 'scipy'", name="scipy.stats"),
        "own": ModuleNotFoundError("No module named 'moebed.nothing'", name="moebed.nothing"),
        "not here": NotRun("needs two GPUs"),
    }
    rows = [Row(name, _raiser(error)) for name, error in errors.items()]
    return [*rows, Row("not a number", lambda: Found("x", {"rate": float("nan")}, Verdict.SLOW))]


def dies_at_once(place):
    os._exit(9)


def refuses(place):
    raise NotRun("Triton cannot interpret")


def waits(place):
    def measure():
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())  # as a run does, which then stops in good order
        Path(os.environ["PLANTED_COUNTS"], "begun").touch()
        asked.wait(float(os.environ.get("PLANTED_SECONDS", "0")))
        _count("long")
        return Found("done")

    return [_good("quick"), Row("long", measure), _good("last")]


def wrong_kernels(place):
    """The kernels with a planted fault: the down product is a twentieth too large."""
    import torch

    from moebed.check import kernels
    from triton_kernels.mlp import op

    right = op.down_product
    op.down_product = lambda *args: right(*args) * 1.05
    rows = kernels.rows_of(place, torch.float32)
    return [rows[0], rows[2]]


def tunes(place):
    """Tiles in the interpreter, with times that the number of columns decides; then the table."""
    from dataclasses import replace

    import torch

    from moebed.check import kernels, tiles
    from triton_kernels.configs import INTERPRETED

    torch.cuda.get_device_name = lambda device=None: "Planted GPU"
    inputs = [tiles.make_inputs("cpu", kernels.Size(60, 4, 2, 40, 24))]
    seconds = {128: 1.0, 64: 1.0, 32: 0.5, 16: 0.1}
    right = dict(tiles.PRODUCTS)

    def planted(op):
        def product(of, config):
            columns = getattr(config, op).columns
            if columns == 256:
                raise RuntimeError("out of resource: shared memory")
            return [each * (1.5 if columns == 16 else 1.0) for each in right[op](of, config)]

        return product

    tiles.PRODUCTS.update({op: planted(op) for op in right})

    def tune(op, *columns):
        tile = getattr(INTERPRETED, op)
        candidates = [replace(tile, columns=each) for each in columns]
        timer = lambda work: seconds[getattr(work.args[1], op).columns]  # noqa: E731
        return lambda: tiles.tune(op, INTERPRETED, candidates, inputs, timer)

    def table():
        if "PLANTED_WRONG" in os.environ:
            kernels.reference.expert_mlp = lambda *args: args[0] * 2
        return tiles.write_table(place)

    return [
        Row("up", tune("up", 32, 256)),
        Row("down", tune("down", 64)),
        Row("grad_hidden", tune("grad_hidden")),
        Row("a wrong one", tune("grad_rows", 16, 32)),
        Row("the table", table),
    ]


def uses_found(place):
    def second():
        assert isinstance(place.found["first"], Finding)
        return Found(f"beside {place.found['first'].figures['rate']}")

    return [_good("first", {"rate": 3.0}), Row("second", second)]


def step(name, seconds=60.0, row_seconds=30.0, **more):
    return Step(name, f"Does {name} end?", f"tests.check.planted:{name}", seconds, row_seconds, **more)


KERNELS = {"environment": {"EXPERT_MLP_KERNELS": "require"}, "without_gpu": {"TRITON_INTERPRET": "1"}}
LADDER = (
    (step("good"),),
    (step("crashes"), step("hangs", row_seconds=6.0)),
    (step("raises"), step("dies_at_once"), step("refuses")),
    (step("on_gpus", needs_gpu=True),),
    (step("uses_found"),),
)
WAITING = ((step("good"),), (step("waits"),))
TUNING = ((step("tunes", 120.0, 120.0, **KERNELS),),)
WRONG = ((step("wrong_kernels", 120.0, 120.0, **KERNELS),),)
