"""The command line. Results go to stdout, logs and progress to stderr; a command imports its function when chosen."""

from __future__ import annotations

import functools
import importlib
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from ovcalib.errors import DeviceError, OvcalibError, UsageError

if TYPE_CHECKING:
    from ovcalib.progress import Progress
    from ovcalib.types import Benchmark

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
OUTCOME_CODES = {"done": 0, "goal-met": 0, "goal-missed": 5, "budget": 7}

app = typer.Typer(
    name="ovcalib",
    help="INT8 for OpenVINO without your data: convert, calibrate, quantize with NNCF, and prove the result.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Options that several commands share ----------------------------------------------------------

MODEL_HELP = (
    "A name of `ovcalib models`, torchvision:NAME, timm:NAME, hub:OWNER/REPO:NAME, FILE.onnx, FILE.xml "
    "or package.module:factory."
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
WeightsOpt = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="shipped|published|FILE", help="Weights of the model; published ones are downloaded."
    ),
]
ShapeOpt = Annotated[
    str | None,
    typer.Option("--input-shape", metavar="C,H,W", help="Input of one image, where the model does not tell."),
]
MeanOpt = Annotated[str | None, typer.Option("--mean", metavar="A,B,C", help="Mean of each channel on the 0..1 scale.")]
StdOpt = Annotated[
    str | None, typer.Option("--std", metavar="A,B,C", help="Standard deviation of each channel on the 0..1 scale.")
]
SideOpt = Annotated[
    int | None,
    typer.Option("--short-side", metavar="PIXELS", help="Short side before the centre crop; 0 scales the whole image."),
]
TrustOpt = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Allow hub: references, which run somebody's code.")
]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", show_default="0")]
OptionsOpt = Annotated[
    list[str] | None,
    typer.Option("-O", metavar="KEY=VALUE", help="An option of the source; see `ovcalib sources NAME`."),
]
CountOpt = Annotated[
    int | None,
    typer.Option(
        "--num-samples", metavar="N", help="Calibration images (never batches).", show_default="the source's own"
    ),
]
DownloadOpt = Annotated[bool | None, typer.Option("--download", help="Allow the CIFAR-10 data set to be downloaded.")]
LimitOpt = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="Evaluate on at most N images, chosen class by class.")
]
DeviceOpt = Annotated[str | None, typer.Option("-d", "--device", help="OpenVINO device.", show_default="CPU")]
OutputOpt = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default="runs/NUMBER-...")
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result object alone.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into a line on stderr and an exit code; a user's mistake never shows a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug"))
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except OvcalibError as error:
            if debug:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            reason = str(error).strip().splitlines()
            print(
                f"error: {type(error).__name__}: {reason[0] if reason else ''}\n"
                "This is a fault of ovcalib, not yours. Run again with --debug and report what it prints.",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None

    return run


# Commands -------------------------------------------------------------------------------------


@app.command()
@guarded
def quantize(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="SOURCE",
            help="Where calibration images come from; see `ovcalib sources`.",
            show_default="bn-inversion, or fractal where the model has no BatchNorm",
        ),
    ] = None,
    num_samples: CountOpt = None,
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="DATA",
            help="Images that prove the result: imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR, npz:FILE.",
        ),
    ] = None,
    limit: LimitOpt = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="default|accuracy-aware",
            help="accuracy-aware gives operations their float precision back until --max-drop holds.",
            show_default="default",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", help="Allowed drop of the metric as a fraction: 0.01 is one point.", show_default="0.01"
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="top1|agreement|expected-top1",
            help="What --max-drop is about. The last two need no labels: agreement with FP32, and top-1 as FP32's own "
            "probabilities let expect.",
            show_default="top1 with labels, else expected-top1",
        ),
    ] = None,
    validate_on: Annotated[
        str | None,
        typer.Option(
            "--validate",
            metavar="DATA|calibration",
            help="Images that steer accuracy-aware quantization; calibration: its own, with the labels that came with "
            "them.",
            show_default="those of --eval, else calibration",
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time", metavar="SECONDS", help="Stop accuracy-aware quantization then, with the best result so far."
        ),
    ] = None,
    max_iterations: Annotated[
        int | None,
        typer.Option("--max-iterations", metavar="N", help="Candidates that accuracy-aware quantization measures."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="performance|mixed",
            help="Symmetric activations, or asymmetric where they are signed.",
            show_default="performance",
        ),
    ] = None,
    deploy_isa: Annotated[
        str | None,
        typer.Option(
            "--deploy-isa",
            metavar="any|host|avx2|avx512|vnni|amx|gpu|npu",
            help="Where the model will run; decides the overflow fix.",
            show_default="any",
        ),
    ] = None,
    overflow_fix: Annotated[
        str | None,
        typer.Option(
            "--overflow-fix",
            metavar="auto|disable|first-layer|enable",
            help="Which layers use half the weight range.",
            show_default="auto, by --deploy-isa",
        ),
    ] = None,
    activation_ranges: Annotated[
        str | None,
        typer.Option(
            "--activation-ranges",
            metavar="auto|min-max|mean-min-max|histogram",
            help="Extremes over all images, the mean of each image's (NNCF's default), or by a histogram.",
            show_default="auto: min-max, or mean-min-max for transformers and where that is closer to FP32",
        ),
    ] = None,
    bias_correction: Annotated[
        str | None,
        typer.Option(
            "--bias-correction",
            metavar="auto|none|fast|full|layerwise",
            help="layerwise takes away what rounding each layer's own weights adds; fast and full are NNCF's.",
            show_default="auto: layerwise, or none where that is closer to FP32",
        ),
    ] = None,
    guard: Annotated[
        bool | None,
        typer.Option(
            "--guard/--no-guard",
            help="Leave operations in float whose signal would drown in the rounding of INT8.",
            show_default="guard",
        ),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            "--model-type",
            metavar="auto|cnn|transformer",
            help="transformer smooths activations of matrix products.",
            show_default="auto",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Operations to leave in float, by wildcard (layer1.*) or type:NAME; repeatable.",
        ),
    ] = None,
    options: OptionsOpt = None,
    weights: WeightsOpt = None,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    trust_remote_code: TrustOpt = None,
    dynamic_batch: Annotated[
        bool | None, typer.Option("--dynamic-batch", help="Leave the batch of the written IR open.")
    ] = None,
    allow_overlap: Annotated[
        bool | None, typer.Option("--allow-overlap", help="Evaluate even on images of the calibration set.")
    ] = None,
    download: DownloadOpt = None,
    device: DeviceOpt = None,
    benchmark_time: Annotated[
        float | None,
        typer.Option(
            "--benchmark-time",
            metavar="SECONDS",
            help="Latency measurement of each model; 0 leaves it out.",
            show_default="2",
        ),
    ] = None,
    seed: SeedOpt = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "-c",
            "--recipe",
            metavar="FILE",
            help="A recipe (YAML, or the request.json of a result); options here beat it.",
        ),
    ] = None,
    output: OutputOpt = None,
    overwrite: OverwriteOpt = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and what --ignore matches, and stop.")
    ] = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Quantize a model to INT8 and prove the result."""
    from ovcalib import api
    from ovcalib.report.markdown import KERNELS, kernels_error, summary
    from ovcalib.types import STEERING_FIELDS, option_of

    given = {
        "model": model, "calib": calib, "num_samples": num_samples, "eval": eval_, "limit": limit, "mode": mode,
        "max_drop": max_drop, "metric": metric, "validate_on": validate_on, "max_time": max_time,
        "max_iterations": max_iterations, "preset": preset, "deploy_isa": deploy_isa, "overflow_fix": overflow_fix,
        "activation_ranges": activation_ranges, "bias_correction": bias_correction, "guard": guard,
        "model_type": model_type, "ignore": ignore or None,
        "options": key_values(options), "allow_overlap": allow_overlap, "download": download, "device": device,
        "benchmark_time": benchmark_time, "seed": seed, "dynamic_batch": dynamic_batch,
        **model_fields(weights, input_shape, mean, std, short_side, trust_remote_code),
    }  # fmt: skip
    fields = {**read_recipe(recipe), **{key: value for key, value in given.items() if value is not None}}
    if "model" not in fields:
        raise UsageError("No model was given. Expected ovcalib quantize MODEL; see `ovcalib models`.")
    resolved = api.make_recipe(**fields)
    if resolved.mode == "default":
        for name in STEERING_FIELDS:
            if given[name] is not None:
                raise UsageError(f"{option_of(name)} {given[name]} does nothing without --mode accuracy-aware.")
    progress = terminal()
    if dry_run:
        show_plan(resolved, progress, as_json)
        return
    name = f"{resolved.model}-{(resolved.calib or 'default').split(':')[0]}-{resolved.mode}"
    target = output or next_folder(Path("runs"), name)
    result = api.quantize_recipe(resolved, target, overwrite=overwrite, progress=progress)
    for warning in result.record.warnings:
        progress.say(f"warning: {warning}")
    if resolved.deploy_isa == "any" and resolved.overflow_fix == "auto":
        progress.say(
            f"overflow fix: {result.record.quantization.overflow_fix}, safe for most machines; if you know where the "
            "model will run, say so with --deploy-isa (vnni and amx use the full range)"
        )
    if as_json:
        print(result.record.model_dump_json(indent=2))
    else:
        print_table([summary(result.record)])
        for found in result.record.quantization.output_error:
            print(f"output error on {KERNELS[found.kernels]}: {kernels_error(found)}")
        print(f"\noutcome: {result.record.outcome}; wrote {target / 'report.html'}")
    raise typer.Exit(OUTCOME_CODES[result.record.outcome])


@app.command()
@guarded
def generate(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A calibration source; see `ovcalib sources`.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help=MODEL_HELP, show_default=False)],
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", help="Images.", show_default="the source's own")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Compare the set with what the model's BatchNorm layers remember.")
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="npz|imagefolder|datumaro",
            help="npz keeps the images exactly, the others hold 8-bit PNG.",
        ),
    ] = "npz",
    options: OptionsOpt = None,
    weights: WeightsOpt = None,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    trust_remote_code: TrustOpt = None,
    download: DownloadOpt = None,
    seed: SeedOpt = None,
    output: OutputOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Make a calibration set and write it, for `quantize --calib npz:FILE` or for other tools."""
    from ovcalib import api

    if form not in ("npz", "imagefolder", "datumaro"):
        raise UsageError(f"--format {form}: expected npz, imagefolder or datumaro.")
    given = {
        "options": key_values(options), "download": download, "seed": seed,
        **model_fields(weights, input_shape, mean, std, short_side, trust_remote_code),
    }  # fmt: skip
    target = output or next_folder(Path("runs"), f"{source.split(':')[0]}-{model}")
    progress = terminal()
    calibration = api.generate(
        source, model, count, target, form=form, score=score, overwrite=overwrite, progress=progress,  # type: ignore[arg-type]
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    for warning in calibration.provenance.warnings:
        progress.say(f"warning: {warning}")
    if as_json:
        print(calibration.provenance.model_dump_json(indent=2))
    else:
        made = calibration.provenance
        print(f"{made.num_samples} images from {made.source} in {made.seconds:.1f} s; wrote {target}")
        if made.score is not None:
            for key, value in made.score.model_dump().items():
                print(f"{key}: {value:.4g}")
        elif score:
            print(f"not scored: {made.score_reason}")


@app.command()
@guarded
def convert(
    model: ModelArg,
    output: OutputOpt = None,
    to: Annotated[str, typer.Option("--to", metavar="onnx,ir", help="What to write.")] = "onnx,ir",
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch open.")] = False,
    weights: WeightsOpt = None,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    trust_remote_code: TrustOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write a model as ONNX and FP32 IR, and check that all forms compute the same."""
    from ovcalib import api

    given = model_fields(weights, input_shape, mean, std, short_side, trust_remote_code)
    target = output or next_folder(Path("runs"), f"{model}-fp32")
    parity = api.convert(
        model, target, to=tuple(part.strip() for part in to.split(",") if part.strip()), dynamic_batch=dynamic_batch,
        overwrite=overwrite, progress=terminal(), **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    if as_json:
        print(parity.model_dump_json(indent=2))
    else:
        if parity.torch_vs_ir_max_abs is not None:
            print(
                f"largest difference from torch: ONNX {parity.torch_vs_onnx_max_abs:.2g} ({parity.onnx_runtime}), "
                f"IR {parity.torch_vs_ir_max_abs:.2g}; outputs reach {parity.output_max_abs:.3g}"
            )
        print(f"wrote {target}")


@app.command()
@guarded
def evaluate(
    model: ModelArg,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            help="imagefolder:DIR, cifar10[:ROOT], datumaro:FORMAT:DIR or npz:FILE.",
            show_default=False,
        ),
    ],
    device: DeviceOpt = None,
    limit: LimitOpt = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="f32|f16|bf16|default", help="Inference precision hint of the device.")
    ] = "f32",
    download: DownloadOpt = None,
    weights: WeightsOpt = None,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    trust_remote_code: TrustOpt = None,
    seed: SeedOpt = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Accuracy of a model on labelled images, on a device."""
    from ovcalib import api
    from ovcalib.report.markdown import points

    if precision not in ("f32", "f16", "bf16", "default"):
        raise UsageError(f"--precision {precision}: expected f32, f16, bf16 or default.")
    given = {
        "limit": limit, "download": download, "seed": seed, "device": device,
        **model_fields(weights, input_shape, mean, std, short_side, trust_remote_code),
    }  # fmt: skip
    found = api.evaluate(
        model, data, precision=None if precision == "default" else precision, progress=terminal(),
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    low, high = found.accuracy.ci95
    print_table(
        [
            {
                "model": found.model,
                "top-1": points(found.accuracy.top1),
                "95 % interval": f"{points(low)} to {points(high)}",
                "top-5": points(found.accuracy.top5),
                "images": str(found.count),
                "device": f"{found.device} {found.precision or 'default'}",
            }
        ]
    )
    print(f"\nmeasured on {found.protocol}")


@app.command()
@guarded
def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="FILE.xml or FILE.onnx, or a result folder, which stands for its FP32 and INT8 models.",
            show_default=False,
        ),
    ],
    device: Annotated[
        str, typer.Option("-d", "--device", metavar="CPU,GPU", help="OpenVINO devices, with commas.")
    ] = "CPU",
    hint: Annotated[
        str, typer.Option("--hint", metavar="latency,throughput", help="Performance hints.")
    ] = "latency,throughput",
    precision: Annotated[
        str, typer.Option("--precision", metavar="default,f32,f16,bf16", help="Inference precision hints.")
    ] = "default",
    seconds: Annotated[
        float, typer.Option("-t", "--time", metavar="SECONDS", help="Measurement of each model under each setting.")
    ] = 10.0,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images in one inference.", min=1)] = 1,
    inference_api: Annotated[
        str | None,
        typer.Option("--api", metavar="sync|async", help="How to infer.", show_default="sync for latency, else async"),
    ] = None,
    streams: Annotated[
        int | None, typer.Option("--streams", metavar="N", help="Streams of the device.", min=1, show_default="its own")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads on CPU.", min=1, show_default="its own")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", metavar="N", help="Requests in flight (async).", min=1, show_default="its own"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images on which devices and precisions must agree with CPU f32."),
    ] = None,
    limit: LimitOpt = None,
    min_agreement: Annotated[
        float,
        typer.Option("--min-agreement", metavar="SHARE", help="Share of images with the same class.", min=0, max=1),
    ] = 0.98,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    output: OutputOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Measure speed and memory of models in turns, and prove that INT8 ran; needs the base installation alone."""
    from ovcalib import benchmark as measuring
    from ovcalib.report.pages import write_benchmark_report
    from ovcalib.rundir import REQUEST, RunDir, write_json

    if inference_api not in (None, "sync", "async"):
        raise UsageError(f"--api {inference_api}: expected sync or async.")
    if inference_api == "sync" and requests not in (None, 1):
        raise UsageError(f"--requests {requests}: the sync API has one request. Pass --api async.")
    settings = measuring.all_settings(
        names(device, "--device"),
        names(hint, "--hint", ("latency", "throughput")),
        names(precision, "--precision", ("default", "f32", "f16", "bf16")),
        batch=batch, api=inference_api, streams=streams, threads=threads, requests=requests,
    )  # fmt: skip
    progress = terminal()
    with RunDir(output or next_folder(Path("runs"), "benchmark"), overwrite) as run:
        request = {"models": list(map(str, models)), "settings": [vars(s) for s in settings], "seconds": seconds,
                   "data": data, "limit": limit, "min_agreement": min_agreement}  # fmt: skip
        write_json(run.path / REQUEST, request)
        found = measuring.benchmark(models, settings, seconds, progress)
        if data is not None:
            from ovcalib.device_parity import device_parity
            from ovcalib.models import ModelOptions

            fields = model_fields(None, input_shape, mean, std, short_side, None)
            options = ModelOptions(**{key: value for key, value in fields.items() if value is not None})
            parity = device_parity(models, settings, data, limit, min_agreement, options, progress)
            found = found.model_copy(update={"parity": parity})
        write_json(run.path / "benchmark.json", found.model_dump(mode="json"))
        write_benchmark_report(found, run.path)
        run.finish()
    for warning in (*found.warnings, *dict.fromkeys(reason for r in found.runs for reason in r.unreliable)):
        progress.say(f"warning: {warning}")
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_benchmark(found)
        print(f"\nwrote {run.target / 'report.html'}")
    for entry in found.parity:
        if not entry.agrees:
            print(
                f"error: {entry.model} on {entry.device} ({entry.precision}) disagrees with CPU in f32: correlation "
                f"{entry.correlation}, same class {entry.agreement}. Try --precision f32.",
                file=sys.stderr,
            )
    if not all(entry.agrees for entry in found.parity):
        raise typer.Exit(DeviceError.exit_code)


@app.command()
@guarded
def diagnose(
    fp32: Annotated[str, typer.Argument(metavar="FP32", help="FILE.xml or FILE.onnx.", show_default=False)],
    int8: Annotated[str, typer.Argument(metavar="INT8", help="FILE.xml, quantized from it.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images to measure on.", show_default="those of the first --calib"),
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            "--calib",
            metavar="SOURCE",
            help="A calibration source, such as npz:calibration.npz, whose ranges to compare; repeatable.",
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", metavar="N", help="Images of each set for signals and ranges.", min=1)
    ] = 32,
    limit: LimitOpt = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Drop that the suggested scope may leave, as a fraction.", min=0, max=1)
    ] = 0.01,
    device: DeviceOpt = None,
    benchmark_time: Annotated[
        float,
        typer.Option("--benchmark-time", metavar="SECONDS", help="Latency of each candidate; 0 leaves it out.", min=0),
    ] = 1.0,
    input_shape: ShapeOpt = None,
    mean: MeanOpt = None,
    std: StdOpt = None,
    short_side: SideOpt = None,
    seed: SeedOpt = None,
    output: OutputOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Where the accuracy goes: the harm of every quantized operation, the ranges at fault, and what to ignore."""
    from ovcalib import api
    from ovcalib.diagnosis import diagnose as examine
    from ovcalib.report.pages import candidate_table, ignore_options, operation_table

    given = {
        "eval": data, "limit": limit, "device": device, "seed": seed,
        **model_fields(None, input_shape, mean, std, short_side, None),
    }  # fmt: skip
    recipe = api.make_recipe(
        model=fp32, num_samples=num_samples, max_drop=max_drop, benchmark_time=benchmark_time,
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    target = output or next_folder(Path("runs"), "diagnosis")
    progress = terminal()
    found = examine(recipe, int8, calib or [], target, overwrite=overwrite, progress=progress)
    for warning in found.warnings:
        progress.say(f"warning: {warning}")
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    shown = operation_table(found)
    print_table([dict(zip(shown.columns[:7], row[:7], strict=True)) for row in shown.rows[:12]])
    print()
    worth = candidate_table(found)
    print_table([dict(zip(worth.columns, row, strict=True)) for row in worth.rows])
    print()
    for line in found.faults:
        print(line)
    if found.suggested is not None:
        print(f"\nto quantize without them: {ignore_options(found.candidates[found.suggested])}")
    print(f"\nwrote {target / 'report.html'}")


@app.command()
@guarded
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...",
            help="Folders that ovcalib wrote, or their JSON files; several results make a comparison.",
            show_default=False,
        ),
    ],
    formats: Annotated[str, typer.Option("--format", metavar="html,md,csv", help="What to write.")] = "html,md,csv",
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Leave latency out, to compare results of different machines.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where to write.",
            show_default="the folder of the result; for several, the current one",
        ),
    ] = None,
    debug: DebugOpt = False,
) -> None:
    """Write the report of a result, with its benchmark and diagnosis, or a comparison of several results."""
    from ovcalib.report.build import build_report

    for path in build_report(results, names(formats, "--format", ("html", "md", "csv")), output, not no_latency):
        print(f"wrote {path}")


@app.command()
@guarded
def sweep(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE.yaml",
            help="Names models, sources, modes, seeds, eval; see ovcalib.sweep.SweepRecipe.",
            show_default=False,
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="N", help="Cells at once, on shares of the CPUs.", min=1, show_default="1"),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|dask:ADDRESS", help="Processes here, or workers of a cluster.")
    ] = "local",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in the folder of another recipe; cells that both have are kept.")
    ] = False,
    output: OutputOpt = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Quantize every model with every source, mode and seed; the same command goes on after an interruption."""
    from ovcalib.sweep import make_sweep_recipe, run_sweep

    content = make_sweep_recipe(read_recipe(recipe), f"The sweep recipe {str(recipe)!r}")
    target = output or next_folder(Path("runs"), f"sweep-{recipe.stem}")
    try:
        found = run_sweep(content, target, jobs=jobs, engine=engine, resume=resume, progress=terminal())
    except KeyboardInterrupt:
        print(f"interrupted; finished cells are kept in {target}, and the same sweep goes on there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(found.model_dump_json(indent=2) if as_json else (target / "report.md").read_text())
    if not as_json:
        print(f"wrote {target / 'report.html' if len(found.failed) < len(found.cells) else target / 'report.md'}")
    if found.failed:
        print(
            f"error: {len(found.failed)} of {len(found.cells)} cells failed; the same sweep tries them again",
            file=sys.stderr,
        )
        raise typer.Exit(OUTCOME_CODES["goal-missed"])


@app.command()
@guarded
def models(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as 'resnet*-cifar10'.")] = "*",
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """The built-in models and their weights."""
    from ovcalib import api
    from ovcalib.report.markdown import points

    found = api.models(pattern)
    if not found:
        raise UsageError(f"No built-in model matches {pattern!r}. `ovcalib models` lists them all.")
    if as_json:
        print(json.dumps([spec.model_dump(mode="json") for spec in found], indent=2))
        return
    print_table(
        [
            {
                "model": spec.name,
                "input": "x".join(map(str, spec.input_shape)),
                "classes": str(spec.num_classes),
                "weights": spec.weights.origin,
                "top-1": points(spec.weights.top1),
                "of": spec.weights.source or "-",
                "licence": spec.weights.licence or "-",
            }
            for spec in found
        ]
    )


@app.command()
@guarded
def sources(
    name: Annotated[str | None, typer.Argument(help="Show the options of one source.")] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """The calibration sources and their options."""
    from ovcalib import api
    from ovcalib.errors import UnknownNameError

    table = api.sources()
    if name is not None and name not in table:
        raise UnknownNameError("calibration source", name, table)
    if as_json:
        print(json.dumps(table if name is None else table[name], indent=2))
    elif name is None:
        print_table([{"source": entry["reference"], "what it is": entry["summary"]} for entry in table.values()])
    else:
        entry = table[name]
        print(f"{entry['reference']}: {entry['summary']}\n")
        for key, default in entry["options"].items():
            print(f"  -O {key}={default}")
        print(f"\n{entry['help']}" if entry["help"] else "no options")


@app.command()
@guarded
def doctor(as_json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """What this machine has: devices, instruction sets, versions, caches, and what is missing for what."""
    from ovcalib.doctor import doctor as examine
    from ovcalib.doctor import lines

    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print("\n".join(lines(found)))


def version_callback(value: bool) -> None:
    if value:
        from ovcalib import __version__

        print(f"ovcalib {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# Helpers --------------------------------------------------------------------------------------


def terminal() -> Progress:
    from ovcalib.progress import Terminal

    return Terminal()


def numbers(text: str | None, option: str, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    """Comma-separated numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text}: expected numbers with commas, such as 3,224,224.") from error


