"""Softmax decoders of transformers as students: the same logits while every layer is softmax, one row a family."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lalm.convert.centroids import fit_centroids
from lalm.convert.command_line import main
from lalm.convert.softmax import FAMILIES, STUDENTS, from_softmax, student_config
from lalm.errors import UserError

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 53, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | dict.fromkeys(
    ("bos_token_id", "eos_token_id"), 1
)
SOME_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
TEACHERS = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "llama_biases_tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": SOME_SLIDING}),
    "qwen3": ("qwen3", {"head_dim": 12, "attention_bias": True}),
    "gemma": ("gemma", {"head_dim": 10}),
    "gpt2": ("gpt2", {}),
}
every_teacher = pytest.mark.parametrize("name", TEACHERS)
ALL = range(3)


def teacher_of(name, **changes):
    """A teacher whose every weight matters: norms and biases are not at their defaults."""
    kind, fields = TEACHERS[name]
    config = AutoConfig.for_model(kind, **((GPT2 if kind == "gpt2" else SIZES) | fields | changes))
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher


def ids(length=23, batch=2):
    return torch.randint(3, 53, (batch, length), generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_teacher_here():
    assert {kind for kind, _ in TEACHERS.values()} == set(FAMILIES)


@every_teacher
def test_with_all_layers_softmax_the_logits_are_the_teachers(name):
    teacher = teacher_of(name)
    student = from_softmax(teacher, keep_softmax_layers=ALL)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask, "position_ids": positions}):
            expected = teacher(ids(), **given).logits[mask.bool()]
            actual = student(ids(), **given).logits[mask.bool()]
            assert expected.abs().max() > 0.1
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@every_teacher
def test_a_hybrid_layer_is_the_teachers_inside_its_window(name):
    """Nothing is far in a short text, so that new parameters cannot matter; in a long one they do."""
    teacher = teacher_of(name, **({"sliding_window": 50} if "sliding_window" in TEACHERS[name][1] else {}))
    student = from_softmax(teacher, keep_softmax_layers=[1], window_size=9, num_sink_tokens=2, feature_map="hedgehog")
    assert student.config.layer_types[1] != student.config.layer_types[0] == "lalm_linear_attention"
    with torch.no_grad():
        expected, actual = teacher(ids()).logits, student(ids()).logits
        error = (expected - actual).abs().amax((0, 2)) / expected.abs().max()
        assert error[:11].max() < 1e-5
        assert error[12:].max() > 1e-3


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_type_of_student_runs_and_saves(kind, tmp_path):
    teacher = teacher_of("qwen3")
    fields = {} if kind == "lalm_linear" else {"intermediate_size": 48}
    student = from_softmax(teacher, kind, [2], **fields)
    assert not [name for name, x in student.named_parameters() if x.is_meta or not x.isfinite().all()]
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, student(ids()).logits)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)


def test_plain_linear_students_get_grouped_heads_repeated():
    teacher = teacher_of("qwen2")
    student = from_softmax(teacher, "lalm_gla", [2])
    mixer, attention = student.model.layers[0].mixer, teacher.model.layers[0].self_attn
    assert torch.equal(mixer.k_proj.weight[8:16], attention.k_proj.weight[:8])
    assert torch.equal(mixer.k_proj.weight[16:24], attention.k_proj.weight[8:16])


def test_sharing_takes_no_memory_and_copying_does():
    teacher = teacher_of("llama")
    weight = teacher.model.layers[0].mlp.up_proj.weight
    shared, copied = (from_softmax(teacher, share=share).model.layers[0].mlp.up_proj.weight for share in (True, False))
    assert shared.data_ptr() == weight.data_ptr() != copied.data_ptr()


def test_centroids_of_the_keys_beat_the_window_alone():
    """With as many centroids as keys, and sharp ones, far weights are those of softmax attention."""
    teacher = teacher_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    whole = from_softmax(teacher, keep_softmax_layers=ALL)
    text = ids(40, 1)
    student = from_softmax(
        teacher, feature_map="centroids", window_size=4, num_sink_tokens=1, num_features=32, share=True
    )
    with torch.no_grad():
        expected = teacher(text).logits
        random = (student(text).logits - expected).norm()
        fit_centroids(student, whole, [{"input_ids": text}])
        fitted = (student(text).logits - expected).norm()
    assert fitted < 0.25 * random
    with pytest.raises(ValueError, match="10 keys cannot have 32 centroids"):
        fit_centroids(student, whole, [{"input_ids": text[:, :10]}])


REFUSED = {
    "is_encoder_decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder"),
    "moe": ({"model_type": "mixtral"}, "'mixtral' has no mapping"),
    "alibi": ({"model_type": "bloom"}, "'bloom' has no mapping"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3'"),
    "partial": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_map_is_refused_by_name(case):
    changes, message = REFUSED[case]
    config = AutoConfig.for_model("llama", **SIZES)
    if "model_type" in changes:
        config = PreTrainedConfig()
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        student_config(config)


def test_layers_and_types_that_do_not_exist_are_refused():
    config = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(ValueError, match=r"keep_softmax_layers names \[3\]; layers are numbered 0 to 2"):
        student_config(config, keep_softmax_layers=[1, 3])
    with pytest.raises(ValueError, match="'lalm_lam' cannot be a student"):
        student_config(config, "lalm_lam")
    gpt2 = AutoConfig.for_model("gpt2", **GPT2, embd_pdrop=0.3)
    with pytest.raises(ValueError, match="embd_pdrop = 0.3"):
        student_config(gpt2)


def test_command_line(tmp_path, capsys):
    source, target = tmp_path / "teacher", tmp_path / "student"
    teacher_of("qwen2").save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    main(["from_softmax", str(source), str(target), "--keep_softmax_layers", "0", "2", "--options",
          '{"window_size": 8}'])  # fmt: skip
    assert "is written" in capsys.readouterr().out
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["window_size"], config["sliding_attention_layers"]) == (
        "lalm_linear",
        8,
        [0, 2],
    )
    assert (target / "tokenizer_config.json").exists()
    with pytest.raises(UserError, match=r"from_softmax: .*layers are numbered 0 to 2"):
        main(["from_softmax", str(source), str(target), "--keep_softmax_layers", "7"])


def test_an_adapter_holds_what_is_new_and_gives_the_student_again(tmp_path):
    source, student, adapter, again = (tmp_path / name for name in ("teacher", "student", "adapter", "again"))
    teacher_of("qwen2").save_pretrained(source)
    main(["from_softmax", str(source), str(student), "--options", '{"num_features": 6}'])
    main(["to_adapter", str(student), str(adapter), "--teacher", str(source)])
    names = {name.rsplit(".", 2)[1] for name in load_file(adapter / "adapter_model.safetensors")}
    assert names == {"q_map", "k_map"}
    main(["from_adapter", str(adapter), str(again)])
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, again))
    with torch.no_grad():
        assert torch.equal(first(ids()).logits, second(ids()).logits)
    other = tmp_path / "other"
    teacher_of("qwen2", hidden_size=16).save_pretrained(other)
    with pytest.raises(UserError, match="from_adapter: .*in the teacher and"):
        main(["from_adapter", str(adapter), str(again), "--teacher", str(other)])
