"""Templates, and writing report.<format>.

A page is one file that loads nothing: style, script, charts and images are inside. Templates escape everything.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovcalib import __version__
from ovcalib.records.environment import Environment
from ovcalib.rundir import write_atomically

FORMATS = ("html", "md", "csv")

Writers = Mapping[str, Callable[[], str]]


@functools.cache
def _templates() -> Any:
    import jinja2

    def load(name: str) -> str | None:
        file = importlib.resources.files(__package__).joinpath("templates", name)
        return file.read_text() if file.is_file() else None

    return jinja2.Environment(
        autoescape=True, loader=jinja2.FunctionLoader(load), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def render(template: str, **context: Any) -> str:
    from markupsafe import Markup

    files = importlib.resources.files(__package__).joinpath("templates")
    own = {
        "style": Markup(files.joinpath("style.css").read_text()),
        "script": Markup(files.joinpath("sort.js").read_text()),
        "version": __version__,
    }
    return str(_templates().get_template(template).render(**{"created": None, "wide": False, **own, **context}))


def write(folder: Path, writers: Writers, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write report.<format> into a folder, each whole or not at all."""
    written = []
    for form in formats:
        path = folder / f"report.{form}"
        content = writers[form]()
        write_atomically(path, lambda partial, content=content: partial.write_text(content))  # type: ignore[misc]
        written.append(path)
    return written


def tile(name: str, value: str, note: str) -> dict[str, str]:
    # A number keeps its unit on its line.
    return {"name": name, "value": value.replace(" %", "\u00a0%").replace(" M", "\u00a0M"), "note": note}


def machine_facts(environment: Environment) -> list[tuple[str, str]]:
    versions = environment.versions
    return [
        ("processor", str(environment.cpu or "unknown")),
        ("instruction set", str(environment.isa or "unknown")),
        ("CPUs", str(environment.cpus)),
        ("memory", f"{environment.memory_gib:g} GiB" if environment.memory_gib else "unknown"),
        ("virtual machine", "yes" if environment.virtual_machine else "no"),
        ("system", str(environment.system)),
        ("devices", ", ".join(f"{k}: {v}" for k, v in environment.devices.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]


def data_uri(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
