# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""`transformers serve` for our checkpoints: an OpenAI-compatible server of chats and completions.

    python -m lalm.serve runs/chat --port 8000
    transformers chat runs/chat http://localhost:8000

Takes the arguments of `transformers serve`, which looks architectures up in transformers' own namespace: ours are put
there. A chat's next request continues from the state after its last one, which does not grow with the text.
"""

import sys
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from lalm import VARIANTS
from lalm.errors import UserError, exit_on_user_error, one_line
from lalm.network import go_offline_without_network

logger = logging.get_logger("transformers.lalm")

# States that are kept: two a request, after the prompt and after the answer.
_KEPT = 16
_HEAD = "AutoModelForCausalLM"


class TextMemory:
    """The caches after the last texts that were read, least recently used first."""

    def __init__(self, size: int = _KEPT):
        self.size = size
        self.caches: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def keep(self, ids: torch.Tensor, cache: Cache) -> None:
        """Keep `cache`, which has read `ids [1, S]`, and which nobody may change from now on."""
        self.caches[tuple(ids[0].tolist())] = cache
        self.caches.move_to_end(tuple(ids[0].tolist()))
        while len(self.caches) > self.size:
            self.caches.popitem(last=False)

    def recall(self, ids: torch.Tensor) -> tuple[int, Cache | None]:
        """A copy of the cache that has read most of `ids [1, T]`, but not the last, and the number of its tokens."""
        text = tuple(ids[0, :-1].tolist())
        longest = max((read for read in self.caches if read == text[: len(read)]), key=len, default=None)
        if longest is None:
            return 0, None
        self.caches.move_to_end(longest)
        return len(longest), deepcopy(self.caches[longest])


class Remembers:
    """Mixed into a causal language model: generate() of one text reads only what no earlier text began with."""

    memory: TextMemory

    def generate(self: Any, input_ids: torch.Tensor | None = None, **kwargs):
        """As the stock one."""
        if input_ids is None or not self._may_continue(input_ids, kwargs):
            return super().generate(input_ids, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("memory", TextMemory())
        seen, cache = self.memory.recall(input_ids)
        cache = DynamicCache(config=self.config) if cache is None else cache
        logger.info("%d of %d tokens of the prompt are in a state", seen, input_ids.shape[1])
        if seen < input_ids.shape[1] - 1:
            with torch.no_grad():
                self(input_ids[:, seen:-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.memory.keep(input_ids[:, :-1], deepcopy(cache))
        out = super().generate(input_ids, past_key_values=cache, **kwargs)  # type: ignore[misc]
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        self.memory.keep(sequences[:, :-1], cache)
        return out

    @staticmethod
    def _may_continue(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this is one unpadded text, decoded token by token in a growing cache."""
        mask, config = kwargs.get("attention_mask"), kwargs.get("generation_config")
        ways = {"num_beams": 1, "num_return_sequences": 1, "cache_implementation": None, "use_cache": True}
        asked = {name: kwargs.get(name, getattr(config, name, None)) for name in ways}
        return (
            input_ids.shape[0] == 1
            and input_ids.shape[1] > 1
            and mask is not None  # else generate() takes padding for masked
            and bool(mask.all())
            and kwargs.get("past_key_values") is None
            and all(value is None or value == ways[name] for name, value in asked.items())
        )


def served_classes() -> dict[str, type]:
    """Our causal language models by name, each with a memory of what it has read."""
    heads = (variant.models[_HEAD] for variant in VARIANTS)
    return {head.__name__: type(head.__name__, (Remembers, head), {"__module__": head.__module__}) for head in heads}


def main(arguments: list[str]) -> None:
    """Check what `transformers serve` would stumble over, then be it."""
    if not is_serve_available():
        raise UserError("lalm.serve needs the packages of `pip install lalm[serve]`.")
    if any(argument.startswith("--continuous-batching") for argument in arguments):
        raise UserError("--continuous-batching pages keys and values, and a recurrent state has none: leave it out.")
    import typer
    from transformers.cli.serve import Serve

    go_offline_without_network()
    for name, served in served_classes().items():
        setattr(transformers, name, served)
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(Serve)
    try:
        app(arguments, prog_name="python -m lalm.serve")
    except AttributeError as error:
        if getattr(error, "obj", None) is not transformers:
            raise
        raise UserError(f"the checkpoint holds a {error.name}; a server needs a causal language model") from error
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
