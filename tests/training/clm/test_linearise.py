"""The stages end to end: a tiny random Llama becomes a linear student through the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm
from experiments import linearise
from lalm.convert.closed_forms import fit_output_projections, layer_sensitivity
from lalm.convert.softmax import from_softmax
from lalm.errors import UserError
from lalm.modeling.ops.sequence_layout import SequenceLayout
from lalm.training.clm.linearise import Distill, Transfer
from lalm.training.clm.packing import PackingCollator
from tests.training.conftest import sentences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with texts and a teacher of three layers that has learned them a little."""
    folder = tmp_path_factory.mktemp("linearise")
    for seed, (split, count) in enumerate({"train": 80, "validation": 12}.items()):
        (folder / f"{split}.txt").write_text("\n".join(sentences(count, seed)) + "\n", encoding="utf-8")

    def run(*flags, output):
        texts = ("--train_file", f"{folder}/train.txt", "--validation_file", f"{folder}/validation.txt")
        common = ("--block_size", "32", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--disable_tqdm")
        places = ("--output_dir", f"{folder}/{output}", "--cache_dir", f"{folder}/cache")
        return run_clm.main([*texts, *common, "true", *places, *flags])

    sizes = "hidden_size=16,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2,intermediate_size=24"
    run("--model_type", "llama", "--config_overrides", sizes, "--tokenizer_vocab_size", "300", "--max_steps", "60",
        "--learning_rate", "0.02", output="teacher")  # fmt: skip
    return folder, run


TRANSFER = ("--stage", "transfer", "--keep_softmax_layers", "1", "--config_overrides", "window_size=4,num_features=8")
TRANSFER += ("--learning_rate", "0.02", "--weight_decay", "0")


@pytest.fixture(scope="module")
def students(world):
    """Results of transfer and of distillation after it."""
    folder, run = world
    teacher = ("--teacher", f"{folder}/teacher")
    transfer = run(*TRANSFER, *teacher, "--max_steps", "12", output="transfer")
    distill = run("--stage", "distill", *teacher, "--model_name_or_path", f"{folder}/transfer", "--max_steps", "6",
                  "--learning_rate", "0.003", output="distill")  # fmt: skip
    return transfer, distill


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_transfer_trains_the_new_parameters_alone(world, students):
    folder, _ = world
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    own = {name.replace("self_attn", "mixer"): x for name, x in teacher.state_dict().items()}
    trained = load_file(folder / "transfer" / "model.safetensors")
    same = [name for name, x in trained.items() if name in own and torch.equal(x, own[name])]
    assert len(same) > 20
    assert {name.split(".")[-2] for name in trained if "_map." in name} == {"q_map", "k_map"}
    errors = json.loads((folder / "transfer" / "layer_errors_results.json").read_text())
    assert errors.keys() == {"0", "2"}
    assert (folder / "transfer" / "layer_errors.png").stat().st_size > 1000


def test_both_perplexities_stand_side_by_side(world, students):
    folder, _ = world
    transfer, distill = students
    assert transfer["teacher_eval_perplexity"] == distill["teacher_eval_perplexity"]
    assert 1 < transfer["teacher_eval_perplexity"] != transfer["eval_perplexity"]
    teacher = run_clm.main(["--model_name_or_path", f"{folder}/teacher", "--validation_file",
        f"{folder}/validation.txt", "--block_size", "32", "--do_eval", "--output_dir", f"{folder}/scored",
        "--cache_dir", f"{folder}/cache"])  # fmt: skip
    assert transfer["teacher_eval_perplexity"] == pytest.approx(teacher["eval_perplexity"], rel=1e-5)
    card = (folder / "distill" / "README.md").read_text(encoding="utf-8")
    assert f"teacher `{folder}/teacher` (licence: apache-2.0)" in card
    assert "validation, the teacher" in card


def test_the_student_loads_and_speaks_without_its_teacher(world, students):
    folder, _ = world
    student = AutoModelForCausalLM.from_pretrained(folder / "distill")
    tokenizer = AutoTokenizer.from_pretrained(folder / "distill")
    ids = tokenizer("linear attention keeps a state", return_tensors="pt").input_ids
    assert student.config.layer_types.count("full_attention") == 1
    assert student.generate(ids, max_new_tokens=5, min_new_tokens=5).shape[1] == ids.shape[1] + 5


def test_a_resumed_transfer_equals_a_straight_one(world):
    folder, run = world
    flags = (*TRANSFER, "--teacher", f"{folder}/teacher", "--save_steps", "2", "--do_train")
    run(*flags, "--max_steps", "4", output="straight")
    resumed = folder / "resumed"
    resumed.mkdir()
    for name in ("run.json", "checkpoint-2"):
        (resumed / name).symlink_to(folder / "straight" / name)
    run(*flags, "--max_steps", "4", output="resumed")
    assert losses(resumed) == losses(folder / "straight")
    one, two = (load_file(folder / name / "model.safetensors") for name in ("straight", "resumed"))
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def stage_of(world, make, **fields):
    folder, _ = world
    stock = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    teacher = from_softmax(stock, keep_softmax_layers=range(3))
    fields = fields or {"window_size": 4, "num_features": 8}
    stage = make(from_softmax(stock, **fields).train(), teacher)
    torch.manual_seed(0)
    item = {"input_ids": torch.randint(3, 200, (40,)).numpy(), "scored": [False] + [True] * 39, "starts": None}
    return stage, PackingCollator(40, 0)([item])


@pytest.mark.parametrize(
    ("make", "rate"), [(Transfer, 0.01), (lambda *pair: Distill(*pair, temperature=1.0, weight=1.0), 3e-4)]
)
def test_a_stage_learns(world, make, rate):
    """One block, again and again, from random feature maps."""
    stage, batch = stage_of(world, make)
    trained = [x for x in stage.student.parameters() if x.requires_grad]
    assert not [x for x in stage.teacher.parameters() if x.requires_grad]
    optimizer, values = torch.optim.Adam(trained, lr=rate), []
    for _ in range(25):
        loss = stage.student(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


def test_losses_are_their_definitions(world):
    stage, batch = stage_of(world, Transfer)
    student, teacher, ids = stage.student, stage.teacher, batch["input_ids"]
    found = student(**batch).loss
    states, errors = teacher.model(ids, output_hidden_states=True).hidden_states, []
    layout, rotary = SequenceLayout(), teacher.model._rotary_tables({"full_attention"}, torch.arange(40)[None])
    for index, block in enumerate(teacher.model.layers):
        x = block.mixer_norm(states[index])
        wanted, _ = block.mixer(x, layout=layout, rotary=rotary, masks={"full_attention": None})
        given, _ = student.model.layers[index].mixer(x, layout=layout, rotary=rotary)
        errors.append((given - wanted).square().sum() / wanted.square().sum())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-5, atol=1e-7)

    stage, batch = stage_of(world, lambda *pair: Distill(*pair, temperature=2.0, weight=0.7))
    ids = batch["input_ids"]
    own, other = (
        model.model(ids).last_hidden_state @ model.lm_head.weight.T for model in (stage.student, stage.teacher)
    )
    p, q = (other[:, :-1] / 2).softmax(-1), (own[:, :-1] / 2).log_softmax(-1)
    divergence = (p * (p.log() - q)).sum(-1).mean() * 4
    text = torch.nn.functional.cross_entropy(own[0, :-1], ids[0, 1:])
    torch.testing.assert_close(stage.student(**batch).loss, 0.7 * divergence + 0.3 * text, rtol=1e-4, atol=1e-6)


def test_a_gated_delta_student_learns_its_layers_and_leaves_the_teacher_alone(world):
    """Projections are fitted in closed form, trained by layer, and nothing else of the model moves."""
    folder, run = world
    flags = ("--stage", "transfer", "--teacher", f"{folder}/teacher", "--model_type", "lalm_delta_net",
             "--keep_softmax_layers", "auto:1", "--centroid_blocks", "4", "--weight_decay", "0")  # fmt: skip
    for decay in ("head", "channel"):
        run(*flags, "--config_overrides", f"decay={decay}", "--max_steps", "12", "--learning_rate", "0.01",
                      output=f"delta_{decay}")  # fmt: skip
        values = losses(folder / f"delta_{decay}")
        assert sum(values[-3:]) < 0.9 * sum(values[:3])
        student = AutoModelForCausalLM.from_pretrained(folder / f"delta_{decay}")
        assert (student.config.decay, student.config.layer_types.count("full_attention")) == (decay, 1)
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        first, second = student.model.layers[0], teacher.model.layers[0]
        assert torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)


