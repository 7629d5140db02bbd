"""The answer of --dry-run on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ovcalib.cli.guard import in_flags
from ovcalib.cli.options import Common
from ovcalib.cli.tables import print_table
from ovcalib.progress import duration
from ovcalib.records.plan import Plan


def show(plan: Plan, common: Common) -> int:
    """Print a plan: the options, the facts of the command's own plan, the stages, and the sums."""
    if common.as_json:
        print(plan.model_dump_json(indent=2))
        return 0
    for key, value in leaves(plan.recipe):
        print(f"{key}: {json.dumps(value)}")
    print()
    for name in type(plan).model_fields:
        if name not in Plan.model_fields:
            show_fact(name.replace("_", " "), getattr(plan, name))
    rows = [
        {"work": stage.what, "time": known(stage.seconds), "": f"({words(stage.why)})"} for stage in plan.stages
    ]  # fmt: skip
    print_table(rows)
    more = "" if all(stage.seconds is not None for stage in plan.stages) else ", and what is not known"
    print(f"\ntime:   about {duration(plan.seconds)}{more}")
    memory = size(plan.memory_bytes, plan.memory_reason)
    print(f"memory: {memory}{free(plan.free_memory_bytes)}")
    if plan.gpu_memory_bytes is not None:
        print(f"GPU:    {size(plan.gpu_memory_bytes, None)}{free(plan.free_gpu_memory_bytes)}")
    disk = size(plan.disk_bytes, plan.disk_reason)
    print(f"disk:   {disk} in {plan.writes}{free(plan.free_disk_bytes)}")
    return 0


def show_fact(name: str, value: Any) -> None:
    """A fact of a command's own plan: a table, lines, or a value."""
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        print_table(value)
        print()
    elif isinstance(value, tuple):
        for line in value:
            print(f"{name}: {line}")
    else:
        print(f"{name}: {value}")


def leaves(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by name, those of groups too."""
    for key, value in recipe.items():
        if isinstance(value, dict) and key != "options":
            yield from leaves(value)
        else:
            yield key, value


def words(text: str) -> str:
    return in_flags(text, getattr(click.get_current_context().command, "flags", {}))


def known(seconds: float | None) -> str:
    return "not known" if seconds is None else duration(seconds)


def size(count: int | None, reason: str | None) -> str:
    return f"not known ({reason})" if count is None else f"about {count / 1e6:,.1f} MB"


def free(count: int | None) -> str:
    return "" if count is None else f"; {count / 1e6:,.0f} MB are free"
