"""The ladder of ``moebed check``: what must be known first comes first. Imports nothing heavy."""

from __future__ import annotations

from moebed.check.contract import Ladder, Step

MODULE = "moebed.check.ladder"  # where the steps' processes find LADDER
_REQUIRED = {"EXPERT_MLP_KERNELS": "require"}  # what the kernels refuse is an error, not the reference's answer
_INTERPRETED = {"TRITON_INTERPRET": "1"}


def _kernels(name: str, question: str) -> Step:
    return Step(
        f"kernels_{name}", question, f"moebed.check.kernels:{name}", 85, 60,
        environment=_REQUIRED, without_gpu=_INTERPRETED,
    )  # fmt: skip


# The seconds of the rungs, each as long as its longest step, are the eight minutes.
LADDER: Ladder = (
    (Step("machine", "What is here, and what do memory and products reach?", "moebed.check.machine:rows", 20, 20),),
    (
        _kernels("bfloat16", "Do the kernels compile here, and are they right in bfloat16?"),
        _kernels("float16", "Are they right in float16?"),
        _kernels("float32", "Are they right in float32?"),
        Step(
            "kernels_models", "Are they right at the sizes of published models?", "moebed.check.kernels:models",
            85, 60, needs_gpu=True, environment=_REQUIRED,
        ),
        Step(
            "kernels_launches", "Do their launches ask nothing of the host, and stay within their tensors?",
            "moebed.check.launches:rows", 85, 60, environment=_REQUIRED, without_gpu=_INTERPRETED,
        ),
    ),
    (
        Step(
            "speed", "How fast are they beside grouped_mm, transformers, Liger and ScatterMoE?",
            "moebed.check.speed:rows", 120, 60, needs_gpu=True,
            environment={"LIGER_FUSED_MOE_AUTOTUNE": "0"},  # its search of tiles takes a minute for each size
        ),
    ),
    (
        Step(
            "tiles", "Which of the tiles that pass the gates are the fastest here?",
            "moebed.check.tiles:rows", 55, 55, needs_gpu=True, environment=_REQUIRED,
        ),
    ),
    (
        Step("training", "Is a training step right with each backend, and how fast?", "moebed.check.training:rows",
             90, 75),
    ),
    (
        Step("probes", "Are the numbers of the probes those of a CPU?", "moebed.check.probing:rows", 110, 60),
        Step("checkpoints", "Does a run go on from its checkpoint as if it had not been stopped?",
             "moebed.check.runs:checkpoints", 110, 60),
        Step("ranks", "Do FSDP2 and expert parallelism train the same model?", "moebed.check.ranks:rows", 110, 60),
        Step("memory", "Does a run take the memory that --print_plan says?", "moebed.check.runs:memory", 110, 60,
             needs_gpu=True),
        Step("waits", "How often does a training step wait for the device?", "moebed.check.runs:waits", 110, 60,
             needs_gpu=True),
        Step("fit", "Does `moebed fit` train the demo, with probes and report?", "moebed.check.demo:rows", 110, 90,
             needs_gpu=True),
    ),
)  # fmt: skip
