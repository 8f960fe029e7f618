"""ONNX graphs in onnxruntime give what the models give: encoders with padding, and decoding step by step."""

import numpy as np
import pytest
import torch

from tests.modeling.exact import tokens
from tests.variants import ENCODERS, ROWS

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lalm.onnx_export import export_onnx, main, sentence_transformer  # noqa: E402

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def row_of(name):
    (row,) = [row for row in (*ROWS, *ENCODERS) if row.name == name]
    return row


def assert_near(found, expected):
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def large_weights(model):
    """Weights that make gates as wide open and as shut as training does; the initial ones leave all near 1/2."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(1 / weight.std() / weight.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                weight[::2] -= 30


@pytest.mark.parametrize("name", ["linear_encoder_hybrid", "gla_encoder", "lam_encoder"])
def test_encoder_with_padding(name, tmp_path):
    model = row_of(name).build("AutoModel", torch.float32)
    large_weights(model)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    assert [x.name for x in session.get_outputs()] == ["last_hidden_state"]
    for batch, length in ((1, 1), (3, 21), (2, 100)):
        ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
        mask[1:, length // 2 :] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).last_hidden_state
        real = mask.bool()
        assert_near(found[real.numpy()], expected[real])


@pytest.mark.parametrize("name", ["linear_hybrid_both", "gla_plain", "delta_net_gated"])
def test_steps_of_decoding(name, tmp_path, capfd):
    """Linear, sliding and full softmax layers; steps below and above the window and a chunk; gates that are shut."""
    model = row_of(name).build(dtype=torch.float32, use_cache=False)  # as training leaves it
    large_weights(model)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    assert "onnxruntime" not in capfd.readouterr().err  # it warns of what nothing uses
    for batch, cuts in ((3, (1, 5, 1, 1, 20)), (1, (70, 1, 2))):
        ids, at = tokens(batch, sum(cuts)), 0
        with torch.no_grad():
            expected = model(ids).logits
        states = {
            x.name: np.zeros([batch, *(n if isinstance(n, int) else 0 for n in x.shape[1:])], TYPES[x.type])
            for x in session.get_inputs()
            if x.name.startswith("past.")
        }
        for count in cuts:
            step = {"input_ids": ids[:, at : at + count].numpy(), "seen": np.array(at)}
            logits, *after = session.run(None, step | states)
            assert_near(logits, expected[:, at : at + count])
            states, at = dict(zip(states, after, strict=True)), at + count


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="float32 weights"):
        export_onnx(row_of("gla_plain").build(dtype=torch.bfloat16), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="a model of lalm, got Linear"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="export-onnx"):
        sentence_transformer(tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        main([str(tmp_path), str(tmp_path / "model")])
