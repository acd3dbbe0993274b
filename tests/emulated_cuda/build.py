"""The library of the emulated device, compiled once for a version of PyTorch and kept among temporary files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))


def torch_folder() -> Path:
    """Where PyTorch lies; it is not imported, since the library must be loaded before it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def library() -> Path:
    """The compiled library; g++ takes a quarter of a minute the first time.

    Raises:
        RuntimeError: it does not compile, with what g++ said last.
    """
    version = importlib.metadata.version("torch")
    name = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + version.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"moebed_emulated_cuda_{os.getuid()}" / f"{name}.so"
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, exist_ok=True)
    folder = torch_folder()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
        new = Path(file.name)
    headers = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
    libraries = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu"]
    flags = ["-shared", "-fPIC", "-std=c++20", "-O1"]
    command = ["g++", *flags, *headers, str(SOURCE), "-o", str(new), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        new.unlink()
        raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr.strip()[-2000:]}")
    new.replace(path)  # whoever compiles it at the same time writes the same
    return path
