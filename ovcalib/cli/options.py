"""Commands whose options are made from the fields of option groups."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import click
from pydantic.fields import FieldInfo

from ovcalib.cli.completion import WORDS, completer, literals
from ovcalib.cli.guard import guarded, in_flags
from ovcalib.errors import UsageError
from ovcalib.progress import Progress
from ovcalib.records.base import Frozen, Shown, flags_of, shown
from ovcalib.records.options import ModelOptions
from ovcalib.rundir import RESUME, resume_folder

COMMON = "Common"


@dataclass(frozen=True)
class Common:
    """Options that commands have in common: output folder, output format, whether to work at all, and progress."""

    output: Path | None
    overwrite: bool
    as_json: bool
    dry_run: bool
    progress: Progress

    def target(self, description: str) -> Path:
        """The output folder: the one asked for, or runs/0007-description with the next free number."""
        return self.output or next_folder(Path("runs"), description, take_up=not self.dry_run)


class Option(click.Option):
    """An option with the heading of its section in the help."""

    def __init__(self, *args: Any, heading: str = COMMON, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command whose help lists options by heading, and whose errors name flags."""

    flags: Mapping[str, str] = {}

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for entry in self.get_params(context):
            record = None if isinstance(entry, click.Argument) else entry.get_help_record(context)
            if record is not None:
                rows.setdefault(getattr(entry, "heading", COMMON), []).append(record)
        for heading, records in sorted(rows.items(), key=lambda item: item[0] == COMMON):
            with formatter.section(heading):
                formatter.write_dl(records, col_max=26)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, context: click.Context) -> Any:
        return guarded(lambda: super(Command, self).invoke(context), self.flags, bool(context.params.get("debug")))


def add_command(
    group: click.Group,
    function: Callable[[dict[str, Any], Common], int | None],
    kinds: Sequence[type[Frozen]] = (),
    *,
    name: str | None = None,
    renamed: Mapping[str, Shown] | None = None,
    leave_out: Iterable[str] = (),
    extra: Sequence[click.Parameter] = (),
    common: Iterable[Literal["output", "overwrite", "dry-run", "json"]] = ("output", "overwrite", "json"),
) -> None:
    """Add a command to a group.

    function    takes the values that the user gave, by field (`reference` as `model`), and what is common to commands;
                its docstring is the help, with what fields given by position are, and it returns an exit code or None
    renamed     other names and metavars for some of the fields
    leave_out   fields that the command does not have
    extra       further parameters
    """
    parameters: list[click.Parameter] = []
    own_output = any("output" in kind.model_fields for kind in kinds)
    flags = {name: f"--{name}" for name in ("overwrite", "latency", "jobs", "engine", "store", "resume")} | {
        "output": "-o"
    }
    required: list[str] = []
    text = inspect.cleandoc(function.__doc__ or "")
    for kind in kinds:
        for field_name, field in kind.model_fields.items():
            if field_name in leave_out:
                continue
            look = (renamed or {}).get(field_name) or shown(kind, field_name)
            key = "model" if field_name == "reference" and kind is ModelOptions else field_name
            parameters.append(parameter(kind, field_name, field, look))
            if field.is_required():
                required.append(key)
            if isinstance(parameters[-1], click.Argument):
                text += f"\n\n{parameters[-1].metavar}: {field.description}"
            flags[key] = flags[field_name] = (look.flags or flags_of(kind, field_name))[-1]

    def run(**values: Any) -> int | None:
        from ovcalib.progress import Terminal

        shared = Common(
            output=None if own_output else values.pop("output", None),
            overwrite=bool(values.pop("overwrite", False)),
            as_json=bool(values.pop("as_json", False)),
            dry_run=bool(values.pop("dry_run", False)),
            progress=Terminal(lambda text: in_flags(text, flags)),
        )
        values.pop("debug")
        given = {key: value for key, value in values.items() if value is not None and value != ()}
        if "options" in given:
            given["options"] = key_values(given["options"])
        if "reference" in given and ModelOptions in kinds:
            given = {"model": given.pop("reference"), **given}
        missing = [key for key in required if key not in given]
        if missing and "recipe" not in given:
            raise UsageError(f"`{missing[0]}` is missing.")
        return function(given, shared)

    command = Command(
        name or function.__name__.replace("_", "-"),
        callback=run,
        help=in_flags(text, flags),
        params=[*without_backquotes(parameters, flags), *extra, *common_options(common)],
        no_args_is_help=bool(required),
    )
    command.flags = flags
    group.add_command(command)


