"""JSON Schemas of the files that ovcalib writes. `python -m ovcalib.records.schema` derives them from the records."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.documented import keywords_module
from ovcalib.records.recipe import Recipe
from ovcalib.records.result import Result
from ovcalib.records.sweep import Sweep, SweepRecipe

SCHEMAS: dict[str, type[BaseModel]] = {
    "result": Result,
    "recipe": Recipe,
    "benchmark": Benchmark,
    "diagnosis": Diagnosis,
    "sweep": Sweep,
    "sweep-recipe": SweepRecipe,
}


def schema(name: str) -> dict[str, Any]:
    """The schema of "result", "benchmark", "diagnosis" or "sweep" (the .json of that name), or of the request.json of a
    single run ("recipe") or of a sweep ("sweep-recipe")."""
    text = importlib.resources.files(__package__).joinpath(f"{name}.schema.json").read_text()
    return json.loads(text)  # type: ignore[no-any-return]


def current_schema(name: str) -> dict[str, Any]:
    """The schema of the current types."""
    made = SCHEMAS[name].model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def write_all() -> None:
    """Write the schemas and ovcalib/keywords.py anew."""
    here = Path(__file__).parent
    for name in SCHEMAS:
        (here / f"{name}.schema.json").write_text(json.dumps(current_schema(name), indent=2) + "\n")
    (here.parent / "keywords.py").write_text(keywords_module())


if __name__ == "__main__":
    write_all()
