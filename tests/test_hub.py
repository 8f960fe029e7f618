"""Checkpoints carry the code they need, load where lalm is missing, and a failed save leaves the old one whole."""

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import lalm
from lalm import bundle, hub
from lalm.configuration.configuration_gla import GLAConfig
from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.modeling.modeling_gla import GLAForCausalLM
from lalm.modeling.ops import cpp_kernels as cpp

KERNELS = Path(cpp.__file__).with_name("kernels")
SCRIPT = Path(__file__).with_name("load_without_lalm.py")
INPUT_IDS = torch.arange(6)[None]
VARIANTS = pytest.mark.parametrize("variant", lalm.VARIANTS, ids=lambda row: row.config.model_type)


def tiny_config(config_class, **fields):
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    # One softmax layer (of the local-global model: head), so that its code path is in the bundle's tests too.
    softmax = {"num_local_heads": 1} if config_class is LocalGlobalConfig else {"full_attention_layers": [1]}
    return config_class(**sizes, **softmax, pad_token_id=0, **fields)


def tiny_model(fields=None):
    return GLAForCausalLM(tiny_config(GLAConfig, **(fields or {}))).eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def run_without_lalm(tasks, folder):
    """Run the tasks in one process that starts elsewhere, finds no lalm and has a module cache of its own."""
    tasks_file = folder / "tasks.json"
    tasks_file.write_text(json.dumps(tasks))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(SCRIPT), str(tasks_file)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def expected_output(model):
    with torch.no_grad():
        return model(INPUT_IDS)[0]


