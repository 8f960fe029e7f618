# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The code of a checkpoint: modules of the package merged into a few files, with the C++ kernels as strings.

transformers copies the files that a checkpoint's code imports, one warning each, and no others: a folder of modules
would load slowly and without its C++ sources. `merge` joins them by their syntax trees and keeps their text, comments
too. Names that two modules define differently get the name of their module as a suffix.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGE = re.compile(r"lalm\.(modeling|configuration)\b")
_KERNELS = "KERNEL_SOURCES"  # the name in cpp_kernels.py whose value becomes a literal here
_OPS = "linear_attention_ops"  # the file of the modules below the models
_FUTURE = "from __future__ import annotations\n"


@dataclass
class _Module:
    """A module of the package, parsed."""

    name: str
    source: str
    tree: ast.Module = field(repr=False)

    def imports(self, inside_functions: bool) -> list[ast.ImportFrom]:
        """Its imports from the package, at its top level or inside functions, where they run late or never."""
        top = [node for node in self.tree.body if isinstance(node, ast.ImportFrom)]
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)] if inside_functions else top
        skip = top if inside_functions else []
        return [node for node in found if node not in skip and _PACKAGE.match(node.module or "")]

    def bindings(self) -> dict[str, str]:
        """What its top level binds: names, and where each comes from."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = self.name
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.partition(".")[0]: f"import {alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not _PACKAGE.match(node.module or ""):
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif not isinstance(node, ast.ImportFrom | ast.Expr):
                stored = [x for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
                found |= {x.id: self.name for x in stored}
        return found


@functools.cache
def _parse(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise ValueError(f"{name} is not a module with a source file: import names from the file that defines them.")
    source = Path(spec.origin).read_text(encoding="utf-8")
    return _Module(name, source, ast.parse(source))


def module_order(*names: str) -> tuple[list[str], list[str]]:
    """The modules and all that they import from the package, each after what it imports, and those that are only
    imported inside functions."""
    order: list[str] = []
    late: list[str] = []

    def visit(name: str, into: list[str]) -> None:
        if name in order or name in late:
            return
        module = _parse(name)
        for node in module.imports(inside_functions=False):
            visit(str(node.module), into)
        into.append(name)

    for name in names:
        visit(name, order)
    for name in order.copy():
        for node in _parse(name).imports(inside_functions=True):
            visit(str(node.module), late)
    return order, late


def merge(target: str, names: Iterable[str], elsewhere: dict[str, tuple[str, dict[str, str]]]) -> tuple[str, dict]:
    """One source of the modules `names`, in their order.

    Args:
        target: the file's name without ending.
        elsewhere: for modules that lie in other files, the file and the new names of what they define.

    Returns:
        The source, and for every module `(target, {old name: new name})`.

    Raises:
        ValueError: an import or a name that cannot be rewritten.
    """
    modules, places = [_parse(name) for name in names], dict(elsewhere)
    owners: dict[str, str] = {}
    for module in modules:
        renamed = {}
        for name, origin in module.bindings().items():
            if owners.setdefault(name, origin) != origin:
                renamed[name] = f"{name}_{_short(module.name)}"
        places[module.name] = (target, renamed)
    parts = [_section(module, target, places) for module in modules]
    header = "# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.\n"
    note = "# Generated when a model is saved, from the package lalm, which is where to change it.\n"
    future = _FUTURE if any(_FUTURE in module.source for module in modules) else ""
    return "\n\n".join([header + note + future, *parts]), {module.name: places[module.name] for module in modules}


def _section(module: _Module, target: str, places: dict) -> str:
    """The text of a module with imports from the package and changed names rewritten."""
    lines = module.source.splitlines(keepends=True)
    edits = list(_renames(module, places[module.name][1]))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            edits.append((node.lineno, 0, node.end_lineno, None, ""))
        elif isinstance(node, ast.ImportFrom) and _PACKAGE.match(node.module or ""):
            _check_alone(module, node, lines)
            indent = " " * node.col_offset
            edits.append((node.lineno, 0, node.end_lineno, None, _new_import(node, target, places, indent)))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == _KERNELS:
            edits.append((node.lineno, 0, node.end_lineno, None, f"{_KERNELS}: dict[str, str] = _KERNELS_HERE\n"))
    for first, start, last, stop, text in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        if stop is None:  # whole lines
            lines[first - 1 : last] = [text] if text else []
        else:
            line = lines[first - 1].encode()
            lines[first - 1] = (line[:start] + text.encode() + line[stop:]).decode()
    text = "".join(line for line in lines if not line.startswith("# Copyright"))
    return f"# ---- {module.name} ----\n{text.strip()}\n"


def _check_alone(module: _Module, node: ast.ImportFrom, lines: list[str]) -> None:
    """Raise ValueError if an import, which is replaced by whole lines, shares one with other code."""
    assert node.end_lineno is not None
    before = lines[node.lineno - 1].encode()[: node.col_offset].strip()
    after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].strip()
    if before or (after and not after.startswith(b"#")):
        raise ValueError(f"{module.name}, line {node.lineno}: give this import a line of its own.")


def _new_import(node: ast.ImportFrom, target: str, places: dict, indent: str) -> str:
    file, renamed = places[str(node.module)]
    lines, names = [], []
    for alias in node.names:
        new, local = renamed.get(alias.name, alias.name), alias.asname or alias.name
        if file == target:
            if new != local:
                lines.append(f"{indent}{local} = {new}\n")
        else:
            names.append(new if new == local else f"{new} as {local}")
    if names:
        lines.append(f"{indent}from .{file} import {', '.join(names)}\n")
    return "".join(lines)


def _renames(module: _Module, renamed: dict[str, str]):
    """Edits `(line, start, line, stop, text)` that give the module's own names their new ones."""
    for top in module.tree.body:
        if isinstance(top, ast.FunctionDef | ast.ClassDef) and top.name in renamed:
            start = top.col_offset + len("def " if isinstance(top, ast.FunctionDef) else "class ")
            yield top.lineno, start, top.lineno, start + len(top.name), renamed[top.name]
    for name in _fixed_names(module.tree) & renamed.keys():
        raise ValueError(f"{module.name}: {name} is defined in another module too and cannot be renamed: rename it.")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id in renamed:
            yield node.lineno, node.col_offset, node.lineno, node.end_col_offset, renamed[node.id]


