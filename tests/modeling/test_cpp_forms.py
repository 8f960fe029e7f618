"""Models in float32 whose heads are large enough for the C++ kernels, against the definition of the same model."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from lalm import BasedConfig, DeltaNetConfig, GLAConfig, LamConfig, LinearAttentionConfig, RetNetConfig
from lalm.modeling.ops.cpp_kernels import load_kernel
from tests.variants import Row

SIZES = {"hidden_size": 64, "intermediate_size": 48}
ROWS = (
    Row("linear", LinearAttentionConfig, SIZES),
    Row("linear_taylor", LinearAttentionConfig, SIZES | {"feature_map": "taylor", "num_attention_heads": 4}),
    Row("linear_unnormalized", LinearAttentionConfig, SIZES | {"normalize": False, "feature_map": "identity"}),
    Row("gla", GLAConfig, SIZES | {"expand_k": 1}),
    Row("retnet", RetNetConfig, SIZES),
    Row("delta_net", DeltaNetConfig, SIZES),
    Row("gated_delta_net", DeltaNetConfig, SIZES | {"decay": "head"}),
    Row("kimi_delta_attention", DeltaNetConfig, SIZES | {"decay": "channel"}),
    Row("based", BasedConfig, SIZES | {"feature_dim": 8, "num_hidden_layers": 4}),
    Row("lam", LamConfig, SIZES | {"is_causal": True}),
)
pytestmark = [
    pytest.mark.skipif(load_kernel("rms_norm") is None, reason="no C++ compiler on this machine"),
    pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name),
]
LENGTH = 41


def models(row):
    """The model by the C++ kernel, which is refused if it cannot run, and by the definition in float64."""
    return (
        row.build(dtype=torch.float32, linear_attn_implementation="cpp"),
        row.build(dtype=torch.float64, linear_attn_implementation="recurrent"),
    )


def token_ids(row, batch=2):
    return torch.randint(3, row.config().vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def batches(ids):
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :9], right[0, -6:] = 0, 0
    positions = torch.cat([torch.arange(17), torch.arange(LENGTH - 17)]).expand_as(ids)
    return {"plain": {}, "left": {"attention_mask": left}, "right": {"attention_mask": right},
            "documents": {"position_ids": positions}}  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "left", "right", "documents"])
def test_logits_and_gradients(row, kind):
    ids = token_ids(row)
    inputs = batches(ids)[kind]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    results = []
    for model in models(row):
        out = model(ids, labels=ids.masked_fill(~real, -100), use_cache=False, **inputs)
        out.loss.backward()
        results.append((out.logits[real], {name: x.grad for name, x in model.named_parameters()}))
    (logits, gradients), (exact_logits, exact_gradients) = results
    torch.testing.assert_close(logits.double(), exact_logits, atol=2e-4, rtol=1e-4)
    for name, exact in exact_gradients.items():
        if exact is not None:
            error = (gradients[name] - exact).norm() / exact.norm().clamp(min=1e-6)
            assert error < 1e-4, (name, float(error))


def test_auto_takes_the_kernel(row):
    ids = token_ids(row)
    with torch.no_grad():
        ours = row.build(dtype=torch.float32)(ids).logits
        assert torch.equal(ours, models(row)[0](ids).logits)


def test_pieces_and_generation(row):
    model, exact = models(row)
    ids = token_ids(row)
    mask = batches(ids)["left"]["attention_mask"]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for attention_mask in (torch.ones_like(ids), mask):
        found = model.generate(ids, attention_mask=attention_mask, **options)
        assert torch.equal(found, exact.generate(ids, attention_mask=attention_mask, **options))
    with torch.no_grad():
        whole = model(ids).logits
        cache, pieces = None, []
        for start, stop in ((0, 20), (20, 21), (21, LENGTH)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_to_one_graph_with_the_kernel(row):
    """Loss and gradients of a training step; every layer has its op in the graphs of both passes."""
    if row.name in ("linear_taylor", "linear_unnormalized", "delta_net"):
        pytest.skip("other rows take the same kernel")
    model, ids = row.build(dtype=torch.float32, linear_attn_implementation="cpp", num_hidden_layers=2), token_ids(row)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False} | batches(ids)["left"]
    found = []

    def keep(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if "lalm" in str(node.target))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled, results = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        results.append((loss.detach(), [x.grad for x in model.parameters() if x.grad is not None]))
    for x, expected in zip(results[1][1], results[0][1], strict=True):
        assert (x - expected).norm() <= 1e-5 * expected.norm()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    layers = 1 if row.name == "based" else 2  # whose other layer is a window
    rules = [name for name in found if "gates" not in name]
    assert sum("backward" not in name for name in rules) == sum("backward" in name for name in rules) == layers
