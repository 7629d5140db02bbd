"""What a command would do: the answer of --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, computed_field

from ovcalib.records.base import Frozen


class Stage(Frozen):
    """A piece of work.

    seconds   how long it takes; None where nobody can know before
    why       where the figure comes from, or why there is none
    """

    what: str
    seconds: float | None = Field(default=None, ge=0)
    why: str


class Plan(Frozen):
    """What a command would do, and what it would take. Fields of a command's own plan are facts about its work.

    recipe         the options, as request.json would hold them
    stages         the work, in its order
    memory_bytes   of the processes at their peak, as far as the work was tried; None with a reason
    gpu_memory_bytes   what torch took of the GPU at its peak, as far as the work was tried; None where it runs on none
    disk_bytes     what would be written, about; None with a reason
    writes         the output folder
    free_memory_bytes, free_gpu_memory_bytes, free_disk_bytes   what there is; None where the system does not tell
    """

    recipe: dict[str, Any]
    stages: tuple[Stage, ...]
    memory_bytes: int | None = Field(default=None, ge=0)
    memory_reason: str | None = None
    gpu_memory_bytes: int | None = Field(default=None, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)
    disk_reason: str | None = None
    writes: Path
    free_memory_bytes: int | None = None
    free_gpu_memory_bytes: int | None = None
    free_disk_bytes: int | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        """All stages together, without those of which nobody knows."""
        return sum(stage.seconds for stage in self.stages if stage.seconds is not None)


class QuantizePlan(Plan):
    """Also the settings that are decided before images are made, and what each pattern of `ignore` matches."""

    overflow_fix: str
    preset: str
    transformer: bool
    ignored: tuple[str, ...]


class SweepPlan(Plan):
    """Also the cells, and how many calibration sets they need; how many of those are in the store that was named."""

    cells: tuple[dict[str, str], ...]
    calibration_sets: int
    sets_in_the_store: int = 0
