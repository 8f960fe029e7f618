"""Run by `torch.distributed.run`: trains every row by some engines and writes how far loss and gradients are from
those of one process on the whole batch.

Usage: python -m torch.distributed.run --nproc_per_node N -m tests.distributed.engines ENGINE,... OUTPUT.json
"""

import copy
import json
import sys
import traceback
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.scripts import without_compiling
from tests.variants import FEW, ROWS

LENGTH = 24
# One row per variant, per way of keeping memory, and the reversible blocks.
TRAINED = [row for row in ROWS if row.name in FEW or row.name.endswith(("_plain", "_reversible"))]


def trained_by(processes, engine):
    """What DDP and FSDP2 train with two processes; for more processes and for DeepSpeed a part of it."""
    if processes == 2 and not engine.startswith("zero"):
        return TRAINED
    return [row for row in TRAINED if row.name.endswith(("_plain", "_reversible") if processes == 2 else "_plain")]


def shard(model, checkpoint=False, dtype=None):
    """What the Trainer does to a model under FSDP2, by accelerate's own functions; accelerate itself runs DDP in the
    place of FSDP on a CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
        mixed_precision_policy=None if dtype is None else MixedPrecisionPolicy(dtype, torch.float32),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device="cpu"
    )
    plugin.set_auto_wrap_policy(model)
    return fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model) if checkpoint else model)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


ENGINES = {
    "ddp": lambda model: DistributedDataParallel(model),
    "fsdp2": shard,
    "fsdp2-bfloat16": lambda model: shard(model, checkpoint=True, dtype=torch.bfloat16),
}


def gradients(model):
    return {
        name.replace("module.", "").replace("_checkpoint_wrapped_", ""): whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def reference(row, ids, engine):
    """Loss and gradients of one process on the whole batch; in bfloat16 the mean over the parts of the ranks, each of
    which rounds for itself."""
    model, losses, found = row.build(dtype=torch.float32).train(), [], {}
    parts = ids.split(2) if "bfloat16" in engine else [ids]
    for part in parts:
        copied = copy.deepcopy(model).to(torch.bfloat16) if "bfloat16" in engine else model
        losses.append(copied(input_ids=part, labels=part).loss.float())
        losses[-1].backward()
        for name, gradient in gradients(copied).items():
            found[name] = found.get(name, 0) + gradient.float() / len(parts)
    return torch.stack(losses).mean(), found


def zero(model, stage):
    """DeepSpeed's engine."""
    import deepspeed

    without_compiling()
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(model, engine, ids):
    """Loss and gradients of a process."""
    if not engine.startswith("zero"):
        model = ENGINES[engine](model)
        loss = model(input_ids=ids, labels=ids, logits_to_keep=1).loss
        loss.backward()
        return loss, gradients(model)
    from deepspeed.utils import safe_get_full_grad

    runner = zero(model, int(engine[-1]))
    loss = runner(input_ids=ids, labels=ids, logits_to_keep=1).loss
    runner.backward(loss)
    found = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    runner.destroy()
    return loss, {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def distances(row, engine):
    """Relative errors of the loss and of every gradient, by name."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(3, 61, (2 * size, LENGTH), generator=torch.Generator().manual_seed(1))
    loss, found = train(row.build(dtype=torch.float32).train(), engine, ids[2 * rank : 2 * rank + 2])
    loss = loss.detach().float()
    dist.all_reduce(loss)
    expected, wanted = reference(row, ids, engine)
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    errors = {
        name: ((found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-3 * largest)).item()
        for name, gradient in wanted.items()
    }
    difference = sum((found[name] - gradient).square().sum() for name, gradient in wanted.items())
    errors["all gradients"] = (difference / sum(x.square().sum() for x in wanted.values())).sqrt().item()
    return {"loss": abs(loss.item() / size / expected.item() - 1), **errors}


def main(engines, output):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found = {engine: {} for engine in engines.split(",")}
    for engine, rows in found.items():
        for row in trained_by(dist.get_world_size(), engine):
            torch.manual_seed(0)
            try:
                rows[row.name] = distances(row, engine)
            except Exception:
                rows[row.name] = traceback.format_exc()
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