def model_fields(
    weights: str | None,
    input_shape: str | None,
    mean: str | None,
    std: str | None,
    short_side: int | None,
    trust_remote_code: bool | None,
) -> dict[str, Any]:
    """The recipe's fields about the model."""
    shape = numbers(input_shape, "--input-shape", int)
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise UsageError(f"--input-shape {input_shape}: expected C,H,W, such as 3,224,224.")
    return {
        "weights": weights,
        "input_shape": shape,
        "mean": numbers(mean, "--mean", float),
        "std": numbers(std, "--std", float),
        "short_side": short_side,
        "trust_remote_code": trust_remote_code,
    }


def key_values(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """-O key=value, repeated."""
    if not pairs:
        return None
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"-O {pair}: expected KEY=VALUE.")
        result[key] = value
    return result


def read_recipe(path: Path | None) -> dict[str, Any]:
    """The fields of a recipe file; result.json is understood as well."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {str(path)!r} is not YAML: {str(error).splitlines()[0]}.") from error
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    if not isinstance(content, dict):
        raise UsageError(f"The recipe {str(path)!r} holds no fields. Expected lines such as `model: resnet20-cifar10`.")
    return content


def show_plan(recipe: Any, progress: Progress, as_json: bool) -> None:
    """The resolved recipe, and what each pattern of --ignore matches, without any work on images."""
    import tempfile

    from ovcalib.graph import match_operations
    from ovcalib.models import load_model
    from ovcalib.pipeline import export, model_options, resolve_settings
    from ovcalib.quantization import dry_run_ignored

    model = load_model(recipe.model, model_options(recipe), progress.say)
    with tempfile.TemporaryDirectory() as folder:
        graph, _ = export(model, Path(folder), progress)
        settings = resolve_settings(recipe, graph)
        matched = dry_run_ignored(match_operations(graph, recipe.ignore))
    plan = {"recipe": recipe.model_dump(mode="json"), "overflow_fix": settings.overflow_fix, "preset": settings.preset,
            "transformer": settings.transformer, "ignored": matched}  # fmt: skip
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    for key, value in plan["recipe"].items():
        print(f"{key}: {json.dumps(value)}")
    print(f"\noverflow fix: {settings.overflow_fix}; preset: {settings.preset}; transformer: {settings.transformer}")
    for line in matched:
        print(f"ignore {line}")


def next_folder(root: Path, description: str) -> Path:
    """runs/0007-description, with the next free number."""
    taken = [int(m[1]) for p in (root.iterdir() if root.is_dir() else ()) if (m := re.match(r"(\d{4,})-", p.name))]
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(description).name).strip("-.")
    return root / f"{max(taken, default=0) + 1:04}-{plain}"


def names(text: str, option: str, known: Sequence[str] | None = None) -> list[str]:
    """Names with commas, each of them known and none twice."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in found if known is not None and name not in known]
    if unknown or not found:
        raise UsageError(f"{option} {text}: expected {', '.join(known) if known else 'names'}, with commas.")
    return found