def test_output_projections_are_those_of_least_squares(world):
    stage, batch = stage_of(world, Transfer, model_type="lalm_gla")
    student, teacher = stage.student.eval(), stage.teacher
    before = Transfer(student, teacher).loss(**batch).item()
    errors = fit_output_projections(student, teacher, [batch], ridge=1e-9)
    after = Transfer(student, teacher).loss(**batch).item()
    assert after < 0.8 * before
    assert after == pytest.approx(sum(errors.values()) / 3, rel=1e-3)
    with torch.no_grad():  # no other projection is better
        student.model.layers[1].mixer.o_proj.weight.mul_(1.01)
    assert Transfer(student, teacher).loss(**batch).item() > after


def test_sensitivity_is_the_rise_of_the_loss(world):
    """A student whose layer 1 alone is spoilt; the teacher with that layer is a student with the others softmax."""
    stage, batch = stage_of(world, Transfer)
    student, teacher = stage.student.eval(), stage.teacher
    for mixer in (student.model.layers[index].mixer for index in (0, 2)):
        mixer.q_map.bias.data.fill_(-1e4)
        student.config.window_size = 40  # as long as the text: the teacher's
    rises = layer_sensitivity(student, teacher, [batch])
    assert all(abs(rise) < 1e-5 for rise in rises.values())
    student.config.window_size = 4
    rises = layer_sensitivity(student, teacher, [batch])
    folder, _ = world
    stock = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    other = from_softmax(stock, keep_softmax_layers=[0, 2], window_size=4, num_features=8)
    other.load_state_dict({k: v for k, v in student.state_dict().items() if ".1.mixer." in k}, strict=False)
    with torch.no_grad():
        loss = [model(batch["input_ids"], labels=batch["input_ids"]).loss.item() for model in (other, teacher)]
    assert rises[1] == pytest.approx(loss[0] - loss[1], abs=1e-5)


