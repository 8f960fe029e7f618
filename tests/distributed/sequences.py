"""Run by `torch.distributed.run`: rows by sequence parallelism against one process, to a JSON file.

Usage: python -m torch.distributed.run --nproc_per_node 4 -m tests.distributed.sequences OUTPUT.json
Four processes share a sequence, and then two pairs of them one each. Then all train by the Trainer of scaling.md.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

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


class InOrder(Trainer):
    """The stock Trainer without shuffling."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, self._train_batch_size, collate_fn=self.data_collator)


def documented_trainer() -> type[Trainer]:
    """The class that docs/scaling.md shows."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (shown,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Trainer)" in block)
    names = {"sequence_parallel": sequence_parallel}
    exec(shown, names)
    return names["SequenceParallelTrainer"]


def trained(trainer: type[Trainer], folder: str) -> list[float]:
    """Losses and gradient norms of four steps of two batches each, with unequal numbers of labels."""
    given = inputs("padding and documents")
    rows = [{name: x[i % BATCH] for name, x in given.items()} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
        learning_rate=1e-2, ddp_backend="gloo" if dist.is_initialized() else None,
    )  # fmt: skip
    (row,) = (row for row in SPLIT if row.name == "delta_net_gated")
    run = trainer(row.build(), arguments, train_dataset=rows)
    run.train()
    return [entry[name] for entry in run.state.log_history if "loss" in entry for name in ("loss", "grad_norm")]


def main(output: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    found = {}
    for row in SPLIT:
        for processes, group in ((4, None), (2, pair)):
            for kind in KINDS[processes]:
                found[f"{row.name}, {processes}, {kind}"] = distances(row, kind, group)
    with tempfile.TemporaryDirectory() as folder:
        found["trainer"] = trained(documented_trainer(), folder)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