@pytest.fixture(scope="module")
def plain_torch():
    """Without the C++ kernels, which stay with lalm: their last bits are others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LALM_CPP", "0")
        cpp._plan.cache_clear()
        yield
    cpp._plan.cache_clear()


@pytest.fixture(scope="module")
def remote(tmp_path_factory, plain_torch):
    """Every head of every variant saved, loaded without lalm and saved again there, then loaded once more."""
    folder = tmp_path_factory.mktemp("remote")
    tasks, again, expected = [], [], {}
    for row in lalm.VARIANTS:
        for head, model_class in row.models.items():
            name = f"{row.config.model_type}-{head}"
            model = model_class(tiny_config(row.config, is_causal=head != "AutoModelForMaskedLM")).eval()
            model.save_pretrained(folder / name)
            expected[name] = expected_output(model)
            if head == "AutoModelForCausalLM":
                expected[f"{name}-body"] = expected_output(model.model)
                expected[f"{name}-generated"] = model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False)
                body = {"path": str(folder / name), "auto_class": "AutoModel"}
                tasks.append(body | {"output": str(folder / f"{name}-body.out")})
            task = {"auto_class": head, "path": str(folder / name), "output": str(folder / f"{name}.out")}
            tasks.append(task | {"resave": str(folder / f"{name}-resaved")})
            again.append(task | {"path": str(folder / f"{name}-resaved"), "output": str(folder / f"{name}-again.out")})
    run_without_lalm(tasks, folder)
    run_without_lalm(again, folder)
    return folder, expected


HEADS = [(row.config.model_type, head) for row in lalm.VARIANTS for head in row.models]


@pytest.mark.parametrize(("model_type", "head"), HEADS)
@pytest.mark.parametrize("round_trip", ["saved", "resaved"])
@pytest.mark.slow
def test_every_head_loads_without_lalm(remote, model_type, head, round_trip):
    folder, expected = remote
    name = f"{model_type}-{head}"
    got = load_file(folder / (f"{name}.out" if round_trip == "saved" else f"{name}-again.out"))
    torch.testing.assert_close(got["output"], expected[name], rtol=0, atol=0)
    if head == "AutoModelForCausalLM":
        assert got["generated"].tolist() == expected[f"{name}-generated"].tolist()


@VARIANTS
@pytest.mark.slow
def test_auto_model_loads_a_saved_causal_lm_without_lalm(remote, variant):
    folder, expected = remote
    name = f"{variant.config.model_type}-AutoModelForCausalLM-body"
    torch.testing.assert_close(load_file(folder / f"{name}.out")["output"], expected[name], rtol=0, atol=0)


@VARIANTS
def test_folder_holds_exactly_the_code_of_the_variant(tmp_path, variant):
    config = tiny_config(variant.config)
    config.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    names = {f"{cls.__module__.rpartition('.')[2]}.py" for cls in (variant.config, *variant.models.values())}
    late = {"dual_state_triton.py"} if variant.config is lalm.LamConfig else set()
    assert written == names | late | {"linear_attention_ops.py"}
    text = (tmp_path / "linear_attention_ops.py").read_text()
    for kernel in ("kernel.h", "rms_norm.cpp", "few_rows.cpp"):  # what every variant runs on a CPU
        assert (KERNELS / kernel).read_text() in text
    for file in tmp_path.glob("*.py"):
        # transformers' own reading of the file: no import that needs lalm, no sibling that is missing
        assert "lalm" not in get_imports(file), file.name
        assert {f"{name}.py" for name in get_relative_imports(file)} <= written, file.name
    others = {f"{row.config.__module__.rpartition('.')[2]}.py" for row in lalm.VARIANTS if row is not variant}
    assert not written & others


@pytest.mark.parametrize("name", ["lam-minilm-l6", "lam-minilm-l6-long"])
def test_the_code_of_a_checkpoint_is_that_of_the_package(name):
    folder = Path(__file__).parents[1] / "checkpoints" / name
    (row,) = [row for row in lalm.VARIANTS if row.config is lalm.LamConfig]
    modules = sorted({cls.__module__ for cls in (row.config, *row.models.values())})
    wanted = bundle.checkpoint_sources(*modules)
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert written == wanted, f"run lalm.hub.export_code(LamConfig.from_pretrained(c), c) for c = {str(folder)!r}"


@VARIANTS
def test_auto_map_names_every_head_and_reloads(tmp_path, variant):
    tiny_config(variant.config).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *variant.models}
    assert auto_map["AutoModel"].endswith(f".{variant.models['AutoModel'].__name__}")
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is variant.config
    assert loaded.auto_map == auto_map


@pytest.mark.parametrize("trust", [None, True, False])
def test_installed_code_wins_and_asks_for_no_trust(tmp_path, trust):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_gla.py").write_text("raise RuntimeError('the checkpoint code ran')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(loaded) is GLAForCausalLM
    torch.testing.assert_close(expected_output(loaded), expected_output(model), rtol=0, atol=0)


def test_stale_repository_references_are_replaced_and_a_users_own_head_stays(tmp_path):
    config = tiny_config(GLAConfig)
    config.auto_map = {
        "AutoModel": "someone/old-repo--modeling_gla.GLAModel",
        "AutoModelForMultipleChoice": "my_head.GLAForMultipleChoice",
        "AutoModelForVision2Seq": "someone/old-repo--other.Other",
    }
    (tmp_path / "my_head.py").write_text("# a head of the user's own, put here by transformers before the config\n")
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_gla.GLAModel"
    assert auto_map["AutoModelForMultipleChoice"] == "my_head.GLAForMultipleChoice"
    assert not [reference for reference in auto_map.values() if "--" in reference]


COPIES = """
import sys
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from lalm import GLAConfig, GLAForCausalLM
from lalm.modeling.ops.kernels import kernel_op

sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
model = GLAForCausalLM(GLAConfig(**sizes, expand_k=8, expand_v=8, linear_attn_implementation="cpp")).eval()
ids, spaces = torch.arange(6)[None], {kernel_op._library.ns}
for folder in sys.argv[1:]:
    model.save_pretrained(folder)
    copy = get_class_from_dynamic_module("modeling_gla.GLAForCausalLM", folder)
    ops = sys.modules[copy.__module__.rpartition(".")[0] + ".linear_attention_ops"]
    assert copy is not GLAForCausalLM
    torch.testing.assert_close(copy.from_pretrained(folder).eval()(ids).logits, model(ids).logits)
    inputs = [-torch.rand(1, 3, 1, 32) for _ in range(4)]
    found = ops._diagonal.registered(*inputs, None, None, None, 1.0, None, False, False)
    assert torch.equal(found[0], ops.gla(*inputs, 1.0, implementation="cpp")[0])
    spaces.add(ops._library.ns)