def test_lora_trains_its_matrices_and_the_maps_and_is_added_at_the_end(world, students):
    folder, run = world
    flags = ("--stage", "distill", "--teacher", f"{folder}/teacher", "--model_name_or_path", f"{folder}/transfer",
             "--lora_rank", "2", "--learning_rate", "0.01", "--save_steps", "2", "--max_steps", "4",
             "--do_train")  # fmt: skip
    run(*flags, output="lora")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("transfer", "lora"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "q_map", "k_map"}
    difference = after["model.layers.0.mixer.q_proj.weight"] - before["model.layers.0.mixer.q_proj.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2
    resumed = folder / "lora_resumed"
    resumed.mkdir()
    for name in ("run.json", "checkpoint-2"):
        (resumed / name).symlink_to(folder / "lora" / name)
    run(*flags, output="lora_resumed")
    again = load_file(resumed / "model.safetensors")
    for name, weight in after.items():
        assert torch.equal(weight, again[name]), name


def test_blocks_are_shifted_and_softmax_gives_the_same(world):
    """A student whose window holds all of the text: the loss does not see the shift, its rotary tables do."""
    stage, batch = stage_of(world, lambda *pair: Distill(*pair, temperature=1.0, weight=1.0))
    stage.student.config.window_size = 40
    begins = []
    stage.student.model.register_forward_pre_hook(
        lambda _, args, kwargs: begins.append(kwargs.get("position_ids", torch.zeros(1, 1))[0, 0].item()),
        with_kwargs=True,
    )
    plain = stage.student(**batch).loss.item()
    stage.feature_positions = 400
    found = [stage.student(**batch).loss.item() for _ in range(4)]
    assert begins[0] == 0
    assert len(set(begins[1:])) > 2
    assert max(begins) <= 360
    assert found == pytest.approx([plain] * 4, abs=1e-5)
    stage.student.config.window_size = 4  # what is far now depends on the positions
    assert len({round(stage.student(**batch).loss.item(), 4) for _ in range(3)}) > 1


def test_the_table_has_a_row_for_a_tuned_teacher(world, students, capsys):
    folder, _ = world
    linearise.main([f"{folder}/teacher", f"{folder}/transfer", "--tuned", f"{folder}/teacher", "--text",
                    f"{folder}/train.txt", "--tokens", "512", "--contexts", "64", "--needles", "0", "--lengths",
                    "--rows", "teacher", "student"])  # fmt: skip
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [name.strip() for name, _ in rows[1:4]] == ["teacher", "teacher, fine-tuned", "student"]
    assert rows[1][1] == rows[2][1] != rows[3][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stage", "teleport", "--teacher", "x"), "--stage is 'teleport'"),
        (("--stage", "transfer"), "needs --teacher"),
        (("--keep_softmax_layers", "1"), "--keep_softmax_layers belongs to a --stage"),
        (("--stage", "transfer", "--teacher", "{}/nowhere"), "there is no folder"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--keep_softmax_layers", "9"), "numbered 0 to 2"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--config_overrides", "window_size=99"), "window_size 99"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--keep_softmax_layers", "0", "1", "2",
          "--config_overrides", "window_size=4"), "nothing to train"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--keep_softmax_layers", "auto:9"), "numbered 0 to 2"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--keep_softmax_layers", "auto:x"), "is 'auto:x'"),
        (("--feature_positions", "64"), "--feature_positions is 64"),
        (("--stage", "transfer", "--teacher", "{}/teacher", "--lora_rank", "4"), "--lora_rank is 4"),
        (("--stage", "distill", "--teacher", "{}/teacher", "--distill_weight", "2"), "--distill_weight is 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(world, flags, message):
    folder, run = world
    with pytest.raises(UserError, match=message) as error:
        run(*(flag.format(folder) for flag in flags), output="refused")
    assert "\n" not in str(error.value)
