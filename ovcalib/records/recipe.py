"""The request of a run: the options of its five stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from ovcalib.errors import UnknownNameError
from ovcalib.records.base import Frozen, checked
from ovcalib.records.options import (
    CalibrationOptions,
    EvaluationOptions,
    MeasurementOptions,
    ModelOptions,
    QuantizationOptions,
)


class Recipe(Frozen):
    """Everything that a run of `quantize` needs; written beside its result, and run again with `-c`.

    Fields may also be given without their groups, as on the command line: {"model": "resnet20-cifar10", "seed": 1}.
    """

    model: ModelOptions
    calibration: CalibrationOptions = CalibrationOptions()
    quantization: QuantizationOptions = QuantizationOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    measurement: MeasurementOptions = MeasurementOptions()

    @model_validator(mode="before")
    @classmethod
    def _by_stage(cls, value: Any) -> Any:
        return by_stage(value) if isinstance(value, Mapping) else value

    def flat(self) -> dict[str, Any]:
        """The fields of all groups by name; `model` is the reference."""
        return flat_fields(self.model_dump(mode="json"))


STAGES: dict[str, type[Frozen]] = {
    "model": ModelOptions,
    "calibration": CalibrationOptions,
    "quantization": QuantizationOptions,
    "evaluation": EvaluationOptions,
    "measurement": MeasurementOptions,
}
# The stage of every field.
STAGE_OF = {name: stage for stage, kind in STAGES.items() for name in kind.model_fields}


def by_stage(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields sorted into their groups; unknown ones stay where they are, to be refused."""
    groups: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "model" and isinstance(value, str):
            groups.setdefault("model", {})["reference"] = value
        elif name in STAGES and isinstance(value, Mapping):
            groups.setdefault(name, {}).update(value)
        elif name in STAGE_OF and isinstance(groups.get(STAGE_OF[name], {}), dict):
            groups.setdefault(STAGE_OF[name], {})[name] = value
        else:
            groups[name] = value
    return groups


def flat_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields taken out of their groups; the model's reference is called `model`."""
    flat: dict[str, Any] = {}
    for name, value in by_stage(fields).items():
        flat.update(value if name in STAGES and isinstance(value, Mapping) else {name: value})
    if "reference" in flat:
        flat = {"model": flat.pop("reference"), **flat}
    return flat


def make_recipe(**fields: Any) -> Recipe:
    """A Recipe of fields that a user gave, in their groups or without.

    raises   InvalidOptionError that names the field, the value and what was expected; UnknownNameError; UsageError
    """
    flat = flat_fields(fields)
    unknown = [name for name in flat if name != "model" and name not in STAGE_OF]
    if unknown:
        raise UnknownNameError("field of a recipe", unknown[0], {"model", *STAGE_OF} - {"reference"})
    return checked(Recipe, flat, grouped=True)