def print_benchmark(found: Benchmark) -> None:
    """The runs as a table, and the verdicts."""
    print_table(
        [
            {
                "model": r.model,
                "device": r.device,
                "hint": r.hint,
                "precision": f"{r.precision} ({r.effective.get('INFERENCE_PRECISION_HINT', '-')})",
                "p50 ms": f"{r.latency_ms.p50:.4g}",
                "p99 ms": f"{r.latency_ms.p99:.4g}",
                "images/s": f"{r.throughput_fps:.4g}",
                "INT8 layers": f"{r.int8_nodes}/{sum(r.compute_nodes.values())}",
                "peak MB": f"{r.memory_bytes.peak / 1e6:.0f}" if r.memory_bytes else "-",
                "reliable": "no" if r.unreliable else "yes",
            }
            for r in found.runs
        ]
    )
    print()
    for s in found.speedups:
        print(f"{s.hint}, {s.precision}: {s.verdict}{' (unreliable)' if s.unreliable else ''}")


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows with the same columns, aligned, on stdout."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for line in (dict(zip(columns, columns, strict=True)), *rows):
        print("  ".join(line[column].ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())


app.add_typer(importlib.import_module("ovcalib.gan.commands").app, name="gan")  # light; it needs the names above


def main() -> None:
    """The entry point; SIGTERM cleans up as Ctrl-C does."""

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    app()


if __name__ == "__main__":
    main()
