"""The rules that keep the project one: who may import whom, and that importing is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "triton_kernels": set(),
    "moebed": {"triton_kernels"},
    "probes": {"moebed"},
}
ABOVE_ALL = {
    "moebed/cli.py",
    "moebed/training.py",
    "moebed/reporting.py",
    "moebed/probing.py",
    "moebed/laws/figures.py",
    "moebed/laws/page.py",
    "moebed/study/collecting.py",
    "moebed/study/figures.py",
    "moebed/study/page.py",
    "moebed/study/statistics.py",
    "moebed/bench/cli.py",
    "moebed/bench/probe.py",
    "moebed/bench/streaming.py",
    "moebed/bench/weights.py",
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependencies_point_one_way(package):
    files = [path for path in (ROOT / package).rglob("*.py") if path.relative_to(ROOT).as_posix() not in ABOVE_ALL]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top not in set(MAY_IMPORT) - MAY_IMPORT[package] - {package}, f"{path} imports {name}"


@pytest.mark.parametrize("package", ["moebed", "probes", "triton_kernels", "moebed.cli"])
def test_importing_is_cheap(package):
    code = f"import {package}, sys; print(sorted({{'torch', 'triton', 'matplotlib', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_model_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import moebed.module, probes.callback"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_the_folder_beside_the_checkout_is_reached_in_one_place():
    """Anything else would be missed by the marker that skips tests where that folder is not there."""
    reach = re.compile(r"""\.\./shared|/ ?["']shared["'/]|shared/(oracles|data|cases)""")
    reaching = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if any(reach.search(line) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert reaching == {"tests/conftest.py"}
