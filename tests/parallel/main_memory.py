"""Which tensors would lie in main memory if a rank computed on a GPU, told on a CPU by who asked for what.

A tensor lies on the device if it was made there or brought there: by a function that is given a ``torch.device``, as
all of moebed, Lightning and FSDP2 hand on that of the rank, or out of one that does. What is made without a word, or
asked to be on ``"cpu"``, lies in main memory. So what a device would refuse shows on a machine that has none: NCCL
takes no tensor in main memory, and no operator one of each. Not seen is what compiled code, or one tensor's own class
(DTensor), does within.
"""

from __future__ import annotations

import collections
import traceback

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_foreach_copy_", "set_", "_assert_async"}

PLACES = {True: "on the device", False: "in main memory", None: "?"}


class Marks:
    """Where each storage lies: True the device, False main memory, None not known."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[StorageWeakRef, bool]] = {}

    def of(self, tensor: torch.Tensor) -> bool | None:
        """Of a tensor."""
        storage = _plain(tensor).untyped_storage()
        reference, mark = self._of.get(storage._cdata, (None, None))
        return None if reference is None or reference.expired() else mark

    def set(self, tensor: torch.Tensor, mark: bool) -> None:
        """Say it of all that share its storage."""
        storage = _plain(tensor).untyped_storage()
        self._of[storage._cdata] = StorageWeakRef(storage), mark


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not _plain(leaf).is_meta]


class _Asked(TorchFunctionMode):
    """Marks what is made, brought to the device or fetched from it."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device | str)]
        given = [leaf for leaf in given if isinstance(leaf, torch.device) or leaf == "cpu"]
        before = {id(_plain(tensor)) for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or _plain(out).is_meta or name == "__set__":
            return out
        fetched = name == "cpu" or any(isinstance(one, str) for one in given)
        if name in ("cpu", "to") and (given or fetched):
            moved = self.marks.of(out) is fetched  # a tensor that is there already is not copied
            out = out.clone() if moved and id(_plain(out)) in before else out
            self.marks.set(out, not fetched)
        elif not before:
            self.marks.set(out, bool(given) and not fetched)
        return out


class MainMemory(TorchDispatchMode):
    """Finds what a device would refuse, between its beginning and its end, in this process.

    Attributes:
        collectives: How many messages were looked at, by operator.
        refused: Where a tensor in main memory was given to a message, or to an operator beside one on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self._marks = Marks()
        self._asked = _Asked(self._marks)

    def __enter__(self):
        self._asked.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._asked.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._opname
        given = _tensors((args, kwargs))
        marks = [self._marks.of(tensor) for tensor in given]
        if "c10d" in func.namespace:
            self.collectives[name] += 1
            bad = False in marks
        else:
            sized = [mark for mark, tensor in zip(marks, given, strict=True) if tensor.dim()]
            bad = name not in COPIES and True in marks and False in sized
        if bad:
            self._note(name, given, marks)
        own = {_plain(tensor).untyped_storage()._cdata for tensor in given}
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if _plain(tensor).untyped_storage()._cdata not in own and given:
                self._marks.set(tensor, True in marks or None in marks)
        return out

    def _note(self, name: str, given: list[torch.Tensor], marks: list[bool | None]) -> None:
        frames = traceback.extract_stack()
        if any(frame.name.endswith(("_object", "_object_list")) for frame in frames):
            return  # torch looks itself where the group wants it
        shapes = ", ".join(f"{tuple(tensor.shape)} {PLACES[mark]}" for tensor, mark in zip(given, marks, strict=True))
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames if "/torch/" not in frame.filename]
        self.refused.append("\n    ".join([f"{name} of {shapes}", *where[-6:-2]]))
