"""What torch's errors mean, and which dtype ``auto`` stands for."""

from pathlib import Path

import pytest
import torch

from embedserve.errors import StartupError
from embedserve.model import device as device_module
from embedserve.model.device import DeviceFault, bind_thread, choose_device, choose_dtype, fault_of, report_on

MESSAGES = {
    # As CUDA, cuBLAS, cuDNN and torch write them.
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported": DeviceFault.LOST,
    "CUDA error: an illegal memory access was encountered": DeviceFault.LOST,
    "CUDA error: an illegal instruction was encountered": DeviceFault.LOST,
    "CUDA error: misaligned address": DeviceFault.LOST,
    "CUDA error: operation not supported on global/shared address space": DeviceFault.LOST,
    "CUDA error: unspecified launch failure": DeviceFault.LOST,
    "CUDA error: the launch timed out and was terminated": DeviceFault.LOST,
    "CUDA error: uncorrectable ECC error encountered": DeviceFault.LOST,
    "CUDA error: uncorrectable NVLink error detected during the execution": DeviceFault.LOST,
    "CUDA error: hardware stack error": DeviceFault.LOST,
    "CUDA error: invalid program counter": DeviceFault.LOST,
    "CUDA error: context is destroyed": DeviceFault.LOST,
    "CUDA error: driver shutting down": DeviceFault.LOST,
    "CUDA error: unknown error": DeviceFault.LOST,
    "Unable to determine the device handle for GPU: GPU has fallen off the bus": DeviceFault.LOST,
    "the device is lost and cannot be used": DeviceFault.LOST,
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity": DeviceFault.OUT_OF_MEMORY,
    "CUDA error: out of memory": DeviceFault.OUT_OF_MEMORY,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": DeviceFault.OUT_OF_MEMORY,
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": DeviceFault.OUT_OF_MEMORY,
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory": DeviceFault.OUT_OF_MEMORY,
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes": DeviceFault.OUT_OF_MEMORY,
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)": None,
    "index out of range in self": None,
}


class TestFaults:
    @pytest.mark.parametrize(("message", "fault"), MESSAGES.items())
    def test_known_messages(self, message: str, fault: DeviceFault | None) -> None:
        assert fault_of(RuntimeError(message)) is fault

    def test_every_entry_of_the_tables_has_a_message_here(self) -> None:
        """So that nobody adds a text without the error that it was seen in."""
        for part in (*device_module.DEVICE_LOST_TEXTS, *device_module.OUT_OF_MEMORY_TEXTS):
            assert any(part in message for message in MESSAGES), part

    def test_out_of_memory_is_known_by_its_type_too(self) -> None:
        assert fault_of(torch.OutOfMemoryError("whatever it says")) is DeviceFault.OUT_OF_MEMORY

    def test_lost_device_is_not_taken_for_a_full_one(self) -> None:
        """Retrying on a lost context never ends."""
        text = "CUDA error: an illegal memory access was encountered (while reporting: out of memory)"

        assert fault_of(RuntimeError(text)) is DeviceFault.LOST


class TestDtype:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"avx2"}, torch.float32),
            ({"avx512f"}, torch.float32),
            ({"avx512f", "avx512_bf16"}, torch.bfloat16),
            ({"amx_tile", "amx_bf16"}, torch.bfloat16),
        ],
    )
    def test_auto_is_what_the_processor_multiplies_in(
        self, monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: torch.dtype
    ) -> None:
        monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags))

        assert choose_dtype("auto", torch.device("cpu")) is expected
        assert choose_dtype("auto", torch.device("cuda", 0)) is torch.bfloat16
        assert choose_dtype("float32", torch.device("cpu")) is torch.float32

    def test_unknown_is_refused_with_what_is_known(self) -> None:
        with pytest.raises(StartupError, match="dtype 'int8' is not known; known are auto, float32, bfloat16, float16"):
            choose_dtype("int8", torch.device("cpu"))

    def test_flags_are_those_of_this_processor(self) -> None:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")

        assert all(flag in known for flag in device_module._cpu_flags())


class TestDevice:
    @pytest.mark.parametrize("name", ["gpu", "cpu:x", "meta"])
    def test_unknown_is_refused(self, name: str) -> None:
        with pytest.raises(StartupError, match=f"device '{name}' is not"):
            choose_device(name)

    def test_missing_gpu_is_refused_with_the_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

        assert choose_device("cuda") == torch.device("cuda", 0)
        with pytest.raises(StartupError, match="device 'cuda:1' does not exist: this machine has 1 CUDA devices"):
            choose_device("cuda:1")

    def test_a_thread_is_bound_to_its_gpu_and_a_cpu_binds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bound: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "set_device", bound.append)
        for name in ("cpu", "cuda:1"):
            bind_thread(torch.device(name))
        assert bound == [torch.device("cuda", 1)]

    def test_report_of_a_cpu(self) -> None:
        report = report_on(torch.device("cpu"), packed=True, compiled=False)

        assert report.device == "cpu"
        assert 0 < report.memory_used_bytes < report.memory_total_bytes
        assert report.packed
