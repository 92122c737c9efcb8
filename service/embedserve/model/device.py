"""What a device can do, what it has left, and what its errors mean.

Decides the dtype that ``auto`` stands for, and which of torch's errors say that a pass did not fit or that the device
is gone. Must never know a model or a batch.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from embedserve.errors import StartupError
from embedserve.model.backend import DeviceReport

__all__ = [
    "DEVICE_LOST_TEXTS",
    "OUT_OF_MEMORY_TEXTS",
    "DeviceFault",
    "bind_thread",
    "choose_device",
    "choose_dtype",
    "fault_of",
    "report_on",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""``/proc/cpuinfo`` flags of processors that multiply in bfloat16: AMX tiles (16 times float32), and AVX-512 BF16,
where MiniLM does 14.5k tokens/s against 5.9k in float32 (two Zen 5 cores). Others only emulate it, slower than
float32."""

DEVICE_LOST_TEXTS = (
    "device-side assert triggered",
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "context is destroyed",
    "driver shutting down",
    "GPU has fallen off the bus",
    "device is lost",
    "CUDA error: unknown error",
)
"""Parts of CUDA's messages after which every later call fails too (CUDA runtime API, ``cudaError_t``: the errors that
"leave the process in an inconsistent state"). Only a new process helps."""

OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
)
"""Parts of the messages of allocations that failed, on CUDA, in its libraries and on a CPU."""


class DeviceFault(Enum):
    """What an error of torch says about the device."""

    OUT_OF_MEMORY = "out of memory"
    LOST = "lost"


def fault_of(error: RuntimeError) -> DeviceFault | None:
    """What ``error`` says about the device, or ``None`` where the batch itself may have caused it."""
    text = str(error)
    if any(part in text for part in DEVICE_LOST_TEXTS):
        return DeviceFault.LOST
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in OUT_OF_MEMORY_TEXTS):
        return DeviceFault.OUT_OF_MEMORY
    return None


def choose_device(name: str) -> torch.device:
    """The device called ``name``: ``cpu``, ``cuda`` or ``cuda:N``. Raises ``StartupError`` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"device {name!r} is not known: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device {name!r} is not served; served are cpu, cuda and cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise StartupError(f"device {name!r} does not exist: this machine has {count} CUDA devices that torch can use")
    return torch.device("cuda", index)


def bind_thread(device: torch.device) -> None:
    """Make ``device`` the current one of this thread, where it is a GPU.

    CUDA's current device is each thread's own and begins as 0: an event without a stream, pinned memory or a context
    that a library makes would go to the first GPU whatever its tensors are on.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``, or for ``auto`` the fastest that keeps every vector within a cosine of 0.999."""
    if name == "auto":
        fast = device.type == "cuda" or bool(BF16_CPU_FLAGS & _cpu_flags())
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise StartupError(f"dtype {name!r} is not known; known are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def report_on(device: torch.device, *, packed: bool, **compilation: Any) -> DeviceReport:
    """Memory of ``device`` now: of the whole GPU, or of this process in the machine's memory; the rest as given."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        resident = Path("/proc/self/statm")
        used = page * int(resident.read_text(encoding="ascii").split()[1]) if resident.is_file() else 0
    return DeviceReport(str(device), used, total, packed=packed, **compilation)


def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
