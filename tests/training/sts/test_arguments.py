"""Arguments of run_sts.py: defaults of the stages, recipes and flags, contradictions."""

import pytest
import yaml

from lalm.errors import UserError
from lalm.training.sts.arguments import MIXTURE, parse_sts_arguments


@pytest.fixture
def recipe(tmp_path):
    def write(**values) -> str:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(tmp_path / "recipe.yaml")

    return write


def test_without_a_stage_nothing_is_trained():
    model, data, training = parse_sts_arguments([])
    assert training.stage is None
    assert not training.do_train
    assert (model.model_name_or_path, data.data_dir) == (None, None)
    assert data.shares == MIXTURE
    assert sum(MIXTURE.values()) == pytest.approx(1)


def test_stages_have_the_weights_of_the_seed():
    *_, training = parse_sts_arguments(["--stage", "relational", "--model_name_or_path", "x"])
    assert training.loss_weights == {
        "similarity": 0.5,
        "embedding": 0.5,
        "layers": 0.5,
        "margin": 2.5,
        "contrastive": 0,
    }
    assert (training.embedding_metric, training.learning_rate, training.temperature) == ("mse", 3e-5, 0.04)
    *_, training = parse_sts_arguments(["--stage", "distill", "--layer_weight", "0"])
    assert training.loss_weights == {"similarity": 0, "embedding": 1, "layers": 0, "margin": 0, "contrastive": 0}
    assert training.max_length == training.max_seq_length == 128
    *_, training = parse_sts_arguments(["--stage", "finetune", "--model_name_or_path", "x"])
    assert training.retention_weight == 0.05


def test_the_best_of_the_evaluations_is_kept():
    *_, training = parse_sts_arguments(["--stage", "distill", "--eval_steps", "50", "--save_steps", "7"])
    assert training.metric_for_best_model == "eval_sts-dev_pearson_cosine"
    assert training.greater_is_better
    assert training.save_steps == training.eval_steps == 50
    *_, training = parse_sts_arguments(["--stage", "distill", "--eval_strategy", "no", "--save_steps", "7"])
    assert not training.load_best_model_at_end
    assert training.save_steps == 7


def test_recipes_and_flags(recipe):
    path = recipe(
        stage="distill", train_file=["a.txt", "b.txt"], train_weights=[1, 0.5], config_overrides={"use_flux": False},
        learning_rate="1e-3", output_dir="trained", mixture={"sts": 1, "nli": 0},
    )  # fmt: skip
    model, data, training = parse_sts_arguments([path, "--config_overrides", "use_leak=false"])
    assert model.overrides == {"use_flux": False, "use_leak": False}
    assert (data.train_weights, training.learning_rate, data.shares) == ([1, 0.5], 1e-3, {"sts": 1})
    model, data, _ = parse_sts_arguments([path, "--train_file", "c.txt", "--model_name_or_path", "x"])
    assert (data.train_file, data.train_weights, model.overrides) == (["c.txt"], None, {})
    for flags in (["--eval_only"], ["--eval_only", "--model_name_or_path", "x"]):
        model, _, training = parse_sts_arguments([path, *flags])
        assert (training.stage, training.output_dir, model.overrides) == (None, "lalm-sts-eval", {})
    _, data, _ = parse_sts_arguments(["--mixture", "sts=0.5", "qa=.5"])
    assert data.shares == {"sts": 0.5, "qa": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "relational"], "continues a model: give --model_name_or_path, .* a run of --stage distill"),
        (["--stage", "finetune"], "a run of --stage relational"),
        (["--stage", "pretrain"], "--stage is 'pretrain'; choose one of distill, relational, finetune"),
        (["--stage", "distill", "--eval_only"], "--eval_only trains nothing"),
        (["--stage", "distill", "--margin_weight", "1"], "needs pairs of texts; use --stage relational"),
        (["--stage", "distill", "--embedding_weight", "0", "--layer_weight", "0"], "nothing would be learnt"),
        (["--stage", "distill", "--layer_weight", "-1"], "--layer_weight is -1; it must be at least 0"),
        (["--stage", "distill", "--matryoshka_dims", "8"], "--matryoshka_dims is for --stage finetune"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--eval_strategy", "no", "--early_stopping_patience", "2"], "needs evaluations"),
        (["--train_weights", "1"], "1 numbers for 0 --train_file"),
        (["--train_file", "a", "--train_weights", "0"], "--train_weights must be above 0"),
        (["--mixture", "stsb=1"], "--mixture: there is no kind 'stsb'"),
        (["--mixture", "sts=much"], "--mixture: sts=much: a share is a number"),
        (["--mixture", "sts=0"], "all shares are 0"),
        (["--mixture", "sts"], "--mixture: 'sts' is not of the form key=value"),
        (["--mine_range_max", "5"], "--mine_range_max must be above"),
        (["--mine_margin", "1"], r"must lie in \[0, 1\)"),
        (["--curriculum", "grow"], "--curriculum is 'grow'; choose one of none, grow_p2, phases"),
        (["--max_seq_len", "5"], r"unknown argument '--max_seq_len' \(did you mean 'max_seq_length'\?\)"),
        (["--config_overrides", "use_flux=false"], "--config_overrides shapes a new student"),
        (["--decay_ratio", "0"], "--decay_ratio is 0"),
    ],
)
def test_contradictions_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse_sts_arguments(argv)
