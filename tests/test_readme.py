"""The commands of the documentation exist and parse, its Python runs, and what it names is there."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lalm
from lalm import GLAConfig, GLAForCausalLM
from lalm.training.clm.arguments import parse_arguments
from lalm.training.sts.arguments import parse_sts_arguments

ROOT = Path(__file__).resolve().parents[1]
# Pages whose commands must parse, and whose Python must run from top to bottom.
GUIDES = (
    "README.md",
    "docs/package.md",
    "docs/using.md",
    "docs/training.md",
    "docs/example_gla.md",
    "docs/transformers_models.md",
)
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
GENERATED = ("docs/variant_tables.py", "docs/api.py")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for page in GUIDES for block in blocks(page, "bash") for line in block.splitlines()]
MAKE = sorted(
    {match for page in PAGES for match in re.findall(r"\bmake (demo|test|check|bench|audit|soak|help)\b", read(page))}
)
CLM, STS = r"(?:run_clm.py|lalm-clm|lalm clm) (.*)", r"(?:run_sts.py|lalm-sts|lalm sts) (.*)"
RUN_CLM, RUN_STS = ([match[1] for line in COMMANDS if (match := re.search(kind, line))] for kind in (CLM, STS))
MODULES = sorted({match for line in COMMANDS for match in re.findall(r"python -m ([\w.]+)", line)})


def test_the_two_commands_are_there():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(RUN_CLM) >= 2


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_exist(target):
    run = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_make_help_names_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {"demo", "test", "check", "bench"} <= set(re.findall(r"^make (\w+)", shown, flags=re.MULTILINE))


@pytest.mark.parametrize("command", RUN_CLM)
def test_training_commands_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    model, data, training = parse_arguments([word.replace("runs/", f"{tmp_path}/") for word in words])
    assert training.do_train or model.compare_with
    assert model.model_type or model.model_name_or_path or training.stage or not words[0].startswith("-")
    # These show that no text need be named: a demo, a model of a small size, and models whose runs have named theirs.
    named = data.dataset_name or data.train_file or model.compare_with
    assert named or words[0] in ("demo_gla", "--model_type")


@pytest.mark.parametrize("command", RUN_STS)
def test_commands_of_the_sentence_encoders_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    model, _, training = parse_sts_arguments([word.replace("runs/", f"{tmp_path}/") for word in words])
    assert training.stage or training.eval_only
    name = model.model_name_or_path
    assert training.stage or (ROOT / name / "modules.json").is_file()
    assert name is None or name.startswith((str(tmp_path), "checkpoints/")), name


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder with a checkpoint in runs/demo, as `make demo` leaves it, but tiny and untrained."""
    folder = tmp_path_factory.mktemp("readme")
    words = ["<pad>", "<s>", "</s>", "<unk>", "The", "for", "statement", "A", "class"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "runs/demo")
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    GLAForCausalLM(GLAConfig(**sizes, pad_token_id=0)).save_pretrained(folder / "runs/demo")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


def run_python(page):
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/package.md", "docs/training.md"])
def test_python_blocks_run(page, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    assert isinstance(run_python(page)["model"], GLAForCausalLM)


def test_python_blocks_of_the_guide_run_in_order(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    assert AutoTokenizer.from_pretrained("runs/demo").pad_token_id == 0
    names = run_python("docs/using.md")
    assert names["loss"].isfinite()
    assert "generated_text" in capsys.readouterr().out
    assert type(names["classifier"]) is lalm.LinearAttentionForSequenceClassification
    assert isinstance(names["model"], GLAForCausalLM)


def test_the_example_with_a_model_of_transformers_runs(capsys):
    names = run_python("docs/transformers_models.md")
    assert names["model"].config.model_type == "qwen3_5_text"
    assert "torch.Size([1, 7" in capsys.readouterr().out  # up to 8 new tokens behind 64


def test_the_example_trains_and_shows_its_gates(capsys):
    names = run_python("docs/example_gla.md")
    assert names["losses"][-1] < names["losses"][0] - 2
    assert sorted(names["gates"]) == [0, 1]
    assert all(((gate > 0) & (gate < 1)).all() for gate in names["gates"].values())
    assert names["output"].sequences.shape == (1, 98)
    assert (names["recurrent"] - names["chunk"]).abs().max() < 1e-12
    assert "half-lives" in capsys.readouterr().out


def test_every_variant_and_feature_map_is_listed():
    options = read("docs/models.md")
    for row in lalm.VARIANTS:
        assert f"`{row.config.model_type}`" in read("README.md")
        assert f"`{row.config.model_type}`" in options
    feature_maps = get_args(lalm.LinearAttentionConfig.__dataclass_fields__["feature_map"].type)
    assert len(feature_maps) > 5
    assert [name for name in feature_maps if name not in options] == []


def test_fields_in_the_table_exist():
    options = read("docs/models.md")
    table = options[options.index("| fields | meaning |") : options.index("A misspelt field")]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:] if line))
    assert len(named) > 20
    assert set(named) <= set(lalm.LalmConfig.__dataclass_fields__)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])
def test_links_and_paths_lead_somewhere(page):
    text = read(page)
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text) if not link.startswith("http")]
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).exists()] == []
    paths = re.findall(r"`((?:modeling|configuration|tests|lalm|docs|recipes|experiments|benchmarks)/[\w/.]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_the_commands_exist(module):
    assert importlib.util.find_spec(module)


@pytest.mark.slow
@pytest.mark.parametrize("script", GENERATED)
def test_generated_pages_are_up_to_date(script):
    check = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


XEON = ("2026-11-21-cpu-late", "2026-11-21-cpu-late-train-8192")
EPYC = ("2026-11-22-cpu-zen5-last",)


def speed_rows(results):
    """The rows of a speed table, from results files of which the last one counts."""
    columns = [f"{what}_{length}" for what in ("train", "prefill") for length in (512, 2048, 8192)] + [
        "decode",
        "memory",
    ]
    ratios = {}
    for name in results:
        for line in json.loads(read(f"benchmarks/results/{name}.json"))["lines"]:
            if line["case"] in columns and line["baseline"].startswith("llama"):
                ratios[line["ours"].split()[0], line["case"]] = f"{line['ratio']['median']:.2f}"
    models = list(dict.fromkeys(model for model, _ in ratios))
    return [f"| `{model}` | {' | '.join(ratios[model, column] for column in columns)} |" for model in models]


@pytest.mark.parametrize(("page", "tables"), [("README.md", [XEON]), ("docs/speed.md", [XEON, EPYC])])
def test_speed_tables_hold_what_was_measured(page, tables):
    shown = [line for line in read(page).splitlines() if re.fullmatch(r"\| `\w+` (\| \d+\.\d\d ){8}\|", line)]
    assert shown == [row for results in tables for row in speed_rows(results)]


def test_the_readme_is_one_page():
    assert len(read("README.md").splitlines()) <= 150


def test_every_promise_names_a_test_that_exists():
    """docs/reliability.md: `[test_name](../tests/file.py)`."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", text)
    assert len(named) > 30
    for name, file in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (name, file)
    for line in re.findall(r"^\| .* \|$", text, re.MULTILINE):
        assert "[test_" in line or line == "| promise | test |", line
