"""What is read about the processor, from the text that Linux gives."""

from pathlib import Path

import pytest

from ovcalib import machine
from ovcalib.runtime import with_precision

AMD = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"


@pytest.fixture
def cpuinfo(monkeypatch):
    """Sets the content of /proc/cpuinfo; None takes the file away."""

    def clear():
        machine._cpuinfo.cache_clear()
        machine.cpu_flags.cache_clear()

    def give(text):
        def read(path):
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read)
        clear()

    yield give
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize(
    ("text", "vendor", "flags", "fast"),
    [
        (AMD, "AuthenticAMD", {"fpu", "avx512f", "avx512_bf16"}, True),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), "GenuineIntel", {"fpu", "avx512f", "avx512_bf16"}, False),
        (ARM, None, {"fp", "asimd", "asimddp"}, False),
        ("Processor\t: ARMv7\n\n" + ARM, None, {"fp", "asimd", "asimddp"}, False),
        (None, None, set(), False),
    ],
)
def test_the_first_processor_is_read(cpuinfo, monkeypatch, text, vendor, flags, fast) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    cpuinfo(text)
    assert (machine.cpu_vendor(), machine.cpu_flags(), machine.has_fast_bfloat16()) == (vendor, flags, fast)


@pytest.mark.parametrize(("limit", "fast"), [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True)])
def test_bfloat16_is_not_fast_where_it_would_be_emulated(cpuinfo, monkeypatch, limit, fast) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    cpuinfo(AMD)
    assert machine.has_fast_bfloat16() is fast


def test_where_bfloat16_is_withheld_the_cpu_is_asked_for_float32(monkeypatch) -> None:
    given = {"PERFORMANCE_HINT": "LATENCY"}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert with_precision("CPU", given) == {"INFERENCE_PRECISION_HINT": "f32", **given}
    assert with_precision("CPU", {"INFERENCE_PRECISION_HINT": "bf16"}) == {"INFERENCE_PRECISION_HINT": "bf16"}
    assert with_precision("GPU", given) == given
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert with_precision("CPU", given) == given