def parameter(kind: type[Frozen], name: str, field: FieldInfo, look: Shown) -> click.Parameter:
    """The parameter of a field; values stay text, which the field converts."""
    flags = look.flags or flags_of(kind, name)
    complete = completer(name, field.annotation)
    if not flags[0].startswith("-"):
        many = flags[0].endswith("...")
        return click.Argument(
            [name], required=False, nargs=-1 if many else 1, metavar=flags[0], shell_complete=complete
        )
    annotations = {field.annotation, *get_args(field.annotation)}
    heading = (kind.__doc__ or "").strip()
    text = field.description or ""
    if bool in annotations:
        negative = f"{flags[-1]}/--no-{flags[-1].removeprefix('--')}" if field.default else flags[-1]
        return Option([negative, name], is_flag=True, default=None, help=text, heading=heading)
    default = look.default if look.default is not None else field.get_default(call_default_factory=True)
    if not field.is_required() and default is not None:
        text += f"  [default: {default}]"
    return Option(
        [*flags, name], multiple=look.repeat, metavar=look.metavar or metavar(field.annotation), help=text,
        heading=heading, shell_complete=complete,
    )  # fmt: skip


def metavar(annotation: Any) -> str:
    """The placeholder of a value in the help: its choices, N, NUMBER, FILE or TEXT."""
    choices = literals(annotation)
    if choices:
        return "|".join(choices)
    kinds = {annotation, *get_args(annotation)}
    return next((name for kind, name in ((int, "N"), (float, "NUMBER"), (Path, "FILE")) if kind in kinds), "TEXT")


def common_options(wanted: Iterable[str]) -> list[click.Parameter]:
    every = {
        "output": Option(
            ["-o", "--output", "output"], type=click.Path(path_type=Path), metavar="DIR",
            help="Output folder.  [default: runs/NUMBER-...]",
        ),
        "overwrite": Option(["--overwrite"], is_flag=True, help="Replace an earlier result in the output folder."),
        "dry-run": Option(
            ["--dry-run"], is_flag=True,
            help="Show what would be done, and the time, memory and disk that it takes; and stop.",
        ),
        "json": Option(["--json", "as_json"], is_flag=True, help="Print the result object alone."),
    }  # fmt: skip
    return [*(every[name] for name in wanted), Option(["--debug"], is_flag=True, help="Show tracebacks.")]


def without_backquotes(parameters: Sequence[click.Parameter], flags: Mapping[str, str]) -> Sequence[click.Parameter]:
    """Parameters whose help names flags in place of arguments."""
    for entry in parameters:
        if isinstance(entry, click.Option) and entry.help:
            entry.help = in_flags(entry.help, flags)
    return parameters


def key_values(pairs: Sequence[str]) -> dict[str, str]:
    """-O key=value, repeated."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"-O {pair}: expected KEY=VALUE.")
        result[key] = value
    return result


def next_folder(root: Path, description: str, take_up: bool = True) -> Path:
    """runs/0007-description, with the next free number.

    take_up   an interrupted run of the same description gave up its number; its state moves on to the new one
    """
    taken = [int(m[1]) for p in (root.iterdir() if root.is_dir() else ()) if (m := re.match(r"(\d{4,})-", p.name))]
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(description).name).strip("-.")
    target = root / f"{max(taken, default=0) + 1:04}-{plain}"
    own = re.compile(rf"\.\d{{4,}}-{re.escape(plain + RESUME)}")
    kept = [path for path in root.glob(f".*{RESUME}") if own.fullmatch(path.name)]
    if take_up and kept and resume_folder(target) not in kept:
        max(kept, key=lambda path: path.stat().st_mtime).rename(resume_folder(target))
    return target
