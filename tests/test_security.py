"""Nothing from a user's file is unpickled or run, and no dependency has a licence that binds users."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("lalm/*.py", "lalm/[!mc]*/**/*.py", "lalm/convert/*.py", "modeling/**/*.py", "configuration/*.py")
    for path in ROOT.glob(folder)
] + [*ROOT.glob("experiments/*.py"), *ROOT.glob("run_*.py")]
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {"eval", "exec", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "read_pickle"}


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def faults_of(path: Path) -> list[str]:
    """The lines of a file that load, or run, more than data."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in PICKLES]
    for name, call in calls_of(path):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        unsafe = name in FORBIDDEN or (
            name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False"
        )
        if unsafe or (name == "torch.load" and given.get("weights_only") != "True") or given.get("shell") == "True":
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_no_file_is_unpickled():
    assert len(SOURCES) > 80
    assert {str(path): faults for path in SOURCES if (faults := faults_of(path))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_would_unpickle_is_found(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    assert faults_of(tmp_path / "a.py")


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("MIT License", False),
        ("Apache-2.0 AND MIT", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("GPL-3.0-only OR MIT", False),
        ("GPL-3.0-only AND MIT", True),
        ("GNU Lesser General Public License v3 (LGPLv3)", True),
        ("AGPL-3.0", True),
        ("Our own terms", True),
        ("", True),
    ],
)
def test_licences_that_are_refused(audit, licence, refused):
    assert audit.is_refused(licence) == refused


def test_all_that_is_needed_has_a_licence_that_binds_nobody(audit, capsys):
    assert audit.main() == 0, capsys.readouterr().out
    lines = capsys.readouterr().out
    assert "torch " in lines
    assert "transformers " in lines
