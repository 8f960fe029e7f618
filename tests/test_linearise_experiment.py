"""The table of what a student keeps: its parts are zeroed as it says, on a tiny pair of models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments import linearise
from lalm.convert.softmax import from_softmax
from lalm.modeling.window_linear_mixer import WindowLinearMixer


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher, from_softmax(teacher, window_size=4, num_sink_tokens=1)


def test_window_only_is_a_sliding_window(pair):
    """Two layers with a window of 4 see 6 tokens back, and the sink: what the 2nd token is ends before the 13th."""
    _, student = pair
    ids = torch.randint(3, 53, (1, 14), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 1] = 52 - other[0, 1]
    with torch.no_grad(), linearise.window_only(student):
        assert torch.equal(student(ids).logits[0, 12:], student(other).logits[0, 12:])
    with torch.no_grad():
        assert not torch.allclose(student(ids).logits[0, 12:], student(other).logits[0, 12:], atol=1e-6)
    assert all("log_q_features" not in vars(m) for m in student.modules() if isinstance(m, WindowLinearMixer))


def test_tables(pair, capsys):
    models = linearise.contestants(*pair)
    tokens = torch.randint(3, 53, (600,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pair[0](tokens[None, :128], labels=tokens[None, :128]).loss
    assert linearise.losses(pair[0], tokens[:128], 128).mean() == pytest.approx(expected.item(), rel=1e-5)
    linearise.perplexity_tables(models, tokens[:256], [64, 128])
    linearise.speed_table(models[:2], tokens, [64, 256])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    figures = {row[1].strip(): float(row[2]) for row in rows[2:6]}
    assert len({round(value, 3) for value in figures.values()}) == 4
    assert [row[1].strip() for row in rows[-4:]] == ["64", "64", "256", "256"]


def test_only_the_cache_of_the_teacher_grows(pair):
    tokens = torch.randint(3, 53, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (few, many), (own_few, own_many) = (
            [linearise.cache_bytes(model(tokens[:, :size]).past_key_values) for size in (64, 256)] for model in pair
        )
    assert many == 4 * few == 4 * 64 * 2 * 2 * 16 * 4
    assert own_few == own_many > 0
