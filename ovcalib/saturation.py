"""What an INT8 model gives on a CPU that adds its products in 16 bits, found out on any x86 CPU with AVX2.

Without VNNI or AMX, an INT8 product of full-range weights and activations is added to its neighbour's in 16 bits, and
saturates (Intel, oneDNN developer guide, "Nuances of int8 computations"). Which networks that breaks is not to be seen
from ranges alone, so the model runs on the kernels themselves. oneDNN chooses its kernels once a process, so they have
a process of their own: this module.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovcalib import machine
from ovcalib.export.to_openvino import read_graph, write_ir
from ovcalib.runtime import outputs_of


def outputs_on_avx2(graph: ov.Model, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Outputs of a graph on the kernels that oneDNN takes where there is AVX2 and nothing newer.

    graph    batch 1
    inputs   network inputs, float32 [1, C, H, W] each
    returns  float32 [N, K]; None where this CPU cannot tell
    """
    if "avx2" not in machine.cpu_flags():
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_ir(graph, Path(folder, "model.xml"))
        np.save(Path(folder, "inputs.npy"), np.stack(inputs))
        found = subprocess.run(
            [sys.executable, "-m", "ovcalib.saturation", folder],
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
            capture_output=True,
        )
        if found.returncode != 0:
            return None
        return np.asarray(np.load(Path(folder, "outputs.npy")))


def main() -> None:
    folder = Path(sys.argv[1])
    outputs = outputs_of(read_graph(folder / "model.xml"), np.load(folder / "inputs.npy"))
    np.save(folder / "outputs.npy", outputs)


if __name__ == "__main__":
    main()
