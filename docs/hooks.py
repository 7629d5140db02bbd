"""Reference tables of the documentation, made from the code.

A line of a page that starts with `:::` is replaced:

    ::: ovcalib.api.quantize                     signature, description and keywords of a function
    ::: ovcalib.records.result.Agreement         description and fields of a record
    ::: source-options                           the options of every calibration source
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

# "name   what it means", as docstrings of the package list arguments and fields.
ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")
# "    name: type" with the description below, as `documented` lists keywords.
KEYWORD = re.compile(r" {4}(?P<name>\w+): (?P<type>\S.*)")

# Sources whose options are those of another one, and perhaps more.
OPTIONS_OF = {
    **dict.fromkeys(("zeroq", "dsg", "intraq", "genie", "dgh"), "bn-inversion"),
    "acq": "gdfq",
    "fdda": "gdfq",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return re.sub(r"^::: (\S+)$", lambda match: render(match[1]), markdown, flags=re.MULTILINE)


def render(name: str) -> str:
    """The Markdown that stands for a marker."""
    if name == "source-options":
        return "\n".join(source_options())
    home, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(home), attribute)
    lines = record(name, found) if inspect.isclass(found) else function(name, found)
    return "\n".join(lines)


def function(name: str, found: Any) -> Iterator[str]:
    """A function: what it takes by position, its description, and its keywords by group."""
    prose, groups = sections(inspect.getdoc(found) or "")
    keywords = {entry for rows in groups.values() for entry, _, _ in rows}
    signature = inspect.signature(found)
    own = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in keywords]
    shown = str(signature.replace(parameters=own, return_annotation=signature.empty))
    if keywords:
        shown = f"{shown.removesuffix(')')}, **options)"
    short = name.rpartition(".")[2]
    yield from (f"### `{short}`", "", "```python", f"{short}{shown}", "```", "")
    yield from paragraphs(prose)
    if groups:
        yield from ("", "| option | type | description |", "|---|---|---|")
        for group, rows in groups.items():
            yield f"| **{group}** | | |"
            for entry, kind, text in rows:
                yield f"| `{entry}` | `{one_line(kind)}` | {cell(text)} |"
    yield ""


def record(name: str, found: Any) -> Iterator[str]:
    """A record: its description, and its fields with their types."""
    prose = inspect.getdoc(found) or ""
    yield from (f"### `{name.rpartition('.')[2]}`", "")
    described: dict[str, str] = {}
    rest = []
    for line in prose.splitlines():
        match = ENTRY.match(line)
        if match:
            current = match["names"].split(", ")
            described.update(dict.fromkeys(current, match["text"]))
        elif line.startswith(" ") and described:
            for entry in current:
                described[entry] += f" {line.strip()}"
        else:
            rest.append(line)
    yield from paragraphs(rest)
    yield from ("", "| field | type | description |", "|---|---|---|")
    for entry, field in found.model_fields.items():
        kind = inspect.get_annotations(found).get(entry, field.annotation)
        yield f"| `{entry}` | `{one_line(str(kind))}` | {cell(described.get(entry, ''))} |"
    yield ""


def source_options() -> Iterator[str]:
    """The options of every calibration source, with their defaults."""
    import ovcalib

    for source, entry in ovcalib.sources().items():
        yield from (f"### `{source}`", "", str(entry["summary"]), "")
        if not entry["options"]:
            yield from ("No options.", "")
            continue
        defaults = " ".join(f"{key}={value}" for key, value in entry["options"].items())
        yield from (f"Defaults: `{defaults}`", "")
        if base := OPTIONS_OF.get(source):
            shared = ovcalib.sources()[base]["help"].splitlines()
            lines = [line for line in entry["help"].splitlines() if line.strip() and line not in shared]
            own = inspect.cleandoc("\n".join(["", *lines]))
            yield from (f"The options are those of `{base}`{', and:' if own else '.'}", "")
            yield from ("```text", own, "```", "") if own else ()
        else:
            yield from ("```text", entry["help"], "```", "")


def sections(doc: str) -> tuple[list[str], dict[str, list[tuple[str, str, str]]]]:
    """The prose of a docstring, and the keywords that `documented` appends to it, by group."""
    prose: list[str] = []
    groups: dict[str, list[tuple[str, str, str]]] = {}
    lines = iter(doc.splitlines())
    for line in lines:
        heading = re.fullmatch(r"(\w+):", line)
        keyword = KEYWORD.fullmatch(line)
        if heading:
            groups[heading[1]] = []
        elif keyword and groups:
            groups[list(groups)[-1]].append((keyword["name"], keyword["type"], next(lines).strip()))
        elif not groups:
            prose.append(line)
    return prose, groups


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Prose as Markdown; tables of names become lists."""
    for line in lines:
        match = ENTRY.match(line)
        yield f"- `{match['names']}`: {match['text']}" if match else line.strip()


def one_line(text: str) -> str:
    """Text as one line, for code in a table, where a bar needs no escape."""
    return " ".join(text.split())


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return one_line(text).replace("|", "&#124;")
