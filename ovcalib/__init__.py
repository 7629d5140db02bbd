"""INT8 for OpenVINO without your data.

    import ovcalib
    result = ovcalib.quantize("resnet20-cifar10", output="out")
    print(result.record.agreement)

Names are imported when they are first used, so `import ovcalib` is fast.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# OpenVINO and NNCF send usage events as soon as they are imported, unless this package is missing. ovcalib hides it, so
# that nothing is sent.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from ovcalib.api import benchmark as benchmark
    from ovcalib.api import convert as convert
    from ovcalib.api import diagnose as diagnose
    from ovcalib.api import evaluate as evaluate
    from ovcalib.api import generate as generate
    from ovcalib.api import load_model as load_model
    from ovcalib.api import make_recipe as make_recipe
    from ovcalib.api import quantize as quantize
    from ovcalib.api import report as report
    from ovcalib.api import run_recipe as run_recipe
    from ovcalib.api import sources as sources
    from ovcalib.api import sweep as sweep
    from ovcalib.calibration.sets import CalibrationSet as CalibrationSet
    from ovcalib.errors import DataError as DataError
    from ovcalib.errors import DeviceError as DeviceError
    from ovcalib.errors import ModelError as ModelError
    from ovcalib.errors import OvcalibError as OvcalibError
    from ovcalib.errors import UsageError as UsageError
    from ovcalib.pipeline import QuantizationResult as QuantizationResult
    from ovcalib.progress import Progress as Progress
    from ovcalib.progress import Terminal as Terminal
    from ovcalib.records.model import ModelSpec as ModelSpec
    from ovcalib.records.preprocessing import Preprocessing as Preprocessing
    from ovcalib.records.recipe import Recipe as Recipe
    from ovcalib.records.sweep import SweepRecipe as SweepRecipe

_HOMES = {
    "benchmark": "ovcalib.api",
    "convert": "ovcalib.api",
    "diagnose": "ovcalib.api",
    "evaluate": "ovcalib.api",
    "generate": "ovcalib.api",
    "load_model": "ovcalib.api",
    "make_recipe": "ovcalib.api",
    "quantize": "ovcalib.api",
    "report": "ovcalib.api",
    "run_recipe": "ovcalib.api",
    "sources": "ovcalib.api",
    "sweep": "ovcalib.api",
    "CalibrationSet": "ovcalib.calibration.sets",
    "DataError": "ovcalib.errors",
    "DeviceError": "ovcalib.errors",
    "ModelError": "ovcalib.errors",
    "OvcalibError": "ovcalib.errors",
    "UsageError": "ovcalib.errors",
    "QuantizationResult": "ovcalib.pipeline",
    "Progress": "ovcalib.progress",
    "Terminal": "ovcalib.progress",
    "ModelSpec": "ovcalib.records.model",
    "Preprocessing": "ovcalib.records.preprocessing",
    "Recipe": "ovcalib.records.recipe",
    "SweepRecipe": "ovcalib.records.sweep",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (names resolved by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovcalib' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
