# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""How a C++ kernel becomes an op: run at once, recorded by autograd, or an op of torch in a compiled graph.

A kernel is compiled for the sizes of its heads, so its op is registered from Python, once for all sizes, and finds the
library when it runs. Outside of `torch.compile`, where going through torch's dispatcher would cost 5 us a call, the
kernel is called directly.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args, get_type_hints

import torch

from lalm.modeling.ops.autograd import differentiable_by, plain_gradients
from lalm.modeling.ops.cpp_kernels import KERNEL_SOURCES, HeadKernel, kernel_files, require_kernel

_C_TYPES = {"double": ctypes.c_double, "int64_t": ctypes.c_int64}
_DECLARED = re.compile(r"(?:const )?(\w+)(.*)", re.DOTALL)


@cache
def structure(kernel: str, name: str) -> type[ctypes.Structure]:
    """The struct `name` of the kernel's C++ source, whose declaration there is the only one."""
    source = "\n".join(KERNEL_SOURCES[file] for file in kernel_files(kernel))
    found = re.search(rf"^struct {name} \{{(.*?)\}};", source, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{kernel}.cpp declares no struct {name}"
    fields: list[tuple[str, Any]] = []
    for declaration in re.sub(r"//.*", "", found[1]).split(";")[:-1]:
        declared = _DECLARED.fullmatch(declaration.strip())
        assert declared is not None, declaration
        for variable in declared[2].split(","):
            kind: Any = ctypes.c_void_p if "*" in variable else _C_TYPES[declared[1]]
            field, _, size = variable.strip(" *]\n").partition("[")
            fields.append((field, kind * int(size) if size else kind))
    # Without a dictionary, an instance takes no field that is not declared.
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})


def pack(kernel: str, name: str, **fields: Any) -> ctypes.Structure:
    """That struct with these fields, which must be all; pointers are addresses (see `address`)."""
    made = structure(kernel, name)
    if len(fields) != len(made._fields_):
        missing = {field for field, *_ in made._fields_} - fields.keys()
        raise TypeError(f"{kernel}.cpp, {name}: there is no value for {sorted(missing)}")
    return made(**fields)


