"""INT8 for OpenVINO without your data.

    import ovcalib
    result = ovcalib.quantize("resnet20-cifar10", output="out")
    print(result.record.agreement)

The names here are resolved when they are first used, so importing ovcalib costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# OpenVINO and NNCF send usage events as soon as they are imported, unless this package of theirs is missing. In a
# process that uses ovcalib it is: nothing here talks to a network that was not asked to.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from ovcalib.api import convert as convert
    from ovcalib.api import evaluate as evaluate
    from ovcalib.api import generate as generate
    from ovcalib.api import load_model as load_model
    from ovcalib.api import quantize as quantize
    from ovcalib.calibration.sets import CalibrationSet as CalibrationSet
    from ovcalib.data.preprocessing import Preprocessing as Preprocessing
    from ovcalib.errors import OvcalibError as OvcalibError
    from ovcalib.types import ModelSpec as ModelSpec
    from ovcalib.types import Recipe as Recipe

_HOMES = {
    "CalibrationSet": "ovcalib.calibration.sets",
    "ModelSpec": "ovcalib.types",
    "OvcalibError": "ovcalib.errors",
    "Preprocessing": "ovcalib.data.preprocessing",
    "Recipe": "ovcalib.types",
    "convert": "ovcalib.api",
    "evaluate": "ovcalib.api",
    "generate": "ovcalib.api",
    "load_model": "ovcalib.api",
    "quantize": "ovcalib.api",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (names resolved by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovcalib' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
