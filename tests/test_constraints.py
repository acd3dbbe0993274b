"""The versions that were tested together can be installed together, pyproject allows them and no next major version."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {found.name.lower(): found.specifier for found in map(Requirement, PROJECT["dependencies"])}
LINES = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
TESTED = {name.lower(): version for name, _, version in (line.partition("==") for line in LINES if line)}

# What PyPI's builds of torch for GPUs ask for, by their metadata. Its builds for CPUs ask for none, so that an
# installation of those would not notice that the two cannot be had together.
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1"}


def test_every_dependency_was_tested_in_a_version_that_is_allowed():
    assert set(REQUIRED) <= set(TESTED)
    assert [name for name, allowed in REQUIRED.items() if TESTED[name] not in allowed] == []


@pytest.mark.parametrize("name", ["torch", "lightning", "jsonargparse", "transformers", "triton", "datasets", "numpy"])
def test_a_next_major_version_does_not_slip_in(name):
    assert f"{Version(TESTED[name]).major + 1}.0" not in REQUIRED[name]


def test_torch_for_gpus_can_be_installed_beside_the_tested_triton():
    assert TESTED["triton"] == TRITON_OF_TORCH[TESTED["torch"]]
