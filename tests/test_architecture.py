"""The rules that keep the project one: who may import whom, and that importing is cheap."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room is a package or a module with all that is in it but other rooms; it may import what is on
# lower floors. An import counts wherever it stands: in a function, or for a type checker.
FLOORS = (
    ("triton_kernels", "moebed"),  # of moebed what lies in no room below: errors, arguments, plugins
    ("moebed.machine",),
    ("moebed.model",),
    ("moebed.views", "moebed.data"),
    ("moebed.checkpoints", "moebed.traces"),
    ("moebed.parallel",),
    ("moebed.upcycling", "moebed.exporting", "moebed.plan"),
    ("moebed.training",),
    ("probes.contract",),
    ("probes.measures",),
    ("probes.figures",),
    ("probes",),  # the analyses, and the registry of them
    ("probes.running",),
    ("probes.report",),
    ("moebed.study", "moebed.bench", "moebed.tasks"),
    ("moebed.laws", "moebed.check"),  # over studies' tables; over what bench measures
    ("moebed.commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """The room that a module is in: the longest name that fits."""
    while module not in FLOOR:
        module = module.rpartition(".")[0]
    return module


def find_modules(root):
    """Files by module."""
    found = {}
    for package in ("moebed", "probes", "triton_kernels"):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def find_imports(root):
    """(file, line, module, imported module) of all imports between files, wherever they stand."""
    modules = find_modules(root)
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                where = f"{path.relative_to(root)}:{node.lineno}"
                assert node.level == 0, f"{where}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                target = name if name in modules else name.rpartition(".")[0]
                if target in modules and target != module:
                    yield f"{path.relative_to(root)}:{node.lineno}", module, target


def find_upward(root):
    """A line for each import that does not lead to a lower floor, nor stays in its room."""
    for where, module, target in find_imports(root):
        room, other = room_of(module), room_of(target)
        if room != other and FLOOR[other] >= FLOOR[room]:
            yield f"{where} imports {target}: {other} is on floor {FLOOR[other]}, {room} on floor {FLOOR[room]}"


def find_circle(root):
    """Modules each of which imports the next, and the last one the first; none if there is no circle."""
    sorter = TopologicalSorter()
    for _, module, target in find_imports(root):
        sorter.add(module, target)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_rooms_import_from_lower_floors_only():
    assert set(FLOOR) <= set(find_modules(ROOT)), "the table names a room that is not there"
    upward = list(find_upward(ROOT))
    assert not upward, "\n".join(upward)


def test_no_files_import_one_another():
    assert not find_circle(ROOT)


def test_a_loose_file_does_not_hide_from_the_table():
    """What lies beside the rooms is on the lowest floor of its package, whatever its name."""
    loose = {path.stem for path in (ROOT / "moebed").glob("*.py")}
    assert loose == {
        "__init__",
        "cli",
        "errors",
        "extras",
        "names",
        "arguments",
        "plugins",
        "ranks",
        "former_names",
        "lazy",
    }


@pytest.mark.parametrize(
    "line", ["from moebed.training import module", "def f():\n    import moebed.training.module", "if 0: import probes"]
)
def test_an_import_that_leads_up_is_found(line, tmp_path):
    for name in ("moebed/model/decoder", "moebed/training/module", "moebed/errors", "probes/__init__"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    (tmp_path / "moebed/training/module.py").write_text("import moebed.model.decoder, moebed.errors", encoding="utf-8")
    assert not list(find_upward(tmp_path))
    assert not find_circle(tmp_path)
    (tmp_path / "moebed/model/decoder.py").write_text(line, encoding="utf-8")
    (found,) = find_upward(tmp_path)
    assert re.fullmatch(
        r"moebed/model/decoder.py:[12] imports \S+: \S+ is on floor (7|11), moebed.model on floor 2", found
    )
    if "module" in line:
        assert set(find_circle(tmp_path)) == {"moebed.model.decoder", "moebed.training.module"}


@pytest.mark.parametrize("package", ["moebed", "probes", "triton_kernels", "moebed.cli"])
def test_importing_is_cheap(package):
    code = f"import {package}, sys; print(sorted({{'torch', 'triton', 'matplotlib', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_models_need_no_triton_and_no_compiler_and_drawing_no_pyplot():
    """In one process, as each that imports PyTorch takes seconds; what trains brings both of the latter along."""
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import moebed.model.in_transformers, moebed.checkpoints, probes.registry, probes.figures.drawing; "
        "print([name for name in ('torch._dynamo', 'matplotlib.pyplot') if name in sys.modules]); "
        "import moebed.training.module, probes.running.callback"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_folder_beside_the_checkout_is_reached_in_one_place():
    """Anything else would be missed by the marker that skips tests where that folder is not there."""
    reach = re.compile(r"""\.\./shared|/ ?["']shared["'/]|shared/(oracles|data|cases)""")
    reaching = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if any(reach.search(line) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert reaching == {"tests/conftest.py"}


def test_what_ci_collects_for_that_folder_is_all_that_carries_the_mark():
    """``.ci/run`` looks for the mark by these words, in files of tests: it would not see one made elsewhere."""
    words = "pytest.mark" + ".shared("
    looked_for = words.replace(".", r"\.")  # as git takes it, to which a bracket is a bracket
    assert f"-lz '{looked_for}' -- 'tests/*test_*.py'" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    carrying = {path: text for path, text in texts.items() if re.search(r"mark\.shared", text)}
    assert len(carrying) > 1
    other = [path for path, text in carrying.items() if not (path.match("test_*.py") and words in text)]
    assert [path.name for path in other] == ["conftest.py"]
