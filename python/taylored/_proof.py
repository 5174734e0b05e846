"""Prove a cut on real inputs before it is made: the compacted model against the masked one, all outputs.

Both run in eval mode in the model's own precision. Where they differ by more than rounding, copies of both run in float64: a net
that amplifies rounding agrees there, a wrong cut does not.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from taylored._errors import VerificationError
from taylored._graph.values import ChannelGraph
from taylored._masking import masked
from taylored._modules import Inputs, count_examples, in_mode, run_on, tensors_in, untouched
from taylored._plan import PrunePlan
from taylored._torch_compat import tree_map_only

EXAMPLES = 4  # of a batch, at most
# What kernels of other shapes make of the same numbers, as a share of the largest output; above it float64 decides.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
PERTURBATION = 1e-6  # of the inputs, by which a net's sensitivity is measured


@dataclasses.dataclass(frozen=True)
class Verification:
    """What came of a proof. difference: the largest difference of an output, as a share of the largest element of it; dtype: in
    which precision it was measured; unproven: why the outputs could not be compared, "" where they could."""

    difference: float
    dtype: torch.dtype
    unproven: str = ""


def prove(
    model: nn.Module, graph: ChannelGraph, plan: PrunePlan, inputs: Inputs, cut: Callable[[nn.Module, PrunePlan], object]
) -> Verification:
    """Compare what a plan leaves of the model with the model masked. cut(copy, plan) applies the plan; the model itself is left
    as it is. Raises VerificationError, naming the first layer at which they part."""
    inputs, dtype = first_examples(inputs), _precision(model)
    try:
        pair = _Pair(model, graph, plan)
        expected = pair.masked(inputs)
    except Exception as error:  # whatever a user's model raises: it is not the cut that is at fault
        return Verification(math.nan, dtype, f"the model as it is cannot be copied, or run in eval mode on these inputs: {error}")
    pair.cut(cut)
    difference = _difference(expected, pair.small_outputs(inputs))
    if difference <= TOLERANCES[dtype]:
        return Verification(difference, dtype)
    if pair.is_random(inputs):
        return Verification(difference, dtype, "the model is random in eval mode: with the same input it says another thing")
    double = _Pair(copy.deepcopy(model).double(), graph, plan)
    inputs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        expected = double.masked(inputs)
    except Exception as error:  # somewhere in it float32 is written out
        why = f"in {dtype} outputs differ by {difference:.2g}, and in float64 the model does not run: {error}"
        return Verification(difference, dtype, why)
    double.cut(cut)
    difference, sensitivity = _difference(expected, double.small_outputs(inputs)), double.sensitivity(inputs)
    if math.isinf(sensitivity) and difference > TOLERANCES[torch.float64]:
        return Verification(difference, torch.float64, "the shapes of its outputs change with the least change of its input")
    if difference <= max(TOLERANCES[torch.float64], 1e-12 / PERTURBATION * sensitivity):
        return Verification(difference, torch.float64)
    layer = double.first_difference(inputs)
    where = f"they part at layer {layer!r}" if layer else "no layer's output differs: what comes after the last layer does"
    raise VerificationError(
        f"the compacted model differs from the masked one by {difference:.2g} of the largest output, in float64 too; {where}. "
        "Nothing was cut. Please report the model",
        difference,
        layer,
    )


def first_examples(inputs: Inputs) -> Inputs:
    """At most EXAMPLES of a batch."""
    try:
        count = count_examples(inputs)
    except StopIteration:
        return inputs
    return tree_map_only(torch.Tensor, lambda t: t[:EXAMPLES] if t.ndim and len(t) == count else t, inputs)


def _precision(model: nn.Module) -> torch.dtype:
    """The least precise floating-point type among the model's tensors."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.dtype in TOLERANCES}
    return max(found, key=TOLERANCES.__getitem__, default=torch.float32)


class _Pair:
    """A model masked by a plan, and a copy of it to be cut."""

    def __init__(self, model, graph, plan):
        self.model, self.graph, self.plan = model, graph, plan
        self.small = copy.deepcopy(model)
        for p in self.small.parameters():
            p.grad = None

    def cut(self, cut) -> None:
        cut(self.small, dataclasses.replace(self.plan, graph=None))  # running it for real says more than a rehearsal

    def masked(self, inputs) -> list[torch.Tensor]:
        with masked(self.model, self.graph, self.plan):
            return _outputs(self.model, inputs)

    def small_outputs(self, inputs) -> list[torch.Tensor]:
        return _outputs(self.small, inputs)

    def is_random(self, inputs) -> bool:
        """Whether the masked model says another thing when torch's generator is in another state."""
        first, second = (_outputs(self.model, inputs, seed) for seed in (0, 1))
        return _difference(first, second) > 0

    def sensitivity(self, inputs) -> float:
        """By how much the masked model's outputs change, as a share of them, where its inputs change by PERTURBATION of
        themselves; infinite if their shapes do."""
        generator = torch.Generator().manual_seed(0)

        def moved(t):
            if not t.is_floating_point():
                return t
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
            return t * (1 + PERTURBATION * noise)

        return _difference(self.masked(inputs), self.masked(tree_map_only(torch.Tensor, moved, inputs)))

    def first_difference(self, inputs) -> str | None:
        """The first layer whose outputs differ, of those that stay."""
        with masked(self.model, self.graph, self.plan):
            expected = _layer_outputs(self.model, self.graph, inputs)
        actual = _layer_outputs(self.small, self.graph, inputs)
        for (name, whole), (_, small) in zip(expected, actual, strict=False):
            axis = self.graph.layers[name].axis
            module = self.model.get_submodule(name)
            kept = self.plan.keep.get((f"{name}.weight", 1 if getattr(module, "transposed", False) else 0))
            if kept is not None and whole.ndim > 1 and whole.shape[axis] != small.shape[axis]:
                whole = whole.index_select(axis, kept.to(whole.device))
            if _difference([whole], [small]) > TOLERANCES[torch.float64]:
                return name
        return None


def _outputs(model, inputs, seed=0) -> list[torch.Tensor]:
    """Every tensor that a model returns."""
    with _quietly(model, inputs, seed):
        return [t.detach() for t in tensors_in(run_on(model, inputs))]


@contextlib.contextmanager
def _quietly(model, inputs, seed):
    """In eval mode, without gradients, and leaving nothing behind: neither in the model nor in torch's generators."""
    devices = {t.device for t in (*model.parameters(), *tensors_in(inputs)) if t.device.type == "cuda"}
    with in_mode(model, training=False), untouched(model), torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _layer_outputs(model, graph, inputs) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []

    def keep(name):
        def hook(_module, _args, output):
            if isinstance(output, torch.Tensor):
                found.append((name, output.detach()))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in graph.layers]
    try:
        with _quietly(model, inputs, 0):
            run_on(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _difference(expected, actual) -> float:
    """The largest difference of two lists of tensors, as a share of each one's largest element; infinite for other shapes."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in actual]:
        return math.inf
    return max((_apart(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel():
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, too
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
    scale = a.abs()[a.isfinite()]
    return float(gap.max() / max(float(scale.max()) if scale.numel() else 0.0, torch.finfo(torch.float64).tiny))
