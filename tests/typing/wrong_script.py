"""Mistakes that a type checker finds; the line below each comment."""

import ovcalib

# an unknown keyword
ovcalib.quantize("resnet20-cifar10", calibration="noise")
# a value that is no choice
ovcalib.quantize("resnet20-cifar10", mode="magic")
# another type
ovcalib.generate("noise", "resnet20-cifar10", seed="zero")
