"""Second moments of what layers take in, measured while a model runs: how well can some channels be told from the others?

Every consumer of units, a convolution or linear layer, has an input x of C channels at many positions of many examples. `Moments`
keeps the sums of x and x x' over all of them, in float64, by folds: examples are dealt out in turns, so that what was fitted on
some can be judged on others. A linear layer behind a flattened map has its channels at several places each: C are the units
then, and the places are positions.
"""

import functools
import inspect
import math
from collections.abc import Iterable

import torch
from torch import nn

from taylored._graph.values import ChannelGraph, check_fit
from taylored._modules import CONVOLUTIONS, Inputs, data_parallel, in_mode, run_on, unwrapped
from taylored._torch_compat import current_backward, own_tensors, watch_hooks

FOLDS = 2
POSITIONS = 128  # of each example, at most, evenly spread: neighbours say much the same
MOST = 4096  # channels of an input, of which FOLDS x C x C numbers are kept
AT_ONCE = 2048  # rows that are multiplied at least, where there are as many
RIDGES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # shares of each channel's variance


class Moments:
    """Sums of x and x x' over rows, [folds, C] and [folds, C, C], and how many rows they are of. Rows are taken relative to a
    pivot, the mean of the first batch, so that large means cost no digits, and wait until a product of them is worth its time."""

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.rows = torch.zeros(FOLDS, dtype=torch.float64, device=device)
        self._sums = torch.zeros(FOLDS, channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(FOLDS, channels, channels, dtype=torch.float64, device=device)
        self._waiting: list[list[torch.Tensor]] = [[] for _ in range(FOLDS)]
        self.pivot = torch.zeros(channels, dtype=torch.float64, device=device)
        self.examples = 0
        self.rounding = 0.0  # of the products, as a share of them

    def add(self, x: torch.Tensor) -> None:
        """x: [examples, positions, C], in float32 or float64."""
        if not self.examples:
            self.pivot = x.mean((0, 1)).double()
        x = x - self.pivot.to(x.dtype)
        for fold, waiting in enumerate(self._waiting):
            mine = x[(fold - self.examples) % FOLDS :: FOLDS].reshape(-1, x.shape[-1])
            self.rows[fold] += len(mine)
            waiting.append(mine)
            if sum(map(len, waiting)) >= max(AT_ONCE, x.shape[-1]):
                self._settle(fold)
        self.examples += len(x)
        self.rounding = max(self.rounding, 10 * torch.finfo(x.dtype).eps)

    def _settle(self, fold: int) -> None:
        if waiting := self._waiting[fold]:
            rows = torch.cat(waiting)
            waiting.clear()
            self._sums[fold] += rows.sum(0)
            self._products[fold] += rows.T @ rows

    @property
    def sums(self) -> torch.Tensor:
        """[folds, C]: of x less the pivot."""
        for fold in range(FOLDS):
            self._settle(fold)
        return self._sums

    @property
    def products(self) -> torch.Tensor:
        """[folds, C, C]."""
        for fold in range(FOLDS):
            self._settle(fold)
        return self._products

    def __iadd__(self, other: "Moments") -> "Moments":
        """Those of both; they come to have one pivot."""
        move = other.pivot - self.pivot
        sums = other.sums + other.rows[:, None] * move
        cross = other.sums[:, :, None] * move + move[:, None] * sums[:, None, :]
        self._products = self.products + other.products + cross
        self._sums = self.sums + sums
        self.rows += other.rows
        self.examples += other.examples
        self.rounding = max(self.rounding, other.rounding)
        return self

    @property
    def folds_filled(self) -> int:
        """How many folds have rows."""
        return int((self.rows > 0).sum())

    def over(self, folds: tuple[int, ...] | None = None, centred: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [C] and covariance [C, C] over some of the folds (None: all), float64. Not centred: a mean of zero, and second
        moments."""
        chosen = list(range(FOLDS) if folds is None else folds)
        rows = self.rows[chosen].sum().clamp(min=1)
        mean = self.sums[chosen].sum(0) / rows
        covariance = self.products[chosen].sum(0) / rows - mean[:, None] * mean
        mean = mean + self.pivot
        if centred:
            return mean, covariance
        return torch.zeros_like(mean), covariance + mean[:, None] * mean

    def halves(self, centred: bool = True):
        """(covariance to fit on, covariance to judge by), for every fold that is left out; none where a fold is empty."""
        if self.folds_filled < FOLDS:
            return
        for fold in range(FOLDS):
            fit = tuple(other for other in range(FOLDS) if other != fold)
            yield self.over(fit, centred)[1], self.over((fold,), centred)[1]


def ridge_of(covariance: torch.Tensor, share: float) -> torch.Tensor:
    """The covariance with that share of each channel's variance added: scaling a channel changes nothing. What is constant gets
    as much as keeps the solution away from it."""
    variances = covariance.diagonal()
    return covariance + torch.diag(share * variances + 1e-12 * variances.mean().clamp(min=1e-30))


def best_ridge(moments: Moments, error) -> tuple[float, float]:
    """The share in RIDGES with the least held-out error(share), and that error, which falls and then rises: so half of them need
    never be tried. The greatest where nothing is held out, and NaN; none that the moments' own rounding would show through."""
    shares = [share for share in RIDGES if share > moments.rounding] or [RIDGES[-1]]
    if moments.folds_filled < 2:
        return shares[-1], math.nan
    known: dict[int, float] = {}

    def at(i):
        if i not in known:
            known[i] = error(shares[i])
        return known[i]

    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
    return shares[low], at(low)


def places_of(graph: ChannelGraph, name: str) -> torch.Tensor | None:
    """Which channels of a consumer's input are mixed as one, [C, places]: each by itself, or all places of a unit that was
    flattened; None where there are too many."""
    width = graph.layers[name].width
    slots = [group.inputs[name] for group in graph.groups if name in group.inputs]
    if len(slots) == 1 and slots[0].numel() == width and slots[0].shape[1] > 1:
        return slots[0] if len(slots[0]) <= MOST else None
    return torch.arange(width)[:, None] if width <= MOST else None


def rows_of(module: nn.Module, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The input of a consumer as rows: [examples, positions, C]."""
    x = x.detach()
    if isinstance(module, CONVOLUTIONS):
        if all(k == 1 for k in module.kernel_size) and not module.transposed:
            seen = (slice(None), slice(None), *(slice(None, None, step) for step in module.stride))
            x = x[seen]  # the positions that it sees
        x = x.flatten(2)
        x = x[:, :, _spread(x.shape[2], x.device)].transpose(1, 2)
    else:
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x[:, _spread(x.shape[1], x.device)]
    if places.shape[1] > 1:
        x = x[..., places.to(x.device)].transpose(2, 3).flatten(1, 2)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@functools.lru_cache(maxsize=64)
def _spread(count: int, device: torch.device):
    """At most POSITIONS of so many, evenly spread with a jitter that is always the same."""
    if count <= POSITIONS:
        return slice(None)
    generator = torch.Generator().manual_seed(count)
    places = torch.arange(POSITIONS, dtype=torch.float64) + torch.rand(POSITIONS, dtype=torch.float64, generator=generator)
    return (places * count / POSITIONS).long().clamp(max=count - 1).to(device)


class InputMoments:
    """Context manager: forward passes within it are measured; afterwards the model is as it was.

    moments: consumer -> `Moments` of its input. residuals: layer -> the held-out error of its outputs that mending left when it
    was last used, as a share of what the cut alone would have made. A consumer is left out if it is neither a convolution nor
    linear, if its weight is computed (a parametrization), or if its input has more than MOST channels. model: in its
    DistributedDataParallel wrapper the processes' moments are added up by `collected`, which each process must call.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph):
        check_fit(graph, model)
        self.model, self.graph, self.parallel = unwrapped(model), graph, data_parallel(model)
        self.moments: dict[str, Moments] = {}
        self.residuals: dict[str, float] = {}
        self._handles: list = []
        names = dict.fromkeys(name for group in graph.groups for name in group.inputs)
        found = {name: places_of(graph, name) for name in names if self._is_plain(name)}
        self.places: dict[str, torch.Tensor] = {name: places for name, places in found.items() if places is not None}

    def _is_plain(self, name) -> bool:
        module = self.model.get_submodule(name)
        return isinstance(module, (*CONVOLUTIONS, nn.Linear)) and "weight" in dict(own_tensors(module))

    def __enter__(self):
        if self._handles:
            raise RuntimeError(f"this {type(self).__name__} is already active")
        watch_hooks()
        for name in self.places:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        watch_hooks()

    def _hook(self, name):
        @torch.compiler.disable
        def hook(module, args):
            if current_backward() == -1:  # a checkpointed segment that runs again was seen before
                rows = rows_of(module, args[0], self.places[name])
                if name not in self.moments:  # which holds C x C zeros: not to be made in vain at every call
                    self.moments[name] = Moments(rows.shape[-1], rows.device)
                self.moments[name].add(rows)
            return self._passed_on(args)

        return hook

    def _passed_on(self, args):
        """What the consumer gets: its arguments."""
        return None

    def collected(self) -> dict[str, Moments]:
        """The moments of all processes. Raises RuntimeError if nothing ran, FloatingPointError for what is not finite, naming
        the layer."""
        if not self.moments:
            raise RuntimeError(f"no forward pass was seen: run the model within `with {type(self).__name__}(...)`")
        everywhere = self.moments
        if self.parallel is not None:
            everywhere = {name: _add_up(moments, self.parallel.process_group) for name, moments in self.moments.items()}
        for name, moments in everywhere.items():
            if not (moments.sums.isfinite().all() and moments.products.isfinite().all()):
                raise FloatingPointError(f"the input of {name!r} is not finite")
        return everywhere


def check_inputs(model: nn.Module, batch) -> None:
    """Raises ValueError for what the model cannot be called with, such as a pair of inputs and targets."""
    if isinstance(batch, (tuple, list)):
        try:
            inspect.signature(model.forward).bind(*batch)
        except TypeError as error:
            raise ValueError(
                f"a batch has {len(batch)} parts, with which the model cannot be called ({error}): give inputs alone, as in "
                "[inputs for inputs, targets in loader]"
            ) from error


def measure(model: nn.Module, graph: ChannelGraph, batches: Iterable[Inputs]) -> InputMoments:
    """The moments of a model in eval mode, in one sweep over batches of inputs in the forms of `example_inputs`. Raises
    ValueError for pairs of inputs and targets, and if there are no batches."""
    with InputMoments(model, graph) as measured, in_mode(model, training=False), torch.no_grad():
        for batch in batches:
            check_inputs(model, batch)
            run_on(model, batch)
    if not measured.moments and measured.places:
        raise ValueError("there are no batches to measure the inputs of layers on")
    return measured


def _add_up(moments: Moments, group) -> Moments:
    """Sums over all processes, relative to a pivot of zero."""
    zero = Moments(len(moments.pivot), moments.pivot.device)
    zero += moments
    for total in (zero.rows, zero.sums, zero.products):
        torch.distributed.all_reduce(total, group=group)
    return zero
