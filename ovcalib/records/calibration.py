"""What a calibration set records about itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from ovcalib.records.base import Frozen

# The value of an option of a source.
OptionValue = bool | int | float | str | None


class SetScore(Frozen):
    """Scores of a calibration set for a model, computed without real data.

    images                  that were read
    bn_distance             from the BatchNorm statistics, mean over layers; 0 is equal, 1 a standard deviation off
    range_coverage          0..1, overlap of activation ranges with those that the statistics let expect
    diversity               between images, in standard deviations of the activations; 0 where all images are alike
    output_range            largest minus smallest output, mean over images
    output_range_distance   |ln| of its ratio to the range that the last BatchNorm layer lets expect
    """

    images: int
    bn_distance: float
    range_coverage: float
    diversity: float
    output_range: float
    output_range_distance: float


class Trial(Frozen):
    """How a source did in the comparison of `auto`.

    seconds   to make its set
    nmse      of INT8 calibrated with its images, on the images of each source in the order of the trials
    excess    how many times the least of these errors its own are, geometric mean; 1 is best on everybody's images.
              Where some images are real, over these alone
    """

    source: str
    seconds: float
    nmse: tuple[float, ...]
    excess: float


Domain = Literal["pixels", "network"]

LabelOrigin = Literal["data", "method", "pseudo"]


class Provenance(Frozen):
    """How a calibration set was made.

    source         the reference, as given
    options        every option of the source, resolved
    num_samples    images in the set
    requested      images asked for
    real           the images are photographs or the user's own, not made by a source; those of earlier versions are
                   taken for real where they came from a data set or a file
    labels         where labels come from: "data", "method", "pseudo" (the model's own argmax), or None
    parts          of a mix, each source's own; of `auto`, that of the source that was taken
    trials         of `auto`, how each candidate did
    warnings       what the user should know about the set
    score          how the set looks to the model; where it was not scored, `score_reason` says why
    """

    source: str
    options: dict[str, OptionValue]
    num_samples: int
    requested: int
    seed: int
    seconds: float
    domain: Domain
    real: bool = False
    labels: LabelOrigin | None
    licence: str | None = None
    model: str | None = None
    parts: tuple[Provenance, ...] = ()
    trials: tuple[Trial, ...] = ()
    warnings: tuple[str, ...] = ()
    score: SetScore | None = None
    score_reason: str | None = "not asked for"

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, value: Any) -> Any:
        if isinstance(value, dict) and "real" not in value and isinstance(value.get("source"), str):
            return {**value, "real": value["source"].partition(":")[0] in ("real", "npz")}
        return value


class Calibration(Provenance):
    """The calibration block of a result."""

    has_labels: bool
