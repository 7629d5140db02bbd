"""Calibration sources, and the sets they make.

A source is a module with three things:

    Options     a frozen dataclass; its fields are what `-O key=value` sets
    NEEDS       what it requires: "argument" (after the colon of the reference), "checkpoint" (the torch module)
    generate    (Request, Options) -> Generated

and, if its default number of images is not 300, `images_wanted(spec, argument) -> int`; if its argument is not a file,
`ARGUMENT`, what to write for it; if its argument names other sources, `parts(argument) -> tuple[str, ...]`.

To add one, write its file and its line in SOURCES; the command line, `-O`, `ovcalib sources` and the contract tests
read the table. Installed packages add theirs through the entry-point group `ovcalib.sources`.
"""

from ovcalib.registry import Registry

SOURCES = Registry(
    "calibration source",
    "ovcalib.sources",
    {
        "real": "ovcalib.calibration.real",
        "npz": "ovcalib.calibration.npz",
        "mix": "ovcalib.calibration.mix",
        "auto": "ovcalib.calibration.auto",
        "noise": "ovcalib.calibration.noise",
        "fractal": "ovcalib.calibration.fractal",
        "bn-inversion": "ovcalib.calibration.bn_inversion",
        "zeroq": "ovcalib.calibration.zeroq",
        "dsg": "ovcalib.calibration.dsg",
        "intraq": "ovcalib.calibration.intraq",
        "genie": "ovcalib.calibration.genie",
        "dgh": "ovcalib.calibration.dgh",
        "gdfq": "ovcalib.calibration.gdfq",
        "acq": "ovcalib.calibration.acq",
        "fdda": "ovcalib.calibration.fdda",
        "patch-similarity": "ovcalib.calibration.patch_similarity",
        "prior": "ovcalib.calibration.prior",
        "stylegan2-ada": "ovcalib.calibration.stylegan2_ada",
        "distylegan": "ovcalib.calibration.distylegan",
    },
)
