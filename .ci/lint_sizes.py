"""The limits of size that the code keeps: lines of a file and of a function, parameters, entries of a folder.

A public op may have as many parameters as its rule has inputs, a function that stands in for one of transformers has
those of that one, and a Triton kernel takes each pointer by itself.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["lalm", "modeling", "configuration", "experiments", "benchmarks", ".ci"]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 70, 10
SIGNATURES_OF_OTHERS = "lalm/transformers_models/functions.py"
ENTRIES = {"modeling/ops": 14, "lalm/training": 20}


def public_ops() -> set[str]:
    tree = ast.parse((ROOT / "modeling/ops/__init__.py").read_text(encoding="utf-8"))
    return {name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def findings(path: Path, ops: set[str]) -> list[str]:
    source = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT)
    lines = source.count("\n")
    found = [f"{where}: {lines} lines, {FILE_LINES} allowed"] if lines > FILE_LINES else []
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"{where}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} allowed")
        arguments = node.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        is_given = node.name in ops or is_kernel(node) or str(where) == SIGNATURES_OF_OTHERS
        if count > PARAMETERS and not is_given:
            found.append(f"{where}:{node.lineno}: {node.name} has {count} parameters, {PARAMETERS} allowed")
    return found


def main() -> int:
    ops = public_ops()
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    found = [line for path in paths if path.suffix in {".py", ".cpp", ".h"} for line in findings(path, ops)]
    for folder, allowed in ENTRIES.items():
        entries = [entry for entry in (ROOT / folder).iterdir() if entry.name != "__pycache__"]
        if len(entries) > allowed:
            found.append(f"{folder}: {len(entries)} entries, {allowed} allowed")
    print(*found, f"sizes: {len(found)} findings", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