assert len(spaces) == 3, spaces
"""


@pytest.mark.skipif(cpp.load_kernel("rms_norm") is None, reason="no C++ compiler on this machine")
def test_copies_of_the_code_in_one_process_have_ops_of_their_own(tmp_path):
    """lalm and two checkpoints: each registers its kernels with torch, all run, and none disturbs another. In a
    process of its own: what a copy registers with transformers stays."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("LALM_CPP", None)  # which other tests set
    command = [sys.executable, "-c", COPIES, str(tmp_path / "one"), str(tmp_path / "two")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_class_that_is_not_ours_gets_no_code(tmp_path):
    class OtherConfig(GLAConfig):
        model_type = "other"

    hub.export_code(tiny_config(OtherConfig), tmp_path)
    assert not list(tmp_path.iterdir())


def test_trainer_save_model_carries_the_code(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    Trainer(model=tiny_model(), args=arguments).save_model(str(tmp_path / "run"))
    code = {"configuration_gla.py", "linear_attention_ops.py", "modeling_gla.py"}
    assert code | {"config.json", "model.safetensors"} <= set(contents(tmp_path / "run"))


def test_a_peft_adapter_is_saved_without_code(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear", r=2))
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("limit_bytes", [500, 20_000])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_whole(tmp_path, limit_bytes):
    """The first limit stops at the code or config.json, the second at the weights."""
    tiny_model().save_pretrained(tmp_path)
    before = contents(tmp_path)
    other = tiny_model({"gate_logit_normalizer": 8})
    other.resize_token_embeddings(400)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        with pytest.raises(OSError, match="Could not save to .* before is untouched"):
            other.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_a_path_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "checkpoint"
    file.write_text("something")
    with pytest.raises(OSError, match="Could not save to .*checkpoint: File exists"):
        hub.export_code(tiny_config(GLAConfig), file)
    assert file.read_text() == "something"


def test_weights_of_an_older_save_do_not_shadow_the_new_ones(tmp_path):
    first, second = tiny_model(), tiny_model()
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        expected_output(AutoModelForCausalLM.from_pretrained(tmp_path)), expected_output(second), rtol=0, atol=0
    )
    first.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*") if path.suffix != ".py"] == ["model.safetensors"]


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """The module made of sources by name, which `merge` joins in their order."""

    def run(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        text, _ = bundle.merge("one", tuple(sources), {})
        module = types.ModuleType("one")
        exec(compile(text, "one", "exec"), vars(module))
        return module

    yield run
    bundle._parse.cache_clear()


def test_modules_that_define_the_same_name_keep_their_own(merged):
    module = merged(
        first="_SIZE = 1\n\n\ndef _helper():\n    return _SIZE\n\n\ndef one():\n    return _helper()\n",
        second="_SIZE = 2\ndef _helper():\n    return 10 * _SIZE\ndef two(é='é', _=_SIZE):\n    return _helper()\n",
        third="class _helper:\n    def get(self):\n        return _helper, 'ü', [_helper for _ in range(2)]\n",
    )
    assert (module.one(), module.two()) == (1, 20)
    assert module._helper_third().get()[2] == [module._helper_third] * 2


@pytest.mark.parametrize(
    "source",
    [
        "def _same():\n    return 2\n\n\ndef f(_same):\n    return _same\n",
        "def _same():\n    return 2\n\n\ndef f():\n    _same = 3\n    return _same\n",
        "_same = 2\nx = f'{_same}'\n",
        "from math import pi as _same\n",
    ],
    ids=["argument", "local", "f-string", "import"],
)
def test_a_name_that_cannot_be_changed_is_named(merged, source):
    with pytest.raises(ValueError, match="second: _same is defined in another module too"):
        merged(first="_same = 1\n", second=source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1; from lalm.modeling.ops.diagonal.gla import chunk_gla\n", "awkward, line 1: give this import a line"),
        ("from lalm.modeling.ops.diagonal.gla import chunk_gla; x = 1\n", "awkward, line 1: give this import a line"),
        ("from lalm.modeling import ops\n", "lalm.modeling is not a module with a source file"),
    ],
)
def test_an_import_that_cannot_be_rewritten_is_named(tmp_path, monkeypatch, source, message):
    (tmp_path / "awkward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    bundle._parse.cache_clear()
    with pytest.raises(ValueError, match=message):
        bundle.checkpoint_sources("lalm.configuration.configuration_gla", "awkward")
