"""Which form of an op runs, and what is said when it cannot."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers

from lalm.modeling.ops import dispatch, fla_kernels
from lalm.modeling.ops.dispatch import choose
from tests.variants import recurrent_rows

FORMS = dict.fromkeys(("recurrent", "chunk", "fla"))


def q(length):
    return torch.zeros(1, length, 2, 4)


@pytest.mark.parametrize(("length", "form"), [(1, "recurrent"), (2, "recurrent"), (64, "chunk"), (5000, "chunk")])
def test_auto_steps_through_few_tokens_and_chunks_many(length, form):
    assert choose("gla", "auto", q(length), q(length), FORMS) == form


@pytest.mark.parametrize("length", [1, 5000])
@pytest.mark.parametrize("name", ["recurrent", "chunk"])
def test_the_field_overrides(name, length):
    assert choose("gla", name, q(length), q(length), FORMS) == name


@pytest.mark.parametrize("name", ["fla", "triton"])
def test_gpu_kernels_on_the_cpu_name_the_field(name):
    with pytest.raises(ValueError, match=f"linear_attn_implementation='{name}'.*auto"):
        choose("gla", name, q(5), q(5), FORMS | {"triton": None})


@pytest.mark.parametrize(
    ("length", "dtype", "device", "installed", "form"),
    [
        (64, torch.bfloat16, "cuda", True, "fla"),
        (64, torch.float16, "cuda", True, "fla"),
        (64, torch.bfloat16, "cuda", False, "chunk"),
        (64, torch.float32, "cuda", True, "chunk"),
        (1, torch.bfloat16, "cuda", True, "recurrent"),
        (64, torch.bfloat16, "cpu", True, "chunk"),
    ],
)
def test_auto_takes_the_kernels_of_the_gpu_extra(length, dtype, device, installed, form, monkeypatch):
    monkeypatch.setattr(dispatch, "has_fla", lambda: installed)
    v = SimpleNamespace(shape=(1, length, 2, 4), dtype=dtype, device=torch.device(device))
    without = dict.fromkeys(("recurrent", "chunk"))
    assert choose("gla", "auto", v, v, FORMS) == form
    assert choose("gla", "auto", v, v, without) == ("chunk" if form == "fla" else form)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose("gla", "auto", v, v, FORMS) == ("chunk" if form == "fla" else form)


def test_kernels_of_our_own_run_off_the_cpu_where_there_are_some():
    elsewhere, forms = q(64).to("meta"), FORMS | {"triton": None}
    assert choose("dual_state_delta", "triton", elsewhere, elsewhere, forms) == "triton"
    assert choose("dual_state_delta", "auto", elsewhere, elsewhere, forms) == "chunk"
    with pytest.raises(ValueError, match="gla has no triton kernel"):
        choose("gla", "triton", elsewhere, elsewhere, FORMS)


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed here")
def test_fla_without_the_package_says_how_to_install_it():
    with pytest.raises(ImportError, match="linear_attn_implementation.*pip install"):
        fla_kernels.fla_diagonal(q(5), q(5), q(5), None, 1.0, None, None)


def test_one_log_line_names_the_choice():
    """Once a form, not once a call (a training step makes thousands of them), where transformers' verbosity rules."""
    dispatch._announce.cache_clear()
    verbosity = transformers.logging.get_verbosity()
    records, handler = [], logging.Handler()
    handler.emit = records.append
    dispatch.logger.addHandler(handler)
    try:
        transformers.logging.set_verbosity_info()
        for _ in range(3):
            choose("gla", "auto", q(64), q(64), FORMS)
    finally:
        dispatch.logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)
    (message,) = [record.getMessage() for record in records]
    assert "gla" in message
    assert "chunk" in message
    assert "linear_attn_implementation" in message


@recurrent_rows
def test_mixers_ask_with_their_values(row, monkeypatch):
    """Feature maps and norms leave q in float32; a 16-bit model is known by its values."""
    asked = []
    monkeypatch.setattr(dispatch, "_is_for_fla", lambda v: asked.append(v.dtype))
    monkeypatch.setattr(dispatch, "load_kernel", lambda name, **sizes: None)
    monkeypatch.setattr(dispatch, "has_library", lambda name, sizes: False)
    model = row.build(dtype=torch.bfloat16)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 20)[None])
    assert set(asked) <= {torch.bfloat16}
    without_fla = ("lam_", "local_global_", "linear_window", "delta_net_channel")  # of which fla has none
    assert asked or row.name.startswith(without_fla)
