"""Processor, instruction sets, memory and operating conditions of this machine."""

from __future__ import annotations

import functools
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

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
# Values of ONEDNN_MAX_CPU_ISA with which torch emulates bfloat16, which is slower than float32.
ISA_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
PACKAGES = ("openvino", "nncf", "torch", "torchvision", "onnx", "onnxruntime", "datumaro", "numpy")


def package_version(name: str) -> str | None:
    """The installed version, found without importing the package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What /proc/cpuinfo says, each field where it stands first; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


@functools.cache
def cpu_flags() -> frozenset[str]:
    return frozenset((_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split())


def cpu_vendor() -> str | None:
    """Such as "AuthenticAMD"; None where the system does not tell."""
    return _cpuinfo().get("vendor_id")


def isa() -> str | None:
    """The best instruction set for INT8 that this CPU has; None where the system does not tell."""
    return next((name for flag, name in ISA_FLAGS.items() if flag in cpu_flags()), None)


def has_bfloat16() -> bool:
    """Whether torch computes in bfloat16 here, and does not emulate it."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"}) and not bfloat16_is_withheld()


def bfloat16_is_withheld() -> bool:
    """Whether ONEDNN_MAX_CPU_ISA keeps oneDNN from instructions for bfloat16 that the CPU may have."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISA_WITHOUT_BFLOAT16


def has_fast_bfloat16() -> bool:
    """Whether networks take less time in bfloat16 than in float32.

    They do on an AMD EPYC with AVX512-BF16, but not on an Intel Xeon that has it without AMX, see
    benchmarks/results/calibration.md. With AMX this was not measured.
    """
    return has_bfloat16() and ("amx_bf16" in cpu_flags() or cpu_vendor() == "AuthenticAMD")


def available_cpus() -> int:
    """CPUs that this process may use, which in a container are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Memory of the machine; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def free_memory_bytes() -> int | None:
    """Memory that processes can still take; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


# Noise and power ------------------------------------------------------------------------------

RAPL = Path("/sys/class/powercap")
RAPL_REASON = f"no readable energy counter (RAPL) under {RAPL}"


class Ticks(NamedTuple):
    """Processor time in ticks: total, idle, and stolen by the host."""

    all: int
    idle: int
    stolen: int


def processor_ticks() -> Ticks | None:
    """Processor ticks of all CPUs since the start, or None."""
    try:
        fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    # user, nice, system, idle, waiting for a disk, interrupts, soft interrupts, stolen
    return Ticks(sum(fields), fields[3] + fields[4], fields[7]) if len(fields) == 8 else None


def busy_share(before: Ticks | None, after: Ticks | None) -> float | None:
    """Busy share of the processor time between two readings, 0..1."""
    if before is None or after is None or after.all == before.all:
        return None
    return 1 - (after.idle - before.idle) / (after.all - before.all)


def steal_share(before: Ticks | None, after: Ticks | None) -> float | None:
    """Share of the processor time between two readings that the host of a virtual machine took, 0..1."""
    if before is None or after is None or after.all == before.all:
        return None
    return (after.stolen - before.stolen) / (after.all - before.all)


def throttle_count() -> int | None:
    """How often cores were slowed down for heat since the start, or None."""
    files = list(Path("/sys/devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count"))
    try:
        return sum(int(file.read_text()) for file in files) if files else None
    except (OSError, ValueError):
        return None


def package_energy_joules() -> float | None:
    """Energy counters of all processor packages, summed; they wrap after minutes to hours. None where unreadable."""
    try:
        files = [zone / "energy_uj" for zone in RAPL.glob("intel-rapl:*") if zone.name.count(":") == 1]
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


# The conditions of a measurement --------------------------------------------------------------


def governor(cpufreq: Path = Path("/sys/devices/system/cpu/cpufreq")) -> str | None:
    """Frequency governor of the cores ("performance", "powersave", ...); None where the system does not tell."""
    try:
        found = {file.read_text().strip() for file in cpufreq.glob("policy*/scaling_governor")}
    except OSError:
        return None
    return ", ".join(sorted(found)) or None


def clock_limits_mhz(cpufreq: Path = Path("/sys/devices/system/cpu/cpufreq")) -> tuple[float, float] | None:
    """Slowest and fastest clock that the cores may take, or None."""
    try:
        low, high = (
            [int(file.read_text()) / 1000 for file in cpufreq.glob(f"policy*/scaling_{end}_freq")]
            for end in ("min", "max")
        )
    except (OSError, ValueError):
        return None
    return (min(low), max(high)) if low and high else None


def temperature_celsius(thermal: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest of the sensors that the system names, or None."""
    found = []
    for file in thermal.glob("thermal_zone*/temp"):
        try:
            found.append(int(file.read_text()) / 1000)
        except (OSError, ValueError):  # an inactive sensor
            continue
    return max(found, default=None)


def power_source(supplies: Path = Path("/sys/class/power_supply")) -> Literal["mains", "battery"] | None:
    """ "mains" or "battery"; None for a machine that has no battery, or does not tell."""
    batteries, plugged = False, False
    for supply in supplies.glob("*"):
        try:
            kind = (supply / "type").read_text().strip()
            batteries |= kind == "Battery"
            plugged |= kind != "Battery" and (supply / "online").read_text().strip() == "1"
        except OSError:
            continue
    if not batteries:
        return None
    return "mains" if plugged else "battery"
