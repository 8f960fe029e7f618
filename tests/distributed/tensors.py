"""Run by `torch.distributed.run`: every row by tensor parallelism against one process, to a JSON file.

Usage: python -m torch.distributed.run --nproc_per_node N -m tests.distributed.tensors FOLDER
FOLDER holds a checkpoint of each row by its name; the results go to FOLDER/found.json.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from tests.variants import ENCODERS, ROWS

CHECKED = [row for row in (*ROWS, *ENCODERS) if "local_global" not in row.name and "based" not in row.name]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distances(row, folder: Path) -> dict:
    """Relative errors of logits and gradients, and of logits without gradients."""
    head = "AutoModelForMaskedLM" if row in ENCODERS else "AutoModelForCausalLM"
    size = dist.get_world_size()
    ids = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    config = DistributedConfig(tp_size=size, tp_plan="auto")
    model = row.model_class(head).from_pretrained(folder / row.name, distributed_config=config, device_map=None)
    other = row.model_class(head).from_pretrained(folder / row.name)
    assert whole(model.model.layers[0].mixer.q_proj.weight).numel() > model.model.layers[0].mixer.q_proj.weight.to_local().numel()
    with torch.no_grad():
        quiet = (model(**given).logits - other(**given).logits)[mask != 0].abs().max().item()
    output, wanted = model.train()(**given), other.train()(**given)
    output.loss.backward()
    wanted.loss.backward()
    errors = {"logits without gradients": quiet, "logits": (output.logits - wanted.logits)[mask != 0].abs().max().item()}
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
    for row in CHECKED:
        try:
            found[row.name] = distances(row, Path(folder))
        except Exception:
            found[row.name] = traceback.format_exc()
    if dist.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
