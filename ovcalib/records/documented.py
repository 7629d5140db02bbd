"""Keywords of the public functions, made from the fields of the option groups.

`keywords_module` writes `ovcalib/keywords.py`, which tells type checkers and editors the keywords of each function;
`documented` tells `help()` and `inspect.signature`.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ovcalib.records.base import Frozen, shown
from ovcalib.records.options import (
    BenchmarkOptions,
    CalibrationOptions,
    ConvertOptions,
    DiagnosisOptions,
    EvaluateOptions,
    EvaluationOptions,
    GenerateOptions,
    MeasurementOptions,
    ModelOptions,
    QuantizationOptions,
)

F = TypeVar("F", bound=Callable[..., Any])

# The groups of each function, and what it takes by position or not at all. A class is based on the largest one above
# it whose keywords it has.
GROUPS: dict[str, tuple[type[Frozen], ...]] = {
    "InputKeywords": (ModelOptions,),
    "LoadKeywords": (ModelOptions,),
    "QuantizeKeywords": (
        ModelOptions, CalibrationOptions, QuantizationOptions, EvaluationOptions, MeasurementOptions,
    ),
    "GenerateKeywords": (ModelOptions, GenerateOptions),
    "ConvertKeywords": (ModelOptions, ConvertOptions),
    "EvaluateKeywords": (ModelOptions, EvaluateOptions),
    "BenchmarkKeywords": (ModelOptions, BenchmarkOptions),
    "DiagnoseKeywords": (ModelOptions, DiagnosisOptions),
}  # fmt: skip
# Finished files bring their weights.
OF_FILES = {"weights", "trust_remote_code", "dynamic_batch"}
LEFT_OUT = {
    "InputKeywords": OF_FILES,
    "LoadKeywords": {"dynamic_batch"},
    "QuantizeKeywords": {"calib", "eval"},
    "GenerateKeywords": {"calib", "num_samples", "dynamic_batch", "keep_images"},
    "EvaluateKeywords": {"data", "dynamic_batch"},
    "BenchmarkKeywords": OF_FILES,
    "DiagnoseKeywords": OF_FILES,
}


def fields_of(keywords: str) -> Iterator[tuple[type[Frozen], str, FieldInfo]]:
    """The group, name and field of every keyword."""
    for kind in GROUPS[keywords]:
        for name, field in kind.model_fields.items():
            if name != "reference" and name not in LEFT_OUT.get(keywords, ()):
                yield kind, name, field


def annotation_of(field: FieldInfo) -> str:
    """The type that a keyword takes, as source text: wider than that of the field, which converts."""
    return " | ".join(dict.fromkeys(_texts(field.annotation)))


def _texts(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _texts(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _texts(argument)
    elif origin is Literal:
        yield f"Literal[{', '.join(map(json.dumps, arguments))}]"
    elif origin is tuple and arguments[-1] is Ellipsis:
        yield f"Sequence[{' | '.join(_texts(arguments[0]))}]"
    elif origin is tuple:
        yield f"tuple[{', '.join(' | '.join(_texts(argument)) for argument in arguments)}]"
    elif origin is dict:
        yield "Mapping[str, object]"
    else:
        yield "None" if annotation is type(None) else annotation.__name__


def documented(keywords: type[Any]) -> Callable[[F], F]:
    """Show the keywords of a function that takes them as `**options`, with what each means."""
    fields = list(fields_of(keywords.__name__))

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        spelt = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation_of(field),
                default=field.get_default(call_default_factory=True),
            )
            for _, name, field in fields
        ]  # fmt: skip
        lines = []
        for group in dict.fromkeys(kind for kind, _, _ in fields):
            lines += ["", f"{(group.__doc__ or '').strip()}:"]
            for kind, name, field in fields:
                if kind is group:
                    default = shown(kind, name).default or field.get_default(call_default_factory=True)
                    lines.append(f"    {name}: {annotation_of(field)}")
                    lines.append(f"        {field.description} [default: {default}]")

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        run.__signature__ = signature.replace(parameters=[*own, *spelt])  # type: ignore[attr-defined]
        run.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n" + "\n".join(lines)
        return run  # type: ignore[return-value]

    return decorate


def keywords_module() -> str:
    """The source of ovcalib/keywords.py."""
    lines = [
        '"""Keywords of the public functions. Written by `python -m ovcalib.records.schema` from the option groups."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Mapping, Sequence",
        "from typing import Literal, TypedDict",
    ]
    written: dict[str, dict[str, str]] = {"TypedDict": {}}
    for name in GROUPS:
        own = {field_name: annotation_of(field) for _, field_name, field in fields_of(name)}
        base = max((other for other in written if written[other].items() <= own.items()), key=lambda o: len(written[o]))
        lines += ["", "", f"class {name}({base}, total=False):"]
        lines += [f"    {field}: {annotation}" for field, annotation in own.items() if field not in written[base]]
        written[name] = own
    return "\n".join(lines) + "\n"
