"""The backend "nccl" of the emulated devices: Gloo, which the device's library gives the host's view of their tensors.

As the real one it takes no tensor of the host, where a group was made for CUDA alone.
"""

from __future__ import annotations

import functools
from datetime import timedelta

import torch
from torch import distributed


class Options:
    """What PyTorch sets before it makes the group."""

    _timeout = timedelta(minutes=10)

    def __init__(self, is_high_priority_stream: bool = False):
        self.is_high_priority_stream = is_high_priority_stream


class _Made(type):
    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, distributed.ProcessGroupGloo)


class ProcessGroupNCCL(metaclass=_Made):
    """Made as the real one is; what comes is Gloo's."""

    Options = Options

    def __new__(cls, store, rank, size, options):
        return distributed.ProcessGroupGloo(store, rank, size, options._timeout)


def install() -> None:
    """Let ``torch.distributed`` find it."""
    if not distributed.is_available():
        return
    c10d = distributed.distributed_c10d
    c10d._NCCL_AVAILABLE = True
    c10d.ProcessGroupNCCL = distributed.ProcessGroupNCCL = ProcessGroupNCCL
    c10d.default_pg_nccl_timeout = distributed.constants.default_pg_nccl_timeout = Options._timeout
    group_type, host = distributed.ProcessGroup, torch.device("cpu")
    register, devices = group_type._register_backend, group_type._device_types
    without_host = set()  # of the groups made for CUDA alone, by id

    def register_for_the_host_too(group, device, kind, backend):
        """The device's collectives go the way of the host's, which needs a backend there."""
        register(group, device, kind, backend)
        if kind == group_type.BackendType.NCCL and host not in devices.fget(group):
            without_host.add(id(group))
            register(group, host, kind, backend)

    def device_types(group):
        return [device for device in devices.fget(group) if device != host or id(group) not in without_host]

    group_type._register_backend = register_for_the_host_too
    group_type._device_types = property(device_types)

    begin = distributed.init_process_group

    @functools.wraps(begin)
    def without_a_bound_device(*args, device_id=None, **kwargs):
        """A group bound to a device makes its parts by splitting NCCL's communicators, which Gloo has not."""
        return begin(*args, **kwargs)

    distributed.init_process_group = without_a_bound_device
