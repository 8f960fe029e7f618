"""Writes tests/data/fla_*.json: what flash-linear-attention's own classes are called, hold and compute.

    pip install --no-deps triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0 einops==0.8.2
    TRITON_INTERPRET=1 python -m tests.fla_reference

Their Triton kernels run on the CPU, in Triton's interpreter. No weights are stored: each is a sine of its index.
"""

import json
import zlib
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "data"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 61,
    "intermediate_size": 40,
    "fuse_cross_entropy": False,
    "use_cache": False,
}
# Name of the fixture -> class prefix in fla.models and the fields beside SIZES.
MODELS = {
    "gla": ("GLA", {}),
    "gla_conv": ("GLA", {"use_short_conv": True, "expand_k": 1.0, "tie_word_embeddings": True}),
    "gla_no_gate": ("GLA", {"use_output_gate": False}),
    "retnet": ("RetNet", {}),
    "delta_net": ("DeltaNet", {}),
    "delta_net_gate": ("DeltaNet", {"use_gate": True, "allow_neg_eigval": True, "use_short_conv": False}),
    "gated_deltanet": ("GatedDeltaNet", {"head_dim": 12}),
    "gated_deltanet_no_gate": ("GatedDeltaNet", {"head_dim": 16, "use_gate": False, "expand_v": 1.0}),
    "kda": ("KDA", {"head_dim": 12, "use_short_conv": True}),
    "kda_no_conv": ("KDA", {"head_dim": 16, "expand_v": 0.5, "use_short_conv": False, "allow_neg_eigval": True}),
    "linear_attn": ("LinearAttention", {}),
    "linear_attn_elu": ("LinearAttention", {"feature_map": "elu"}),
}
LENGTHS = (20, 50)  # up to 64 tokens fla steps through them; its chunk kernels do not run in the interpreter


def weight(name: str, shape: torch.Size) -> torch.Tensor:
    """A weight that can be made again anywhere: sines at scale 1 / sqrt(inputs), shifted by the name's checksum."""
    count = max(torch.Size(shape).numel(), 1)
    wave = torch.sin(0.7 * torch.arange(count, dtype=torch.float64) ** 1.1 + zlib.crc32(name.encode()) % 1000)
    if len(shape) == 1:
        return (wave.reshape(shape) * 0.3 + (1.0 if "norm" in name else 0.0)).float()
    return (wave.reshape(shape) * (2 / shape[-1]) ** 0.5).float()


def input_ids(length: int) -> torch.Tensor:
    """The tokens `[1, T]` whose logits are stored."""
    return (torch.arange(length) * 17 % 58 + 3)[None]


def take_the_first_configuration() -> None:
    """Triton times its configurations on a GPU driver; in the interpreter there is none, and any one will do."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]


def describe(prefix: str, fields: dict) -> dict:
    """Configuration, names and shapes, and the last five logits of every length."""
    import fla.models

    config = getattr(fla.models, f"{prefix}Config")(**SIZES | fields)
    model = getattr(fla.models, f"{prefix}ForCausalLM")(config).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: weight(name, shape) for name, shape in shapes.items()})
    model.tie_weights()
    logits = {}
    with torch.no_grad():
        for length in LENGTHS:
            last = model(input_ids(length)).logits[0, -5:].double()
            logits[str(length)] = [[round(x, 7) for x in row] for row in last.tolist()]
    return {"config": config.to_diff_dict(), "shapes": shapes, "logits": logits}


def main() -> None:
    take_the_first_configuration()
    FOLDER.mkdir(exist_ok=True)
    for name, (prefix, fields) in MODELS.items():
        path = FOLDER / f"fla_0.6.0_{name}.json"
        path.write_text(json.dumps(describe(prefix, fields)) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
