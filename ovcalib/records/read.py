"""Reading the JSON files that ovcalib wrote; those that are damaged or do not belong together are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ovcalib.errors import UsageError, brief, excerpt
from ovcalib.records.base import path as path_of
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.options import STEERING_FIELDS, fields_of
from ovcalib.records.result import Result

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
MAX_JSON_VALUES = 1_000_000
MAX_YAML_BYTES = 2**18
MAX_YAML_VALUES = 20_000
_SURROGATE = re.compile("[\ud800-\udfff]")

Record = Result | Benchmark | Diagnosis
KINDS: dict[str, type[Record]] = {"result.json": Result, "benchmark.json": Benchmark, "diagnosis.json": Diagnosis}


@dataclass(frozen=True)
class Source:
    """A record and the file that it was read from."""

    path: Path
    record: Record

    @property
    def folder(self) -> Path:
        return self.path.parent


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file: plain data of bounded size, depth and numbers.

    raises   UsageError that names the file and the place
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(
                f"{str(path)!r} has {path.stat().st_size} bytes; what ovcalib writes has at most {MAX_JSON_BYTES}."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror or excerpt(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{str(path)!r} is damaged: {excerpt(error)}. It may have been cut off while it was copied; copy it again."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} holds no object. Expected what ovcalib wrote.")
    refuse_strange_data(content, f"{str(path)!r}")
    return content


def refuse_strange_data(content: Any, origin: str) -> None:
    """Refuse what no record can hold, and what would break whatever prints or copies it.

    raises   UsageError that names the place: keys that are no text, numbers that are not finite or of more than 64
             bits, text that no file can hold, and containers that are too deep
    """
    values = 0
    stack: list[tuple[Any, tuple[int | str, ...]]] = [({"": content}, ())]
    while stack:
        container, place = stack.pop()
        values += len(container)
        if len(place) > MAX_JSON_DEPTH or values > MAX_JSON_VALUES:
            raise UsageError(f"{origin}: `{excerpt(path_of(place))}` is nested too deep, or holds too much.")
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            reason = _strange(value)
            if reason is not None:
                where = excerpt(path_of(tuple(part for part in (*place, key) if part != "")))
                raise UsageError(f"{origin}: `{where}` {reason}. Expected plain data.")
            if isinstance(value, dict | list):
                stack.append((value, (*place, key) if key != "" else place))


def _strange(value: Any) -> str | None:
    match value:
        case None | bool():
            return None
        case int():
            return None if abs(value) < 2**63 else "is a whole number of more than 64 bits"
        case float():
            return None if math.isfinite(value) else f"is {value}"
        case str():
            return "is a text with half a character" if _SURROGATE.search(value) else None
        case dict():
            keys = [key for key in value if not isinstance(key, str) or _SURROGATE.search(key)]
            return f"has the key {excerpt(keys[0])!r}, which is no text" if keys else None
        case list():
            return None
        case _:
            return f"is a {type(value).__name__}"


def read_records(paths: Sequence[Path]) -> list[Source]:
    """The records of files, or of folders that hold some.

    raises   UsageError for what is missing, damaged or of another schema version
    """
    found: dict[Path, Source] = {}
    for path in paths:
        files = [path] if path.is_file() else [path / name for name in KINDS if (path / name).is_file()]
        if not files:
            raise UsageError(
                f"{str(path)!r} holds no result. Expected a folder that ovcalib wrote, or one of {', '.join(KINDS)}."
            )
        for file in files:
            found[file.resolve()] = Source(file, read_record(file))
    return list(found.values())


def read_record(path: Path) -> Record:
    """One record, checked against its type."""
    if path.name not in KINDS:
        raise UsageError(f"{str(path)!r} is no result file. Expected {', '.join(KINDS)}, or a folder with one.")
    kind = KINDS[path.name]
    content = read_json(path)
    expected = kind.model_fields["schema_version"].default
    if content.get("schema_version") != expected:
        raise UsageError(
            f"{str(path)!r} has schema_version {brief(content.get('schema_version'))}, but this ovcalib reads "
            f"{expected}. It was written by ovcalib {excerpt(content.get('ovcalib', 'unknown'))}: use that version, or "
            "make it again."
        )
    if kind is Result and isinstance(content.get("recipe"), dict):
        content["recipe"] = without_idle_fields(content["recipe"])
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = excerpt(".".join(map(str, first["loc"])))
        raise UsageError(f"{str(path)!r} does not keep its schema at {where!r}: {excerpt(first['msg'])}.") from error


def without_idle_fields(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the fields that its algorithm does not take, which earlier versions wrote."""
    counting = fields_of(str(recipe.get("mode", "accuracy-aware")), recipe)
    return {name: value for name, value in recipe.items() if name in counting or name not in STEERING_FIELDS}


def refuse_other_machines(results: Sequence[Source]) -> None:
    """Refuse to compare latencies of different machines.

    raises   UsageError with the machines
    """
    machines = {}
    for source in results:
        assert isinstance(source.record, Result)
        if source.record.benchmark is not None:
            environment = source.record.environment
            machines[f"{environment.cpu}, {environment.cpus} CPUs"] = source.path
    if len(machines) > 1:
        shown = "; ".join(f"{path}: {name}" for name, path in machines.items())
        raise UsageError(
            f"The results come from different machines, so their latencies cannot be compared ({shown}). "
            "Measure again on one machine, or pass `latency=False` to compare the rest."
        )


def refuse_other_model(result: Result, other: Benchmark | Diagnosis, path: Path) -> None:
    """Refuse a benchmark or diagnosis of another INT8 model than that of the result."""
    own = result.files.get("int8/model.bin")
    hashes = [r.sha256 for r in other.runs] if isinstance(other, Benchmark) else [other.int8_sha256]
    if own not in hashes:
        raise UsageError(
            f"{str(path)!r} is about another INT8 model than the result (weights {', '.join(h[:12] for h in hashes)}, "
            f"expected {str(own)[:12]}). Run it again on int8/model.xml of this result."
        )


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, YAML or JSON; result.json is understood as well.

    raises   UsageError, also for aliases that stand for too much
    """
    content = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    if not isinstance(content, dict):
        raise UsageError(f"The recipe {str(path)!r} holds no fields. Expected lines such as `model: resnet20-cifar10`.")
    return without_idle_fields(content)


def _read_yaml(path: Path) -> Any:
    import yaml

    name = f"The recipe {str(path)!r}"
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UsageError(f"{name} has {path.stat().st_size} bytes. Expected at most {MAX_YAML_BYTES}.")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        if _expanded(node, {}) > MAX_YAML_VALUES:
            raise UsageError(f"{name}: its aliases stand for more than {MAX_YAML_VALUES} values.")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or excerpt(error)}.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError, AttributeError) as error:
        # PyYAML raises unrelated types for scalars that are not what their tag says.
        raise UsageError(f"{name} is not YAML: {excerpt(error)}.") from error
    refuse_strange_data(content, name)
    return content


def _expanded(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for when every alias is written out; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = MAX_YAML_VALUES + 1  # for a node within itself
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]
