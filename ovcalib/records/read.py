"""Reading the JSON files that ovcalib wrote; those that are damaged or do not belong together are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ovcalib.errors import UsageError
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.options import STEERING_FIELDS
from ovcalib.records.result import Result

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
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{str(path)!r} is damaged: {error}. It may have been cut off while it was copied; copy it again."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} holds no object. Expected what ovcalib wrote.")
    expected = kind.model_fields["schema_version"].default
    if content.get("schema_version") != expected:
        raise UsageError(
            f"{str(path)!r} has schema_version {content.get('schema_version')!r}, but this ovcalib reads {expected}. "
            f"It was written by ovcalib {content.get('ovcalib', 'unknown')}: use that version, or make it again."
        )
    if kind is Result and isinstance(content.get("recipe"), dict):
        content["recipe"] = without_idle_fields(content["recipe"])
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{str(path)!r} does not keep its schema at {where!r}: {first['msg']}.") from error


def without_idle_fields(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the fields that its algorithm does not take, which earlier versions wrote."""
    if recipe.get("mode", "accuracy-aware") == "default":
        return {name: value for name, value in recipe.items() if name not in STEERING_FIELDS}
    return recipe


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
    """The fields of a recipe file; result.json is understood as well."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {str(path)!r} is not YAML: {str(error).splitlines()[0]}.") from error
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    if not isinstance(content, dict):
        raise UsageError(f"The recipe {str(path)!r} holds no fields. Expected lines such as `model: resnet20-cifar10`.")
    return without_idle_fields(content)