def _fixed_names(tree: ast.Module) -> set[str]:
    """Names that `_renames` cannot change: what is imported from outside the package, what is local to a function, and
    what stands in an f-string, whose places Python 3.11 does not tell."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not _PACKAGE.match(getattr(node, "module", None) or ""):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef):
            found |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        elif isinstance(node, ast.JoinedStr):
            found |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    return found


def kernels_of(names: Iterable[str]) -> dict[str, str]:
    """The C++ sources that the modules name, and their headers, by file name."""
    from lalm.modeling.ops.cpp_kernels import KERNEL_SOURCES, kernel_files  # not at the top: lalm imports this module

    users = [_parse(name).tree for name in names if _short(name) != "cpp_kernels"]
    constants = [x.value for tree in users for x in ast.walk(tree) if isinstance(x, ast.Constant)]
    kernels = {word for word in constants if isinstance(word, str) and f"{word}.cpp" in KERNEL_SOURCES}
    return {file: KERNEL_SOURCES[file] for file in sorted({file for name in kernels for file in kernel_files(name)})}


@functools.cache
def checkpoint_sources(*modules: str) -> dict[str, str]:
    """The files that the models and configurations defined in `modules` need along with their weights, by name: the
    configuration, the model, its ops with the C++ sources that they use, and what is imported inside functions.

    Raises:
        ValueError: an import or a name that cannot be rewritten.
    """
    order, late = module_order(*modules)
    config = [name for name in order if name.startswith("lalm.configuration.")]
    # transformers reads the annotation `config: <class>` of a model class, which must not be a string there.
    ops = [name for name in order if name not in config and _FUTURE in _parse(name).source]
    model = [name for name in order if name not in config and name not in ops]
    groups = {_short(config[-1]): config, _OPS: ops, _short(model[-1]): model}
    if late:
        groups[_short(late[-1])] = late
    places: dict[str, tuple[str, dict[str, str]]] = {name: (_short(late[-1]), {}) for name in late}
    files: dict[str, str] = {}
    for target, names in groups.items():
        files[f"{target}.py"], found = merge(target, names, places)
        places |= found
    sources = kernels_of(ops)
    literal = "".join(f"    {name!r}: r'''{text}''',\n" for name, text in sources.items())
    return {name: text.replace("_KERNELS_HERE", f"{{\n{literal}}}") for name, text in files.items()}


def _short(name: str) -> str:
    return name.rpartition(".")[2]
