"""The package as it is built: what it holds, what it needs, and the house rules that building depends on."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import lalm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"lalm": "lalm", "lalm.modeling": "modeling", "lalm.configuration": "configuration"}
RECIPES = {f"lalm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
PACKAGE_DATA = RECIPES | {
    "lalm/py.typed",
    "lalm/training/sts/default_pairs.tsv",
    "lalm/modeling/ops/kernels/blocks.h",
    "lalm/modeling/ops/kernels/delta_blocks.h",
    "lalm/modeling/ops/kernels/delta_channels.cpp",
    "lalm/modeling/ops/kernels/delta_driver.h",
    "lalm/modeling/ops/kernels/delta_rule.cpp",
    "lalm/modeling/ops/kernels/delta_rule.h",
    "lalm/modeling/ops/kernels/diagonal.cpp",
    "lalm/modeling/ops/kernels/diagonal.h",
    "lalm/modeling/ops/kernels/activation.cpp",
    "lalm/modeling/ops/kernels/kernel.h",
    "lalm/modeling/ops/kernels/few_rows.cpp",
    "lalm/modeling/ops/kernels/lam_gates.cpp",
    "lalm/modeling/ops/kernels/rms_norm.cpp",
    "lalm/modeling/ops/kernels/short_conv.cpp",
    "lalm/modeling/ops/kernels/taylor.h",
}
OPTIONAL = (
    "triton",
    "fla",
    "peft",
    "matplotlib",
    "trackio",
    "tensorboard",
    "wandb",
    "sentence_transformers",
    "sklearn",
    "scipy",
)


def package_files():
    """Every Python file of the package by its real place; os.walk does not enter the symlinks in lalm/."""
    for folder in FOLDERS.values():
        for where, _, names in os.walk(ROOT / folder):
            yield from (Path(where) / name for name in names if name.endswith(".py"))


SOURCES = sorted(package_files())
PER_FILE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "lalm" else ("lalm", *parts)).removesuffix(".__init__")


def test_package_list_matches_the_folders():
    settings = PROJECT["tool"]["setuptools"]
    modules = {module_name(path / "__init__.py") for path in {p.parent for p in SOURCES}}
    assert set(settings["packages"]) == modules | {"lalm.recipes"}, "recipes are files without a module"
    assert settings["package-dir"] == FOLDERS | {"lalm.recipes": "recipes"}
    assert {str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").is_file()} == set()


def test_symlinks_show_one_plain_package():
    for name in ("modeling", "configuration"):
        assert (ROOT / "lalm" / name).is_symlink()
        assert (ROOT / "lalm" / name).resolve() == ROOT / name


def test_base_names_are_unique():
    """The files of a checkpoint have the names of the modules, and so have names that two of them define."""
    names = Counter(path.name for path in SOURCES if path.parts[len(ROOT.parts)] != "lalm")
    names.pop("__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


@PER_FILE
def test_imports_follow_the_house_rules(path):
    source = path.read_text(encoding="utf-8")
    # transformers finds imports with a regular expression, in docstrings too, and looks for flat siblings
    assert not re.search(r"^\s*(from\s+\.|import\s+\.)", source, flags=re.MULTILINE)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in modules if name.split(".")[0] in ("modeling", "configuration", "tests", "run_clm")]


LAYERS = {
    "modeling/ops": ("lalm.modeling.ops",),
    "modeling": ("lalm.modeling", "lalm.configuration"),
    "configuration": ("lalm.configuration", "lalm.hub"),
}


@PER_FILE
def test_dependencies_point_one_way(path):
    folder = re.sub(r"^(modeling/ops)/.*", r"\1", str(path.parent.relative_to(ROOT)))
    if folder in LAYERS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = [name for name in imported if name.split(".")[0] == "lalm"]
        # hub is the one exception below the top: saving a model asks it, if it is installed, for the code
        assert [name for name in ours if not name.startswith((*LAYERS[folder], "lalm.hub"))] == []


def test_version_is_written_once():
    assert PROJECT["project"]["version"] == lalm.__version__
    assert f"version: {lalm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split(r"[=; ]", line)[0] for line in pins if not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["dev"] + extras["sts"] + extras["track"]
    names = {
        re.match(r"[A-Za-z0-9_.-]+", requirement)[0] for requirement in wanted if "python_version" not in requirement
    }
    assert names - {"setuptools"} <= pinned


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of a copy of the tree that has no symlinks, and the wheel built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "docs").mkdir()
    for name in ("pyproject.toml", "docs/package.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for folder in ("configuration", "modeling", "lalm", "recipes"):
        skip = ("__pycache__", *(FOLDERS.values() if folder == "lalm" else ()))
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*skip))
    run_backend("build_sdist", tree)
    (sdist,) = tree.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    run_backend("build_wheel", source)
    (wheel,) = source.glob("*.whl")
    return wheel


def run_backend(hook, folder):
    code = f"import setuptools.build_meta as backend; backend.{hook}('.')"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built).namelist())
    modules = {f"{module_name(path).replace('.', '/')}" for path in SOURCES}
    expected = {f"{name}/__init__.py" if (f"{name}/__init__.py") in names else f"{name}.py" for name in modules}
    assert {name for name in names if ".dist-info/" not in name} == expected | PACKAGE_DATA
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_imports_and_builds_a_model_without_optional_packages(built, tmp_path):
    """On a machine that has none of the extras; the installed copy of lalm is not the one that is imported."""
    zipfile.ZipFile(built).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import lalm
assert lalm.__file__.startswith({str(tmp_path)!r}), lalm.__file__
for row in lalm.VARIANTS:
    row.models["AutoModel"](row.config(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
print(*(row.config.model_type for row in lalm.VARIANTS))
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [row.config.model_type for row in lalm.VARIANTS]


@pytest.mark.slow
def test_commands_of_the_wheel(built, tmp_path):
    """Entry points, and a recipe of the package by its name, far from the repository."""
    archive = zipfile.ZipFile(built)
    archive.extractall(tmp_path)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert re.findall(r"lalm-(\w+) = lalm.__main__:(\w+)", archive.read(entry_points).decode()) == [
        ("clm", "clm"),
        ("sts", "sts"),
    ]
    found = run_lalm(tmp_path, "clm", "demo_gla", "--max_stepz", "3")
    assert (found.returncode, found.stderr) == (
        2,
        "error: unknown argument '--max_stepz' (did you mean 'max_steps'?)\n",
    )
    found = run_lalm(tmp_path, "clm", "gla_wikitext")
    assert found.stderr.startswith("error: cannot read the recipe gla_wikitext: there is no such file (did you mean")
    found = run_lalm(tmp_path, "cml")
    assert found.stderr.startswith("error: there is no command 'cml' (did you mean 'clm'?)")


def run_lalm(folder, *words):
    command = [sys.executable, "-m", "lalm", *words]
    environment = os.environ | {"PYTHONPATH": str(folder), "LALM_DEBUG": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_page_of_the_package_index_has_no_links_into_the_repository():
    page = ROOT / PROJECT["project"]["readme"]
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []
