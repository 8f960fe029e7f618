"""`use_in_transformers`: what is replaced, for how long, and what is refused."""

import threading

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mamba2 import modeling_mamba2 as mamba
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

import lalm
from lalm import doctor
from lalm.errors import UserError
from lalm.transformers_models import door, functions
from lalm.transformers_models.families import FAMILIES, UnknownSeam
from tests.transformers_models.tiny import tiny, tokens

NAMES = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)


def state():
    forwards = (qwen.Qwen3_5GatedDeltaNet.forward, qwen.Qwen3_5TextModel.forward, mamba.Mamba2ForCausalLM.forward)
    return [*(getattr(qwen, name) for name in NAMES), mamba.mamba2_chunk_scan, *forwards]


def test_opens_and_closes():
    before = state()
    with lalm.use_in_transformers() as replaced:
        assert set(replaced.families) == set(FAMILIES)
        assert not replaced.refused
        assert not any(a is b for a, b in zip(state(), before, strict=True))
    assert all(a is b for a, b in zip(state(), before, strict=True))
    replaced.undo()  # nothing more to do
    assert all(a is b for a, b in zip(state(), before, strict=True))


def test_a_family_stays_while_anybody_uses_it():
    before = state()
    first = lalm.use_in_transformers("qwen3_5")
    assert mamba.mamba2_chunk_scan is before[4]
    opened = state()
    second = lalm.use_in_transformers(["qwen3_5", "qwen3_5"])
    assert all(a is b for a, b in zip(state(), opened, strict=True))  # replaced once, not twice
    first.undo()
    assert all(a is b for a, b in zip(state(), opened, strict=True))
    second.undo()
    assert all(a is b for a, b in zip(state(), before, strict=True))


def test_threads():
    before, model, ids = state(), tiny("qwen3_5_text"), tokens(1, 8)
    expected, problems = model(ids).logits, []

    def work():
        try:
            for _ in range(5):
                with lalm.use_in_transformers("qwen3_5"):
                    assert qwen.causal_conv1d_fn is not before[2]
                    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(a is b for a, b in zip(state(), before, strict=True))


def test_one_line_for_each_function(monkeypatch):
    said = []
    monkeypatch.setattr(door.logger, "info", said.append)
    with lalm.use_in_transformers("qwen3_5"):
        pass
    forwards = ["Qwen3_5GatedDeltaNet.forward", "Qwen3_5TextModel.forward", "Qwen3_5DecoderLayer.forward"]
    replaced = [f"qwen3_5.modeling_qwen3_5.{name}" for name in FAMILIES["qwen3_5"].functions]
    assert [line.split(" ")[0] for line in said] == replaced + forwards


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'qwen35' is unknown \(did you mean 'qwen3_5'\?\); known are qwen3_next, "):
        lalm.use_in_transformers("qwen35")


def test_a_changed_function_is_refused_by_name(monkeypatch):
    def changed(query, key, value, gate):
        raise AssertionError

    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", changed)
    warnings = []
    monkeypatch.setattr(door.logger, "warning", warnings.append)
    before = state()
    message = (
        r"qwen3_5: torch_chunk_gated_delta_rule takes \(query, key, value, gate\), known is \(query, key, value, g"
    )
    with pytest.raises(UnknownSeam, match=message):
        lalm.use_in_transformers(["mamba2", "qwen3_5"])
    assert all(a is b for a, b in zip(state(), before, strict=True))
    with lalm.use_in_transformers() as replaced:
        assert set(replaced.refused) == {"qwen3_5"}
        assert "mamba2" in replaced.families
        assert qwen.torch_chunk_gated_delta_rule is changed
    assert len(warnings) == 1


def test_somebody_elses_replacement_stays(monkeypatch):
    monkeypatch.setattr(qwen, "causal_conv1d_fn", qwen.causal_conv1d_fn)  # put back at the end
    warnings = []
    monkeypatch.setattr(door.logger, "warning", warnings.append)
    with lalm.use_in_transformers("qwen3_5"):
        qwen.causal_conv1d_fn = test_threads
    assert qwen.causal_conv1d_fn is test_threads
    (said,) = warnings
    assert said == "qwen3_5.modeling_qwen3_5.causal_conv1d_fn has been replaced by somebody else and stays as it is."


def test_other_devices_keep_the_stock_functions():
    q = torch.empty(1, 8, 2, 16, device="meta")
    gate = torch.empty(1, 8, 2, device="meta")
    expected, _ = qwen.torch_chunk_gated_delta_rule(q, q, q, g=gate, beta=gate)
    with lalm.use_in_transformers("qwen3_5"):
        found, _ = qwen.torch_chunk_gated_delta_rule(q, q, q, g=gate, beta=gate, padding_mask=gate[..., 0])
    assert found.device.type == "meta"
    assert found.shape == expected.shape


def test_bad_boundaries():
    model, ids = tiny("qwen3_5_text"), tokens(1, 8)
    with lalm.use_in_transformers("qwen3_5"):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q must rise from 0 to T = 8"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 3, 9]))
        with pytest.raises(ValueError, match=r"seq_idx must be \[B, T\] = \(1, 8\)"):
            model(ids, seq_idx=torch.zeros(1, 5).long())


def test_without_a_compiler_the_stock_functions_run(monkeypatch):
    model, ids = tiny("qwen3_5_text"), tokens(1, 8)
    expected, warnings = model(ids).logits, []
    monkeypatch.setattr(functions, "why_no_kernel", lambda *name, **sizes: "there is no C++ compiler")
    monkeypatch.setattr(functions.logger, "warning_once", warnings.append)
    monkeypatch.setattr("lalm.modeling.ops.dispatch.load_kernel", lambda *name, **sizes: None)
    with lalm.use_in_transformers("qwen3_5"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert "there is no C++ compiler" in warnings[0]
        packed = model(ids, seq_idx=torch.tensor([[0] * 3 + [1] * 5])).logits  # which they would refuse
        torch.testing.assert_close(packed[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_doctor_knows_the_heads(name):
    config = AutoConfig.for_model(name).get_text_config()
    rule, kernel = doctor.rule_of(FAMILIES[name], config)
    assert rule in {"chunk_gated_delta_rule", "chunk_kda", "mamba_chunk_scan_combined"}
    assert kernel.state_size > 0


def test_doctor(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "why_no_kernel", lambda name, **sizes: None if name == "delta_rule" else "no reason")
    doctor.main(["qwen3_5_text"])
    said = capsys.readouterr().out
    assert "chunk_gated_delta_rule: C++ kernel delta_rule (KEY=128, VALUE=128" in said
    assert "causal_conv1d_fn: plain torch. No C++ kernel short_conv (WIDTH=4, BEFORE=3, SILU=1): no reason" in said
    with pytest.raises(UserError, match=r"model_type 'mamba' is unknown \(did you mean 'mamba2'\?\)"):
        doctor.main(["mamba"])
