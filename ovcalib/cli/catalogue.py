"""`ovcalib models`, `sources` and `doctor`."""

from __future__ import annotations

import json
from typing import Any

import click

from ovcalib.cli.completion import source_names
from ovcalib.cli.options import Common, Option, add_command
from ovcalib.cli.tables import print_table
from ovcalib.errors import UnknownNameError, UsageError, printable


def models(given: dict[str, Any], common: Common) -> None:
    """List the built-in models and their weights.

    PATTERN is a wildcard, such as 'resnet*-cifar10'.
    """
    from ovcalib import api
    from ovcalib.reports.verdict import points

    pattern = given.get("pattern", "*")
    found = api.models(pattern)
    if not found:
        raise UsageError(f"No built-in model matches {pattern!r}. `ovcalib models` lists them all.")
    if common.as_json:
        print(json.dumps([spec.model_dump(mode="json") for spec in found], indent=2))
        return
    print_table(
        [
            {
                "model": spec.name,
                "input": "x".join(map(str, spec.input_shape)),
                "classes": str(spec.num_classes),
                "weights": spec.weights.origin,
                "top-1": points(spec.weights.top1),
                "of": spec.weights.source or "-",
                "licence": spec.weights.licence or "-",
            }
            for spec in found
        ]
    )


def sources(given: dict[str, Any], common: Common) -> None:
    """List the calibration sources, or the options of one."""
    from ovcalib import api

    table, name = api.sources(), given.get("name")
    if name is not None and name not in table:
        raise UnknownNameError("calibration source", name, table)
    if common.as_json:
        print(json.dumps(table if name is None else table[name], indent=2))
    elif name is None:
        print_table([{"source": entry["reference"], "what it is": entry["summary"]} for entry in table.values()])
    else:
        entry = table[name]
        print(f"{entry['reference']}: {entry['summary']}\n")
        for key, default in entry["options"].items():
            print(f"  -O {key}={default}")
        print(f"\n{entry['help']}" if entry["help"] else "no options")


def doctor(given: dict[str, Any], common: Common) -> None:
    """Show what this machine has, and what is missing for what.

    Devices, instruction sets, versions of packages, caches, and what killed runs have left here and in runs/.
    """
    from ovcalib.measurement.doctor import doctor as examine
    from ovcalib.measurement.doctor import lines, places
    from ovcalib.rundir import clean, leftovers

    if given.get("clean"):
        found = leftovers(places())
        clean(found)
        removed = [str(entry.path) for entry in found]
        if common.as_json:
            print(json.dumps({"removed": removed}, indent=2))
        else:
            print(printable("\n".join([*(f"removed {path}" for path in removed), f"{len(removed)} removed"])))
        return
    state = examine()
    print(json.dumps(state, indent=2) if common.as_json else "\n".join(lines(state)))


def add_to(app: click.Group) -> None:
    pattern = click.Argument(["pattern"], required=False, metavar="[PATTERN]")
    name = click.Argument(["name"], required=False, metavar="[SOURCE]", shell_complete=source_names)
    add_command(app, models, extra=[pattern], common=("json",))
    add_command(app, sources, extra=[name], common=("json",))
    clean = Option(
        ["--clean"], is_flag=True, default=None,
        help="Remove what killed runs have left here and in runs/, with what they could be resumed from, and stop.",
    )  # fmt: skip
    add_command(app, doctor, extra=[clean], common=("json",))
