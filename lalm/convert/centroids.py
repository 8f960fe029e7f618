# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Feature maps of a student's heads in closed form: the centroids of the keys that its softmax teacher makes.

With phi(k) the posterior of a mixture of Gaussians of one variance s^2 around the centroids m_f,
    W_k = m_f / s^2,  b_k = -|m_f|^2 / (2 s^2),    W_q = scale m_f,  b_q = 0,
psi(q) . phi(k) is exp(scale q . k) with k replaced by its centroid (Bounded-memory control, Peng et al., arXiv
2110.02488, has such slots; k-means after Lloyd, 1982). The centroids are those of keys after rotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lalm.modeling.modeling_heads import LalmForCausalLM
from lalm.modeling.window_linear_mixer import WindowLinearMixer


class Attention(NamedTuple):
    """One softmax layer in one forward of the teacher."""

    inputs: torch.Tensor  # [B, T, D], after the norm
    options: dict[str, Any]  # what the model hands to every mixer: layout, rotary tables ...
    outputs: torch.Tensor  # [B, T, D], before the residual


@contextmanager
def watch_attention(teacher: LalmForCausalLM, layers: Iterable[int]) -> Iterator[dict[int, Attention]]:
    """Inside, every forward of `teacher` (one of our models) leaves what its `layers` got and gave in the dict."""
    seen: dict[int, Attention] = {}

    def note(index: int, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        seen[index] = Attention(args[0], kwargs, output[0])

    with ExitStack() as stack:
        for index in layers:
            mixer: nn.Module = teacher.model.layers[index].mixer
            hook = mixer.register_forward_hook(
                lambda _, args, kwargs, output, index=index: note(index, args, kwargs, output), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield seen


def window_linear_layers(student: LalmForCausalLM) -> dict[int, WindowLinearMixer]:
    """The mixers of a student that have a window, by layer."""
    mixers = {index: layer.mixer for index, layer in enumerate(student.model.layers)}
    return {index: mixer for index, mixer in mixers.items() if isinstance(mixer, WindowLinearMixer)}


@torch.no_grad()
def fit_centroids(
    student: LalmForCausalLM,
    teacher: LalmForCausalLM,
    batches: Iterable[dict[str, torch.Tensor]],
    keys_per_head: int = 8192,
    iterations: int = 12,
) -> None:
    """Set the feature maps "centroids" of a student by k-means on its teacher's keys.

    Args:
        teacher: the student with all layers softmax, of the same weights.
        batches: `input_ids [B, T]` and what else the model takes.
        keys_per_head: how many keys of each head to keep, spread evenly over the tokens.

    Raises:
        ValueError: there are fewer keys than centroids.
    """
    layers, device = window_linear_layers(student), next(student.parameters()).device
    kept: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    with watch_attention(teacher, layers) as seen:
        for batch in batches:
            inputs = {name: x.to(device) for name, x in batch.items() if name != "labels"}
            teacher.model(**inputs, use_cache=False)
            for index, mixer in layers.items():
                _, k, _ = mixer.project(seen[index].inputs, seen[index].options["rotary"])
                kept[index].append(k.flatten(0, 1))
    for index, mixer in layers.items():
        keys = torch.cat(kept.pop(index)).transpose(0, 1).float()
        step = max(1, keys.shape[1] // keys_per_head)
        _set_maps(mixer, keys[:, ::step], iterations)


def _set_maps(mixer: WindowLinearMixer, keys: torch.Tensor, iterations: int) -> None:
    """From keys `[G, n, K]`."""
    count, groups = mixer.k_map.weight.shape[1], mixer.q_map.weight.shape[0] // len(keys)
    found = [_k_means(x, count, iterations) for x in keys]
    centroids, variances = torch.stack([x for x, _ in found]), torch.stack([x for _, x in found])[:, None]
    assert mixer.k_map.bias is not None  # as every map of feature_map="centroids"
    assert mixer.q_map.bias is not None
    mixer.k_map.weight.copy_(centroids / variances[..., None])
    mixer.k_map.bias.copy_(-centroids.square().sum(-1) / (2 * variances))
    mixer.q_map.weight.copy_(centroids.repeat_interleave(groups, dim=0) * mixer.head_dim**-0.5)
    mixer.q_map.bias.zero_()


def _k_means(x: torch.Tensor, count: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids `[F, K]` of `x [n, K]`, and the mean variance of a channel around them."""
    if len(x) < count:
        raise ValueError(f"{len(x)} keys cannot have {count} centroids: give more text.")
    generator = torch.Generator().manual_seed(0)
    centroids = x[torch.randperm(len(x), generator=generator)[:count].to(x.device)].clone()
    nearest = _nearest(x, centroids)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        again = x[torch.randint(len(x), (count,), generator=generator).to(x.device)]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), again)
        nearest = _nearest(x, centroids)
    return centroids, (x - centroids[nearest]).square().mean().clamp(min=1e-6)


def _nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.addmm(-centroids.square().sum(-1) / 2, x, centroids.T).argmax(-1)


__all__ = ["Attention", "fit_centroids", "watch_attention", "window_linear_layers"]
