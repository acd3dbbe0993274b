"""``torch.cuda`` over the emulated device: what the CPU build of PyTorch lacks, in as few lines as moebed needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import types
from pathlib import Path


def load(torch_init: str) -> ctypes.CDLL:
    """The device's library, loaded before PyTorch's Python part, which asks once whether there is CUDA."""
    folder = Path(torch_init).parent / "lib"
    for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    with quiet():  # PyTorch says of each collective that it has another kernel
        device = ctypes.CDLL(os.environ["EMULATED_CUDA"].split(",")[0], ctypes.RTLD_GLOBAL)
    for function in (device.emulated_allocated, device.emulated_peak, device.emulated_waits):
        function.restype = ctypes.c_int64
    return device


@contextlib.contextmanager
def quiet():
    """Nothing that C++ writes to standard error is seen."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Stream:
    """The one stream: all that was asked for is done."""

    cuda_stream = 0

    def __init__(self, *_, device=None, **__):
        self.device = device

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def query(self):
        return True


class Event:
    """A moment of the host's clock."""

    def __init__(self, *_, **__):
        self.seconds = 0.0

    def record(self, *_):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def wait(self, *_):
        pass

    def query(self):
        return True

    def elapsed_time(self, later):
        return 1e3 * (later.seconds - self.seconds)


class Properties(types.SimpleNamespace):
    __hash__ = object.__hash__


def install(device: ctypes.CDLL) -> None:
    """Put the emulated devices into ``torch.cuda``."""
    import torch
    from torch import cuda

    from tests.emulated_cuda import nccl, waits

    _, devices, capability = os.environ["EMULATED_CUDA"].split(",")
    count = int(devices)
    major, minor = map(int, capability.split("."))
    room = 80 << 30
    device.emulated_devices(count)
    name = f"Emulated device of capability {capability}"
    properties = Properties(
        name=name, major=major, minor=minor, total_memory=room, multi_processor_count=132, warp_size=32,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048, L2_cache_size=50 << 20, gcnArchName="", is_integrated=0,
    )  # fmt: skip
    waiting = {"default": 0, "warn": 1, "error": 2, 0: 0, 1: 1, 2: 2}

    def index(which=None) -> int:
        if isinstance(which, int) and which >= 0:
            return which
        number = None if which is None or isinstance(which, int) else torch.device(which).index
        return device.emulated_current_device() if number is None else number

    def current():
        return device.emulated_current_device()

    class on:
        """``torch.cuda.device``: the current device within a block."""

        def __init__(self, which):
            self.index = index(which)

        def __enter__(self):
            self.before = current()
            device.emulated_set_device(self.index)

        def __exit__(self, *_):
            device.emulated_set_device(self.before)

    def allocated():
        return device.emulated_allocated()

    statistics = {"allocated_bytes.all.current": allocated, "allocated_bytes.all.peak": device.emulated_peak}
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: count,
        "current_device": lambda: current(),
        "set_device": lambda which: device.emulated_set_device(index(which)),
        "device": on,
        "_exchange_device": lambda which: device.emulated_set_device(index(which)),
        "_maybe_exchange_device": lambda which: device.emulated_set_device(index(which)),
        "get_device_name": lambda which=None: name,
        "get_device_capability": lambda which=None: (major, minor),
        "get_device_properties": lambda which=None: properties,
        "get_arch_list": lambda: [f"sm_{major}{minor}"],
        "is_bf16_supported": lambda including_emulation=True: major >= 8 or including_emulation,
        "can_device_access_peer": lambda one, other: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda which=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda which=None: allocated(),
        "memory_reserved": lambda which=None: allocated(),
        "max_memory_allocated": lambda which=None: device.emulated_peak(),
        "max_memory_reserved": lambda which=None: device.emulated_peak(),
        "reset_peak_memory_stats": lambda which=None: device.emulated_reset_peak(),
        "memory_stats": lambda which=None: {key: value() for key, value in statistics.items()},
        "mem_get_info": lambda which=None: (room - allocated(), room),
        "set_sync_debug_mode": lambda mode: device.emulated_wait_mode(waiting[mode]),
        "get_sync_debug_mode": lambda: device.emulated_wait_mode_now(),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda which=None: Stream(device=which),
        "default_stream": lambda which=None: Stream(device=which),
        "default_generators": tuple(torch.Generator(f"cuda:{number}") for number in range(count)),
    }
    for key, value in functions.items():
        setattr(cuda, key, value)
    parts = {
        "_cuda_getCurrentRawStream": lambda which: 0,
        "_cuda_getDeviceCount": lambda: count,
        "_cuda_getDevice": lambda: current(),
        "_cuda_setDevice": lambda which: device.emulated_set_device(index(which)),
        "_cuda_exchangeDevice": lambda which: which,
        "_cuda_maybeExchangeDevice": lambda which: which,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_init": lambda: None,
        "_nccl_version": lambda: 2 << 32 | 28 << 16,
        "_nccl_version_suffix": lambda: b"",
    }
    for key, value in parts.items():
        if not hasattr(torch._C, key):
            setattr(torch._C, key, value)
    torch.version.cuda = "13.0"

    to, resize = torch.UntypedStorage.to, torch.UntypedStorage.resize_

    def storage_to(storage, *, device, non_blocking=False):
        """PyTorch's own makes storages of devices that it was built for alone."""
        if torch.device(device).type != "cuda":
            return to(storage, device=device, non_blocking=non_blocking)
        host = torch.empty(0, dtype=torch.uint8).set_(storage)
        return host.to(device, non_blocking=non_blocking).untyped_storage()

    def storage_resize(storage, size):
        if storage.device.type != "cuda":
            return resize(storage, size)
        torch.ops.emulated_cuda.resize_storage(
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size
        )
        return storage

    torch.UntypedStorage.to = storage_to
    torch.UntypedStorage.resize_ = storage_resize
    nccl.install()
    waits.install(device)
