"""What this machine is: processor, instruction sets, devices, versions."""

from __future__ import annotations

import functools
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Flags of /proc/cpuinfo that matter for INT8, best first.
ISA_FLAGS = {
    "amx_int8": "AMX-INT8",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512",
    "avx2": "AVX2",
    "sse4_1": "SSE4.1",
    "asimddp": "NEON-DOTPROD",
    "asimd": "NEON",
}
PACKAGES = ("openvino", "nncf", "torch", "torchvision", "onnx", "onnxruntime", "datumaro", "numpy")


def package_version(name: str) -> str | None:
    """The installed version, found without importing the package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def isa() -> str | None:
    """The best instruction set for INT8 that this CPU has; None where the system does not tell."""
    return next((name for flag, name in ISA_FLAGS.items() if flag in cpu_flags()), None)


def has_int8_dot_product() -> bool:
    """Whether INT8 products are summed in 32 bits, so that full-range weights cannot overflow."""
    return bool(cpu_flags() & {"amx_int8", "avx512_vnni", "avx_vnni", "asimddp"})


def available_cpus() -> int:
    """CPUs that this process may use, which in a container are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """The machine block of a result."""
    from ovcalib.runtime import core

    devices = {name: str(core().get_property(name, "FULL_DEVICE_NAME")) for name in core().available_devices}
    return {
        "cpu": devices.get("CPU") or platform.processor() or None,
        "isa": isa(),
        "cpus": available_cpus(),
        "devices": devices,
        "virtual_machine": "hypervisor" in cpu_flags(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
    }


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
