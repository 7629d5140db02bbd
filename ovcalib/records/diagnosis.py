"""`diagnosis.json`."""

from __future__ import annotations

from typing import Literal

from ovcalib.records.base import Frozen, Measured


class SignalQuality(Frozen):
    """How near a quantized signal is to the float one.

    sqnr_db   signal-to-quantization-noise ratio, limited to -200..200 dB; 200 means no difference
    cosine    similarity of the two as vectors, -1..1
    """

    sqnr_db: float
    cosine: float


class ChannelRange(Frozen):
    """One channel's quantized range, and the values that it meets on the first image set."""

    channel: int
    low: float
    high: float
    seen: tuple[float, float]
    clipped_share: float


class QuantizedInput(Frozen):
    """The range of an activation's FakeQuantize against the values that it meets.

    source          the operation that makes the activation
    low, high       the quantized range; the widest over channels where it is per channel
    worst_channel   where the range is per channel, the channel of which most is clipped; else None
    seen            per image set, smallest and largest value of the FP32 network
    clipped_share   per image set, share of the values outside the range, 0..1
    used_share      per image set, share of the range that lies between smallest and largest value, 0..1
    edges, counts   histogram of the FP32 values, of `worst_channel` if there is one: 65 edges, 64 counts per image set
    """

    source: str
    low: float
    high: float
    seen: dict[str, tuple[float, float]]
    clipped_share: dict[str, float]
    used_share: dict[str, float]
    worst_channel: ChannelRange | None
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


class OperationDiagnosis(Frozen):
    """One quantized operation.

    output_nmse   error of the network's output when this operation alone is quantized, relative to its energy; None
                  where the output is then not finite
    cumulative    its output in the INT8 network, which inherits every error before it
    alone         its output on float input, input and weights quantized
    weights       only the weights quantized; None without weights
    activations   only the input quantized; None without weights, where it is the same as `alone`
    """

    name: str
    kind: str
    output_nmse: Measured
    cumulative: SignalQuality
    alone: SignalQuality
    weights: SignalQuality | None
    activations: SignalQuality | None
    inputs: tuple[QuantizedInput, ...]


class Metrics(Frozen):
    """How good a model is.

    top1        accuracy, a fraction; None without labels
    agreement   with FP32, a fraction; None for models without class logits
    nmse        output error against FP32; None where the output is not finite
    """

    top1: float | None
    agreement: float | None
    nmse: Measured


class Candidate(Metrics):
    """A model with some operations in float.

    in_float         operations that compute in float, worst first; names for --ignore
    latency_p50_ms   single-stream, measured in turns with the others; None where it was left out
    """

    in_float: tuple[str, ...]
    latency_p50_ms: float | None


class Remedy(Metrics):
    """A new quantization of the FP32 model.

    command   that makes it
    """

    command: str


class Diagnosis(Frozen):
    """`diagnosis.json`: the operations that cause the accuracy loss.

    on           the images on which everything was measured; `count` of them, `signal_count` for the signals
    sets         image sets whose ranges are compared; the first is that of `on`
    operations   every quantized operation, most harmful first
    candidates   more and more operations, most harmful first, back in float
    suggested    index of the candidate to choose: the first within `max_drop` of FP32, else the best
    remedies     new quantizations that were tried, where INT8 drops more than `max_drop`
    remedy       index of the best of them; None where none is better than INT8 as it is
    faults       what is wrong with the ranges of the most harmful operations, in words
    """

    schema_version: Literal[1] = 1
    created: str
    ovcalib: str
    model: str
    fp32_sha256: str
    int8_sha256: str
    device: str
    on: str
    count: int
    signal_count: int
    metric: Literal["top1", "agreement", "nmse"]
    max_drop: float
    sets: tuple[str, ...]
    operations: tuple[OperationDiagnosis, ...]
    fp32: Candidate
    int8: Candidate
    candidates: tuple[Candidate, ...]
    suggested: int | None
    remedies: tuple[Remedy, ...] = ()
    remedy: int | None = None
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
