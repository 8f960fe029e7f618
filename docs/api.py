# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Writes docs/api.md from signatures and docstrings.

python docs/api.py           # rewrites it
python docs/api.py --check   # exit code 1 if it is out of date
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import lalm
import lalm.convert
import lalm.hub
import lalm.modeling.ops as ops
import lalm.modeling.sequence_parallel

PAGE = Path(__file__).resolve().parent / "api.md"
INTRODUCTION = """# API

Generated from the docstrings by `python docs/api.py`. Everything else in `lalm` may change without notice.
"""


def page() -> str:
    """The whole page."""
    shared = {field.name: field.default for field in dataclasses.fields(lalm.LalmConfig)}
    parts = [INTRODUCTION, "## Configurations\n", configuration(lalm.LalmConfig, {})]
    parts += [configuration(variant.config, shared) for variant in lalm.VARIANTS]
    parts += ["## Models\n", models(), "## Ops\n", f"{inspect.getdoc(ops)}\n"]
    public = (getattr(ops, name) for name in ops.__all__)
    parts += [function(op, "lalm.modeling.ops") for op in public if inspect.isfunction(op) and not is_pair(op)]
    for module in (lalm.modeling.sequence_parallel, lalm.hub, lalm.convert):
        parts.append(f"## `{module.__name__}`\n")
        parts += [function(one, one.__module__) for one in public_functions(module)]
    return "\n".join(parts)


def configuration(config: type, shared: dict[str, object]) -> str:
    """A configuration's docstring, and the fields that it adds or whose default it changes."""
    own = inspect.get_annotations(config)
    lines = [f"### `{config.__name__}`\n", docstring(config), "| field | type | default |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in own and (field.name not in shared or field.default != shared[field.name]):
            kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
            cell = re.sub(r"\btyping\.", "", kind).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {cell} | `{default(field)}` |")
    return "\n".join(lines) + "\n"


def default(field: dataclasses.Field) -> str:
    """The default of a field as Python would write it."""
    factory = field.default_factory
    return repr(field.default if factory is dataclasses.MISSING else factory())


def models() -> str:
    """One line per variant: its classes by the Auto class that builds them."""
    lines = ["| `model_type` | classes |", "|---|---|"]
    for variant in lalm.VARIANTS:
        classes = ", ".join(f"`{model.__name__}`" for model in variant.models.values())
        lines.append(f"| `{variant.config.model_type}` | {classes} |")
    return "\n".join(lines) + "\n"


def is_pair(op: Callable) -> bool:
    """Whether an op is one of `recurrent_<rule>` and `chunk_<rule>`, which the docstring of <rule> covers."""
    return op.__name__.startswith(("recurrent_", "chunk_"))


def public_functions(module: ModuleType) -> Iterator[Callable]:
    """The documented functions that a module or the modules of a package define, but for command lines."""
    names = [f"{module.__name__}.{info.name}" for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
    for one in (module, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))):
        for name, member in vars(one).items():
            is_own = inspect.isfunction(member) and member.__module__ == one.__name__
            if is_own and member.__doc__ and not name.startswith("_") and name != "main":
                yield member


def function(one: Callable, module: str) -> str:
    """The signature and docstring of a function."""
    signature = inspect.signature(one)
    result = annotation(signature.return_annotation, " -> ")
    arguments = arguments_of(signature)
    listed = f"{one.__name__}({', '.join(arguments)}){result}"
    if len(listed) > 100:
        listed = "\n".join([f"{one.__name__}(", *(f"    {line}," for line in arguments), f"){result}"])
    return f"### `{module}.{one.__name__}`\n\n```python\n{listed}\n```\n\n{docstring(one)}"


def arguments_of(signature: inspect.Signature) -> list[str]:
    """Each parameter as it is written in a signature, with the `*` before keyword-only ones."""
    lines, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
        stars = "*" * ((parameter.kind is parameter.VAR_POSITIONAL) + 2 * (parameter.kind is parameter.VAR_KEYWORD))
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
        lines.append(f"{stars}{parameter.name}{annotation(parameter.annotation, ': ')}{default}")
    return lines


def annotation(kind: object, sign: str) -> str:
    """An annotation after its sign, or nothing."""
    if kind is inspect.Signature.empty:
        return ""
    return sign + (kind if isinstance(kind, str) else inspect.formatannotation(kind))


def docstring(documented: object) -> str:
    """The first paragraph as prose, the rest (arguments, results, errors) as it is."""
    first, _, rest = (inspect.getdoc(documented) or "").partition("\n\n")
    prose = " ".join(first.split())
    return f"{prose}\n" + (f"\n```text\n{rest}\n```\n" if rest else "")


if __name__ == "__main__":
    fresh = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(fresh, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != fresh:
        sys.exit(f"{PAGE.name} is out of date: python docs/api.py")
