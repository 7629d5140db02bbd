"""`ovcalib sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ovcalib.cli.options import Common, Option, add_command
from ovcalib.cli.plan import show
from ovcalib.errors import Interrupted, OvcalibError


def sweep(given: dict[str, Any], common: Common) -> int:
    """Quantize every model with every source, mode and seed.

    The same command continues after an interruption.

    RECIPE.yaml names models, sources, modes, seeds and eval; see ovcalib/records/sweep-recipe.schema.json.
    """
    from ovcalib import api

    file = given["recipe"]
    target = common.target(f"sweep-{file.stem}")
    if common.dry_run:
        from ovcalib.rehearsal import plan_sweep

        return show(plan_sweep(file, target, given.get("store")), common)
    try:
        found = api.sweep(
            file, target, jobs=given.get("jobs", 1), engine=given.get("engine", "local"), store=given.get("store"),
            resume=bool(given.get("resume")), progress=common.progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        more = () if common.output else ("-o", str(target))
        raise Interrupted(f"finished cells are kept in {str(target)!r}", more) from None
    print(found.model_dump_json(indent=2) if common.as_json else (target / "report.md").read_text())
    if not common.as_json:
        print(f"wrote {target / 'report.html' if len(found.failed) < len(found.cells) else target / 'report.md'}")
    if found.failed:
        print(
            f"error: {len(found.failed)} of {len(found.cells)} cells failed; the same sweep tries them again",
            file=sys.stderr,
        )
        return max(cell.exit_code or OvcalibError.exit_code for cell in found.failed)
    return 0


def add_to(app: click.Group) -> None:
    add_command(
        app,
        sweep,
        extra=[
            click.Argument(["recipe"], metavar="RECIPE.yaml", type=click.Path(path_type=Path)),
            Option(
                ["--jobs"],
                type=click.IntRange(min=1),
                metavar="N",
                help="Cells at once, on shares of the CPUs.  [default: 1]",
            ),
            Option(
                ["--engine"],
                metavar="local|dask:ADDRESS",
                help="Processes here, or workers of a cluster.  [default: local]",
            ),
            Option(
                ["--store"],
                metavar="FOLDER|URL",
                help="Calibration sets to share with other sweeps and machines: a folder, or s3://bucket/sets "
                "and whatever else fsspec opens.",
            ),
            Option(
                ["--resume"],
                is_flag=True,
                default=None,
                help="Go on in the folder of another recipe; cells that both have are kept.",
            ),
        ],
        common=("output", "dry-run", "json"),
    )
