"""The versions that were tested together are ones that pyproject allows, and a next major version is not."""

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


def test_every_dependency_was_tested_in_a_version_that_is_allowed():
    assert set(REQUIRED) <= set(TESTED)
    assert [name for name, allowed in REQUIRED.items() if TESTED[name] not in allowed] == []


@pytest.mark.parametrize("name", ["torch", "lightning", "jsonargparse", "transformers", "triton", "datasets", "numpy"])
def test_a_next_major_version_does_not_slip_in(name):
    assert f"{Version(TESTED[name]).major + 1}.0" not in REQUIRED[name]
