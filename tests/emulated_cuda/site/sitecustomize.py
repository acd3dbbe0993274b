"""Python reads this as it starts: PyTorch, once it is imported, has the emulated devices."""

import importlib.util
import os
import sys


class Finder:
    """Finds PyTorch as always, loads the device's library before it and puts ``torch.cuda`` in its place after it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        from tests.emulated_cuda import install

        libraries = install.load(spec.origin)
        execute = spec.loader.exec_module

        def then_install(module):
            execute(module)
            install.install(libraries)

        spec.loader.exec_module = then_install
        return spec


if "EMULATED_CUDA" in os.environ:
    sys.meta_path.insert(0, Finder())
