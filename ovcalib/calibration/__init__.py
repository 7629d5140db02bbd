"""Calibration sources, and the sets they make.

A source is a module with three things:

    Options     a frozen dataclass; its fields are what `-O key=value` sets
    NEEDS       what must be there: "argument" (after the colon of the reference), "checkpoint" (the torch module)
    generate    (Request, Options) -> CalibrationSet

To add one, write its file and its line in SOURCES; the command line, `-O`, `ovcalib sources` and the contract tests
follow by themselves. Installed packages add theirs through the entry-point group `ovcalib.sources`.
"""

from ovcalib.calibration.sets import CalibrationSet as CalibrationSet
from ovcalib.calibration.sets import Provenance as Provenance
from ovcalib.calibration.sources import Request as Request
from ovcalib.calibration.sources import generate as generate
from ovcalib.registry import Registry

SOURCES = Registry(
    "calibration source",
    "ovcalib.sources",
    {
        "real": "ovcalib.calibration.real",
        "npz": "ovcalib.calibration.npz",
        "noise": "ovcalib.calibration.noise",
        "fractal": "ovcalib.calibration.fractal",
        "stylegan2-ada": "ovcalib.calibration.stylegan2_ada",
        "distylegan": "ovcalib.calibration.distylegan",
    },
)
DEFAULT_SOURCE = "fractal"