def address(x: torch.Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor lie, for a kernel; the caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


def fresh(like: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Memory for what a kernel writes; it leaves out padded tokens."""
    return (torch.empty_like if skip is None else torch.zeros_like)(like, memory_format=torch.contiguous_format)


def _open_library(number: int = 0) -> torch.library.Library:
    """A namespace of this copy of the code: those saved with checkpoints may run in the same process."""
    try:
        return torch.library.Library(f"lalm_{number}" if number else "lalm", "DEF")
    except RuntimeError:  # another copy has it
        return _open_library(number + 1)


_library = _open_library()


class KernelOp:
    """A function of tensors that a C++ kernel computes. A rule derives a class, and makes one instance of it.

    Attributes of the class:
        name: of the op.
        Tensors: what it computes with, a NamedTuple; masks, which have no gradient, come last.
        Options: a NamedTuple of numbers.
        masks: how many these are.
        outputs: how many tensors it gives.
        extras: how many more it makes for the backward pass.
        read_again: how many of the outputs, the first ones, the backward pass may read.
    """

    name: str
    Tensors: Any
    Options: Any
    outputs: int
    masks = extras = read_again = 0

    def __init__(self) -> None:
        kinds = get_type_hints(self.Tensors)
        self.fields = len(kinds)
        self.function = _recorded(self)
        self.registered, self.registered_backward = _register(self, kinds)

    def kernel(self, x: Any, options: Any) -> HeadKernel | None:
        """The kernel for these tensors."""
        raise NotImplementedError

    def allocate(self, x: Any, options: Any, keeps: bool) -> tuple[torch.Tensor | None, ...]:
        """Memory for the outputs and extras, of which None are made without `keeps`. It looks at no number."""
        raise NotImplementedError

    def forward(self, library: ctypes.CDLL, x: Any, options: Any, made: Sequence[torch.Tensor | None]) -> None:
        """Run the kernel into what `allocate` has made."""
        raise NotImplementedError

    def backward(self, library: ctypes.CDLL, x: Any, options: Any, saved: Any, gradients: Any) -> tuple:
        """The gradients of the tensors from those of the outputs, of which some may be None."""
        raise NotImplementedError

    def plain(self, x: Any, options: Any) -> tuple[torch.Tensor | None, ...]:
        """The outputs in operations that autograd knows."""
        raise NotImplementedError

    def plain_of_saved(self, ctx: Any, *saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """`plain` of what a context of autograd holds."""
        return self.plain(self.Tensors(*saved[: self.fields]), ctx.options)

    def saved(self, made: Sequence[torch.Tensor | None], options: Any) -> tuple[torch.Tensor | None, ...]:
        """What the backward pass gets of all that is made."""
        return (*made[: self.read_again], *made[self.outputs :])

    def dense(self, x: Any) -> Any:
        """The tensors as the kernel can read them."""
        return self.Tensors(*(None if y is None else y.contiguous() for y in x))

    def __call__(self, x: Any, options: Any) -> tuple[Any, ...]:
        """The outputs for tensors that are `dense`. While compiling, a tensor without numbers stands for None.

        Raises:
            RuntimeError: there is no kernel for these tensors.
        """
        keeps = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in x)
        if not torch.compiler.is_compiling():
            library = require_kernel(self.kernel(x, options), *x)
            if keeps:
                return self.function.apply(library, options, *x)
            made = self.allocate(x, options, False)  # with few tokens, recording takes longer than the kernel
            self.forward(library, x, options, made)
            return made[: self.outputs]
        made = self.registered(*x, *options, keeps)
        return (made,) if isinstance(made, torch.Tensor) else made[: self.outputs]


def _recorded(op: KernelOp) -> type[torch.autograd.Function]:
    """The autograd function of an op; its constants are the kernel's library and the options."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, library, options, *tensors):
            x = op.Tensors(*tensors)
            made = op.allocate(x, options, any(ctx.needs_input_grad))
            op.forward(library, x, options, made)
            ctx.library, ctx.options = library, options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *op.saved(made, options))
            return made[: op.outputs]

        @staticmethod
        @differentiable_by(op.plain_of_saved, constants=2)
        def backward(ctx, *gradients):
            saved = ctx.saved_tensors
            x, rest = op.Tensors(*saved[: op.fields]), saved[op.fields :]
            return None, None, *op.backward(ctx.library, x, ctx.options, rest, gradients)

    Recorded.__name__ = Recorded.__qualname__ = f"{op.name}_kernel"
    return Recorded


def _register(op: KernelOp, kinds: dict[str, Any]) -> tuple[Any, Any]:
    """The op of torch, and that of its backward pass, with fake implementations and, for the first, its gradient."""
    options, tensors = get_type_hints(op.Options), _parameters(kinds)
    numbers, count = _parameters(options), op.fields - op.masks
    saved = op.read_again + op.extras
    given = "".join(f"Tensor? d_{index}, " for index in range(op.outputs))
    given += "".join(f"Tensor? saved_{index}, " for index in range(saved))
    qualified = [f"{_library.ns}::{op.name}", f"{_library.ns}::{op.name}_backward"]
    tag = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{op.name}({tensors}, {numbers}, bool keeps) -> {_results(op.outputs + op.extras)}", tags=tag)
    _library.define(f"{op.name}_backward({given}{tensors}, {numbers}) -> {_results(count)}", tags=tag)

    def split(arguments: Sequence[Any]) -> tuple[Any, Any]:
        x, rest = arguments[: op.fields], arguments[op.fields : op.fields + len(options)]
        return op.dense(op.Tensors(*x)), op.Options(*rest)

    def run(*arguments: Any) -> Any:
        x, chosen = split(arguments)
        made = op.allocate(x, chosen, arguments[-1])
        op.forward(require_kernel(op.kernel(x, chosen), *x), x, chosen, made)
        return _without_none(made, x[0])

    def fake(*arguments: Any) -> Any:
        x, chosen = split(arguments)
        return _without_none(op.allocate(x, chosen, arguments[-1]), x[0])

    def run_back(*arguments: Any) -> Any:
        gradients, kept = arguments[: op.outputs], arguments[op.outputs : op.outputs + saved]
        x, chosen = split(arguments[op.outputs + saved :])
        library = require_kernel(op.kernel(x, chosen), *x)
        found = op.backward(library, x, chosen, kept, gradients)[:count]
        return _without_none([None if y is None else y.contiguous() for y in found], x[0])

    def fake_back(*arguments: Any) -> Any:
        x, _ = split(arguments[op.outputs + saved :])
        found = [None if y is None else torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:count]]
        return _without_none(found, x[0])

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        made = output if isinstance(output, tuple) else (output,)
        ctx.options, ctx.keeps = op.Options(*inputs[op.fields : -1]), inputs[-1]
        ctx.set_materialize_grads(False)
        absent = (y for y in made[: op.outputs] if _stands_for_none(y))
        ctx.mark_non_differentiable(*absent, *made[op.outputs :])
        ctx.save_for_backward(*inputs[: op.fields], *op.saved(made, ctx.options))

    def backward(ctx: Any, *gradients: Any) -> tuple:
        x, kept = ctx.saved_tensors[: op.fields], ctx.saved_tensors[op.fields :]
        gradients = gradients[: op.outputs]
        if torch.is_grad_enabled() or not ctx.keeps:  # to be differentiated again, or nothing was kept for the kernel
            found = plain_gradients(op.plain_of_saved, ctx, ctx.needs_input_grad[: op.fields], gradients)
        else:
            made = op.registered_backward(*gradients, *kept, *x, *ctx.options)
            made = made if isinstance(made, (tuple, list)) else (made,)
            found = tuple(dx if y is not None else None for y, dx in zip(x, made, strict=False)) + (None,) * op.masks
        return (*found, *(None,) * (len(options) + 1))

    for name, implementation, without in ((qualified[0], run, fake), (qualified[1], run_back, fake_back)):
        _library.impl(name.partition("::")[2], implementation, "CPU")
        torch.library.register_fake(name, without, lib=_library)
    torch.library.register_autograd(qualified[0], backward, setup_context=setup, lib=_library)
    space = getattr(torch.ops, _library.ns)
    return getattr(space, op.name).default, getattr(space, f"{op.name}_backward").default


def _parameters(kinds: dict[str, Any]) -> str:
    """The parameters of a schema."""
    words = {torch.Tensor: "Tensor", float: "float", bool: "bool", int: "int"}
    found = []
    for name, kind in kinds.items():
        base = next((x for x in get_args(kind) if x is not type(None)), kind)
        found.append(f"{words[base]}{'' if base is kind else '?'} {name}")
    return ", ".join(found)


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _stands_for_none(x: torch.Tensor) -> bool:
    return x.ndim == 1 and x.shape[0] == 0


def _without_none(made: Sequence[torch.Tensor | None], like: torch.Tensor) -> Any:
    """What a registered op gives: a tensor each, without numbers for None."""
    found = tuple(like.new_empty(0) if x is None else x for x in made)
    return found[0] if len(found) == 1 else found
