"""Take batch norm's statistics anew, over given data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from taylored._modules import Inputs, batch_norms, check_module, in_mode, run_on


def recalibrate(model: nn.Module, batches: Iterable[Inputs], *, share: float = 1.0) -> None:
    """Set the running statistics of every batch norm to the mean of those of the batches; all else is in eval mode.

    batches: inputs in the forms of `example_inputs`. share: how far to go from the present statistics to the new ones: after
    mending half the way is better than the whole, for predicted channels vary less than the lost ones did. Raises ValueError if
    there are no batches or share is not in [0, 1]; then, and if the model fails, nothing has changed."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}")
    norms: list[Any] = [
        n for n in batch_norms(check_module(model)).values() if n.track_running_stats and n.running_mean is not None
    ]
    before = [(n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone(), n.momentum) for n in norms]
    share_taken = 0.0
    try:
        with in_mode(model, training=False), torch.no_grad():
            for n in norms:
                n.reset_running_stats()
                n.momentum = None  # the mean over all batches
                n.train()
            batch = None
            for batch in batches:
                run_on(model, batch)
            if batch is None:
                raise ValueError("there are no batches to take statistics on")
        share_taken = share
    finally:
        for n, (mean, variance, tracked, momentum) in zip(norms, before, strict=True):
            n.momentum = momentum
            n.num_batches_tracked.copy_(tracked)
            n.running_mean.copy_(mean.lerp(n.running_mean, share_taken))
            n.running_var.copy_(variance.lerp(n.running_var, share_taken))
