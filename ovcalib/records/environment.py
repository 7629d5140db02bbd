"""The machine and the software of a run."""

from __future__ import annotations

from pydantic import Field

from ovcalib.records.base import Frozen


class Environment(Frozen):
    """The machine block of a result; None is what the system does not tell.

    cpu               the processor's name
    isa               its best instruction set for INT8
    cpus              that the process may use
    devices           OpenVINO devices with their full names
    versions          of Python and the packages that matter; None where one is not installed
    """

    cpu: str | None = None
    isa: str | None = None
    cpus: int
    memory_gib: float | None = None
    devices: dict[str, str] = Field(default={})
    virtual_machine: bool = False
    system: str | None = None
    versions: dict[str, str | None] = Field(default={})
