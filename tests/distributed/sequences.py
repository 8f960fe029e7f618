"""Run by `torch.distributed.run`: rows by sequence parallelism against one process, to a JSON file.

Usage: python -m torch.distributed.run --nproc_per_node 4 -m tests.distributed.sequences OUTPUT.json
Four processes share a sequence, and then two pairs of them one each.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lalm.modeling.modeling_base import Block
from lalm.modeling.sequence_parallel import sequence_parallel
from tests.variants import ROWS

# One row per recurrence and per kind of edge. All rows without full attention were run once (docs/log.md).
NAMES = (
    "linear_conv_qk_norm_rope",
    "linear_hybrid_sliding",
    "gla_conv_tied",
    "gla_plain",
    "delta_net_plain",
    "delta_net_gated",
    "retnet_conv_qk_norm",
    "lam_plain",
    "lam_rope_no_conv",
    "based_plain",
    "local_global_blindspot",
    "local_global_shift_reversible_blindspot",
)
KINDS = {
    2: ("plain", "padding", "documents", "padding and documents"),
    4: ("plain", "padding and documents", "checkpointed padding and documents"),
}
SPLIT = [row for row in ROWS if row.name in NAMES]
LENGTH, BATCH = 23, 3  # slices of 5 or 6 tokens, of 11 or 12


def inputs(kind: str) -> dict:
    """A whole batch: plain, with padding anywhere (a whole slice too), or packed documents, some starting a slice."""
    source = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (BATCH, LENGTH), generator=source)
    given = {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if "padding" in kind:
        mask[0, :7] = mask[1, 15:] = 0
        mask[2, 3:5] = mask[2, 9:13] = 0
        after_padding = torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0  # read at padding: unspecified
        given |= {"attention_mask": mask, "labels": ids.masked_fill((mask == 0) | after_padding, -100)}
    if "documents" in kind:
        starts = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        for row, places in enumerate([[5, 11, 17], [11, 12, 20], [2, 6, 22]]):
            starts[row, places] = 1
        given["seq_idx"] = starts.cumsum(1)
    return given


def gradients(model) -> dict:
    named = ((name.replace("_checkpoint_wrapped_module.", ""), x.grad) for name, x in model.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


def distances(row, kind, group) -> dict:
    """Relative errors of logits, loss and gradients."""
    rank, size, given = dist.get_rank(group), dist.get_world_size(group), inputs(kind)
    model, other = row.build().train(), row.build().train()
    if "checkpointed" in kind:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    wanted = other(**given)
    wanted.loss.backward()
    output = sequence_parallel(model, group=group, **given)
    output.loss.backward()
    loss = output.loss.detach() / size
    dist.all_reduce(loss, group=group)
    own = slice(LENGTH * rank // size, LENGTH * (rank + 1) // size)
    real = given.get("attention_mask", torch.ones(BATCH, LENGTH))[:, own] != 0
    logits = (output.logits - wanted.logits[:, own])[real].abs().max() if real.any() else torch.zeros(())
    dist.all_reduce(logits, dist.ReduceOp.MAX, group=group)
    found, expected = gradients(model), gradients(other)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors, largest = {}, max(x.abs().max() for x in expected.values())
    for name, gradient in found.items():
        dist.all_reduce(gradient, group=group)
        off = (gradient / size - expected[name]).abs().max()
        errors[name] = (off / expected[name].abs().max().clamp_min(1e-3 * largest)).item()
    return errors | {"loss": abs(loss / wanted.loss - 1).item(), "logits": logits.item()}


def main(output: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    found = {}
    for row in SPLIT:
        for processes, group in ((4, None), (2, pair)):
            for kind in KINDS[processes]:
                found[f"{row.name}, {processes}, {kind}"] = distances(row, kind, group)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
