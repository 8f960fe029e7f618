"""Run by `torch.distributed.run`: rows by tensor parallelism against one process, to a JSON file.

Usage: python -m torch.distributed.run --nproc_per_node N -m tests.distributed.tensors FOLDER
FOLDER holds a checkpoint of each row by its name; the results go to FOLDER/found.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from tests.variants import ENCODERS, ROWS

# One row per kind of module that is split. All rows with a plan were run once (docs/log.md).
NAMES = (
    "linear_conv_gated_mlp",
    "linear_hedgehog",
    "linear_elementwise_product",
    "gla_conv_tied",
    "gla_hybrid_full",
    "delta_net_gated",
    "delta_net_channel",
    "delta_net_hybrid_both",
    "retnet_conv_qk_norm",
    "lam_plain",
    "lam_one_memory",
    "lam_encoder",
)
SPLIT = [row for row in (*ROWS, *ENCODERS) if row.name in NAMES]


def head_of(row) -> str:
    return "AutoModelForMaskedLM" if row in ENCODERS else "AutoModelForCausalLM"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distances(row, folder: Path) -> dict:
    """Relative errors of logits and gradients, and of logits without gradients."""
    size = dist.get_world_size()
    ids = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    config = DistributedConfig(tp_size=size, tp_plan="auto")
    model = row.model_class(head_of(row)).from_pretrained(folder / row.name, distributed_config=config)
    other = row.model_class(head_of(row)).from_pretrained(folder / row.name)
    weight = model.model.layers[0].mixer.q_proj.weight
    assert weight.to_local().numel() * size == weight.numel()
    with torch.no_grad():
        quiet = (model(**given).logits - other(**given).logits)[mask != 0].abs().max().item()
    output, wanted = model.train()(**given), other.train()(**given)
    output.loss.backward()
    wanted.loss.backward()
    errors = {
        "loss": abs(output.loss / wanted.loss - 1).item(),
        "logits without gradients": quiet,
        "logits": (output.logits - wanted.logits)[mask != 0].abs().max().item(),
    }
    expected = {name: x.grad for name, x in other.named_parameters() if x.grad is not None}
    found = {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, gradient in expected.items():
        errors[name] = ((found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-3 * largest)).item()
    return errors


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    for row in SPLIT:
        found[row.name] = distances(row, Path(folder))
    if dist.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
