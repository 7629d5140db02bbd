"""JSON Schemas of the files that ovcalib writes; `python -m ovcalib.report.schema` writes them anew."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ovcalib.sweep import Sweep, SweepRecipe
from ovcalib.types import Benchmark, Diagnosis, Recipe, Result

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
    """The schema that the types say."""
    made = SCHEMAS[name].model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


if __name__ == "__main__":
    for name in SCHEMAS:
        path = Path(__file__).with_name(f"{name}.schema.json")
        path.write_text(json.dumps(current_schema(name), indent=2) + "\n")
