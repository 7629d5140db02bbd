"""Devices, instruction sets and packages of this machine, and what is missing for which feature."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ovcalib import machine
from ovcalib.data.sets import cache_dir
from ovcalib.errors import printable
from ovcalib.kernels import host_kernels
from ovcalib.measurement.environment import environment
from ovcalib.quantization.settings import resolve_overflow_fix
from ovcalib.records.result import Kernels
from ovcalib.rundir import folder_bytes, leftovers

# Feature -> (packages it needs, the extra that brings them).
FEATURES = {
    "quantize a PyTorch model": (("torch", "nncf", "onnx", "onnxscript"), "quantize"),
    "quantize FILE.onnx or FILE.xml": (("nncf",), "quantize"),
    "torchvision: models": (("torchvision",), "quantize"),
    "timm: models": (("timm",), "timm"),
    "datumaro: data sets": (("datumaro",), "quantize"),
    "evaluate, benchmark, diagnose, report": ((), ""),
    "check ONNX files with another engine": (("onnxruntime",), "parity"),
}
# Devices that OpenVINO knows, and what makes them appear.
DRIVERS = {
    "GPU": "an Intel GPU and its compute runtime (Debian: intel-opencl-icd; the user in the group `render`)",
    "NPU": "an Intel NPU and its driver (linux-npu-driver), kernel 6.6 or later",
}
INSTRUCTION_SETS = {
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX-INT8": ("amx_int8",),
    "BF16": ("avx512_bf16", "amx_bf16"),
    "FP16": ("avx512_fp16", "amx_fp16"),
}
SUMS: dict[Kernels, str] = {
    "vnni": "INT8 products are summed in 32 bits and do not saturate",
    "avx2": "INT8 products are summed in 16 bits, and full-range weights saturate",
}


def doctor() -> dict[str, Any]:
    """Devices with their capabilities, instruction sets, versions, missing parts, caches with their sizes."""
    from ovcalib.runtime import core

    found: dict[str, Any] = environment().model_dump()
    devices = core().available_devices
    found["capabilities"] = {name: list(core().get_property(name, "OPTIMIZATION_CAPABILITIES")) for name in devices}
    found["architecture"] = {name: _property(name, "DEVICE_ARCHITECTURE") for name in devices}
    found["absent_devices"] = {
        name: f"needs {need}" for name, need in DRIVERS.items() if name not in {d.split(".")[0] for d in devices}
    }
    flags = machine.cpu_flags()
    found["instruction_sets"] = {name: bool(flags & set(any_of)) for name, any_of in INSTRUCTION_SETS.items()}
    found["int8"] = int8_here()
    found["features"] = {name: _feature(packages, extra) for name, (packages, extra) in FEATURES.items()}
    energy = machine.package_energy_joules() is not None
    found["features"]["energy of a benchmark"] = {
        "ready": energy,
        "missing": [] if energy else [machine.RAPL_REASON],
        "how": None if energy else "run on the hardware itself, with read access to the counters",
    }
    found["missing"] = {
        package: f"pip install 'ovcalib[{extra}]'"
        for packages, extra in FEATURES.values()
        for package in packages
        if machine.package_version(package) is None
    }
    found["leftovers"] = [
        {"path": str(entry.path), "bytes": folder_bytes(entry.path), "resumable": entry.resumable}
        for entry in leftovers(places())
    ]
    found["caches"] = {name: {"path": str(path), "bytes": folder_bytes(path)} for name, path in caches().items()}
    return found


def int8_here() -> str:
    """What INT8 does on this CPU, by the sums that its kernels make, and what ovcalib makes of that."""
    kernels, isa = host_kernels(), machine.isa() or "this CPU"
    if kernels == "avx2" and not machine.cpu_flags() & set(INSTRUCTION_SETS["VNNI"]):
        isa += " without VNNI"
    share = "half" if resolve_overflow_fix("auto", "host") == "enable" else "the whole"
    return f"{isa}: {SUMS[kernels]}; for this CPU (--deploy-isa host) ovcalib uses {share} of the weight range"


def _property(device: str, name: str) -> str | None:
    from ovcalib.runtime import core

    try:
        return str(core().get_property(device, name))
    except RuntimeError:
        return None


def _feature(packages: tuple[str, ...], extra: str) -> dict[str, Any]:
    missing = [name for name in packages if machine.package_version(name) is None]
    return {"ready": not missing, "missing": missing, "how": f"pip install 'ovcalib[{extra}]'" if missing else None}


def caches() -> dict[str, Path]:
    """Folders in which ovcalib and the libraries behind it keep what they downloaded."""
    home = Path.home()
    return {
        "ovcalib": cache_dir(),
        "torch": Path(os.environ.get("TORCH_HOME", home / ".cache" / "torch")),
        "huggingface": Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")),
    }


def places() -> list[Path]:
    """Where runs leave things when they are killed: beside results in the current folder and in runs/, and caches."""
    here, cache = Path(), cache_dir()
    sweeps = [*here.glob("*/sets"), *here.glob("*/cells"), *here.glob("runs/*/sets"), *here.glob("runs/*/cells")]
    return [here, here / "runs", *sweeps, cache, cache / "weights", cache / "stylegan2-ada"]


def lines(found: dict[str, Any]) -> list[str]:
    """The findings for the terminal."""
    shown = []
    for device, name in found["devices"].items():
        architecture = found["architecture"][device]
        about = f" ({architecture})" if architecture else ""
        shown.append(f"{device:12}{name}{about}: {' '.join(found['capabilities'][device])}")
    shown += [f"{device:12}absent; {need}" for device, need in found["absent_devices"].items()]
    sets = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["instruction_sets"].items())
    machine_kind = ", virtual machine" if found["virtual_machine"] else ""
    shown.append(f"{'ISA':12}{found['isa'] or 'unknown'} ({sets}), {found['cpus']} CPUs{machine_kind}")
    shown.append(f"{'INT8':12}{found['int8']}")
    shown += [f"{package:12}{version or 'not installed'}" for package, version in found["versions"].items()]
    shown.append("")
    for name, feature in found["features"].items():
        state = "ready" if feature["ready"] else f"missing: {', '.join(feature['missing'])}; {feature['how']}"
        shown.append(f"{name + ':':40}{state}")
    shown.append("")
    for entry in found["leftovers"]:
        note = "the command that made it goes on from there" if entry["resumable"] else "of a run that was killed"
        shown.append(f"left over    {printable(entry['path'])}, {entry['bytes'] / 1e6:.1f} MB, {note}")
    if found["leftovers"]:
        shown += ["             `ovcalib doctor --clean` removes these", ""]
    shown += [f"cache {name:12}{c['path']}, {c['bytes'] / 1e6:.1f} MB" for name, c in found["caches"].items()]
    return shown
