"""`ovcalib report`: which page the given results make, and where it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovcalib.errors import UsageError
from ovcalib.records.benchmark import Benchmark
from ovcalib.records.diagnosis import Diagnosis
from ovcalib.records.read import Source, read_records, refuse_other_machines, refuse_other_model
from ovcalib.records.result import Result
from ovcalib.reports.benchmark import write_benchmark_report
from ovcalib.reports.comparison import write_comparison
from ovcalib.reports.diagnosis import write_diagnosis_report
from ovcalib.reports.result import write_result_report
from ovcalib.rundir import file_sha256, write_json


def build_report(
    paths: Sequence[Path], formats: Sequence[str], output: Path | None, latency: bool = True
) -> list[Path]:
    """Write report.<format>; returns the files.

    paths     one result, with its benchmarks and diagnoses if there are some; several results; or one of the others
    output    folder; None is the folder of the one record, or the current folder for several results
    latency   False leaves latencies out of a comparison
    raises    UsageError for records that are damaged or do not belong together
    """
    sources = read_records(paths)
    results = [s for s in sources if isinstance(s.record, Result)]
    folder = output or (Path() if len(results) > 1 else sources[0].folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {str(folder)!r} cannot be written: {error.strerror}.") from error
    if len(results) > 1:
        if len(results) < len(sources):
            raise UsageError("A comparison takes results alone. Pass benchmarks and diagnoses with one result.")
        if latency:
            refuse_other_machines(results)
        return write_comparison([s.record for s in results if isinstance(s.record, Result)], folder, formats, latency)
    if results:
        return _one_result(results[0], sources, formats, folder)
    if len(sources) > 1:
        raise UsageError(f"{len(sources)} benchmarks or diagnoses make no page. Pass one of them, or their result too.")
    record = sources[0].record
    if isinstance(record, Benchmark):
        return write_benchmark_report(record, folder, formats)
    assert isinstance(record, Diagnosis)
    return write_diagnosis_report(record, folder, formats)


def _one_result(source: Source, sources: Sequence[Source], formats: Sequence[str], folder: Path) -> list[Path]:
    result = source.record
    assert isinstance(result, Result)
    benchmarks, diagnoses = [], []
    for other in sources:
        if isinstance(other.record, Result):
            continue
        refuse_other_model(result, other.record, other.path)
        if isinstance(other.record, Benchmark):
            benchmarks.append(other.record)
        else:
            diagnoses.append(other.record)
    written = write_result_report(result, folder, formats, benchmarks, diagnoses, source.folder / "preview.png")
    if folder.resolve() == source.folder.resolve():
        # The result's list of files stays true.
        hashes = {path.name: file_sha256(path) for path in written}
        record = result.model_copy(update={"files": {**result.files, **hashes}})
        write_json(source.path, record.model_dump(mode="json"))
    return written
