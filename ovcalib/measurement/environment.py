"""The machine and the software of this process."""

from __future__ import annotations

import platform

from ovcalib import machine
from ovcalib.records.environment import Environment
from ovcalib.runtime import core


def environment() -> Environment:
    """The machine block of a result."""
    devices = {name: str(core().get_property(name, "FULL_DEVICE_NAME")) for name in core().available_devices}
    return Environment(
        cpu=devices.get("CPU") or platform.processor() or None,
        isa=machine.isa(),
        cpus=machine.available_cpus(),
        memory_gib=machine.memory_gib(),
        devices=devices,
        virtual_machine="hypervisor" in machine.cpu_flags(),
        system=f"{platform.system()} {platform.release()}",
        versions={
            "python": platform.python_version(),
            **{name: machine.package_version(name) for name in machine.PACKAGES},
        },
    )
