"""Run by `torch.distributed.run`: the command lines of a file one after the other, in the same processes.

Usage: python -m torch.distributed.run --nproc_per_node N -m tests.distributed.scripts COMMANDS.json OUTPUT
Each command is {"script": module with a main(argv), "argv": [...], "environment": what accelerate launch would set,
"truncate": a file that is cut off before}.
Every rank writes OUTPUT.<rank>.json: for each command what it returned or raised, and what it printed and logged.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lalm.errors import UserError


def allow_fsdp_on_cpu() -> None:
    """accelerate silently runs DDP in the place of FSDP where the processes have no GPU: let it take their CPUs."""
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def without_compiling() -> None:
    """DeepSpeed would compile an operator of its own, for all-reduces in shared memory."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(command: dict) -> dict:
    if "--deepspeed" in command["argv"]:
        without_compiling()
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    os.environ.update(command.get("environment", {}))
    if "truncate" in command:
        if os.environ["RANK"] == "0":
            os.truncate(command["truncate"], 100)
        torch.distributed.barrier()
    found, shown, logged = {}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(logged):
        try:
            results = importlib.import_module(command["script"]).main(command["argv"])
            found["results"] = {key: value for key, value in results.items() if isinstance(value, (int, float, str))}
        except UserError as error:
            found["error"] = str(error)
    for name in command.get("environment", {}):
        del os.environ[name]
    logging.getLogger("lalm.training").handlers = []
    return found | {"stdout": shown.getvalue(), "stderr": logged.getvalue()}


def main(commands: str, output: str) -> None:
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    with open(commands) as file:
        found = [run(command) for command in json.load(file)]
    with open(f"{output}.{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
