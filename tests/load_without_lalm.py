"""Run as a script by test_hub.py: loads checkpoints where lalm cannot be imported and writes what they compute.

Usage: load_without_lalm.py TASKS.json, a list of {"path", "auto_class", "output", "resave" (optional)}.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

# Python refuses to import a name whose entry is None, wherever the package may be installed.
sys.modules["lalm"] = None


def load(path: str, auto_class: str) -> torch.nn.Module:
    model = getattr(transformers, auto_class).from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model


def run_task(model: torch.nn.Module, auto_class: str, output: str, resave: str | None = None, **_) -> None:
    input_ids = torch.arange(6)[None]
    with torch.no_grad():
        result = {"output": model(input_ids)[0]}
        if auto_class == "AutoModelForCausalLM":
            result["generated"] = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, output)
    if resave is not None:
        model.save_pretrained(resave)


def main() -> None:
    try:
        importlib.import_module("lalm.configuration")
    except ImportError:
        pass
    else:
        raise SystemExit("lalm can be imported: this run would prove nothing")
    tasks = json.loads(Path(sys.argv[1]).read_text())
    # all at first: each brings code of its own, which must not disturb that of the others
    models = [load(task["path"], task["auto_class"]) for task in tasks]
    for model, task in zip(models, tasks, strict=True):
        run_task(model, **task)


if __name__ == "__main__":
    main()
