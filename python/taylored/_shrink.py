"""Cut a pretrained model that is to stay as it is otherwise: score, cut and mend, on inputs without labels, without training."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from taylored._compact import Averages, compact
from taylored._graph.tracing import trace
from taylored._graph.values import ChannelGraph
from taylored._modules import Inputs, check_module, run_on, still, tensors_in
from taylored._moments import check_inputs
from taylored._optimizers import Optimizers
from taylored._plan import PrunePlan
from taylored._planning import Ignored, absolute, make_plan
from taylored._proof import first_examples
from taylored._recalibrate import recalibrate
from taylored._residual import ResidualScorer

STATISTICS = 32  # batches that batch norm's statistics are taken anew on


def shrink(
    model: nn.Module,
    batches: Iterable[Inputs],
    target_flops: float = 0.65,
    rounds: int = 1,
    round_to: int = 8,
    ignore: Ignored = (),
    *,
    optimizer: Optimizers = None,
    also: Averages = (),
    verify: bool = True,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> PrunePlan:
    """Remove what the rest can replace, in place, and let the rest replace it: no labels, no training.

    batches: inputs in the forms of `example_inputs`, iterated once or twice a round (a list or a DataLoader that gives inputs
    alone); as many and as various as there are: a thousand images settle what two hundred cannot. Each of `rounds` rounds (more
    than one has not paid) measures the loss that each unit would leave behind (`ResidualScorer`: with labels drawn from the
    softmax of the model's own outputs [N, classes], any other output with Gaussian noise), removes the cheapest per FLOP saved,
    mends their consumers by least squares; after the last, batch norm's statistics move half the way to the mended model's.
    target_flops: what may remain, a fraction or an absolute number for the first batch's first four examples. round_to, ignore:
    as for `make_plan`; optimizer, also: as for `compact`. Layers whose weights take no gradient are not mended, unless none takes
    any. verify: prove each cut on up to four examples. seed: of the drawn labels. log is called with a dict after every round:
    round, flops, params, units, seconds, residuals (layer -> held-out error of its outputs as a share of that without mending).

    Returns the plan, against the model as it was. Raises, before anything is touched, TypeError for batches that can be iterated
    only once, ValueError if there are none or they come with targets, PlanError for a budget that cannot be met.
    """
    model = check_module(model, "shrink(model, batches)")
    if iter(batches) is batches:
        raise TypeError("batches must be iterable more than once: a list or a DataLoader, not an iterator or a generator")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds!r}")
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches is empty")
    check_inputs(model, first)
    examples = first_examples(first)
    whole = graph = trace(model, examples)
    plan = PrunePlan.of(graph, {})
    options: dict[str, Any] = {"per_flop": True, "round_to": round_to, "ignore": ignore}
    any_scores = {g.name: torch.ones(g.units) for g in graph.groups}
    make_plan(graph, any_scores, target_flops=target_flops, **options)  # whether it can be met
    total = absolute("target_flops", target_flops, whole.flops)
    frozen = not any(p.requires_grad for p in model.parameters())
    for number in range(1, rounds + 1):
        since = time.perf_counter()
        scorer = _measured(model, graph, batches, seed + number, f"round {number}/{rounds}", progress)
        budget = round(whole.flops * (total / whole.flops) ** (number / rounds))
        step = make_plan(graph, scorer.scores(), target_flops=budget, **options)
        proof = examples if verify else None
        compact(model, step, optimizer, also, verify=proof, mend=scorer, mend_frozen=frozen)
        plan, graph = plan.then(step), graph.after(step.removed)
        entry: dict[str, Any] = {"round": number, "flops": graph.flops, "params": graph.params, "units": graph.units}
        entry |= {"seconds": round(time.perf_counter() - since, 3), "residuals": scorer.residuals}
        if log is not None:
            log(entry)
    recalibrate(model, itertools.islice(batches, STATISTICS), share=0.5)
    return plan


def _measured(model, graph: ChannelGraph, batches, seed, title, progress) -> ResidualScorer:
    """One pass forward and back over all batches, in eval mode, parameters without gradients."""
    generator: dict[torch.device, torch.Generator] = {}
    with still(model), ResidualScorer(model, graph, loss_reduction="sum") as scorer:
        for batch in tqdm(batches, desc=title, disable=not progress, leave=False):
            loss = _own_loss(run_on(model, batch), generator, seed)
            loss.backward()
    return scorer


def _own_loss(output, generators, seed) -> torch.Tensor:
    """A loss of the model's own making, of which the squared gradient is the Fisher information of its outputs: of logits
    [N, classes] the cross-entropy with labels drawn from their softmax, of anything else its product with standard noise."""
    outputs = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not outputs:
        raise ValueError("no output of the model depends on its layers in a differentiable way")
    device = outputs[0].device
    generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
    if len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1:
        logits = outputs[0].float()
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")
    noise = (torch.randn(t.shape, dtype=t.dtype, device=device, generator=generator) for t in outputs)
    return torch.stack([(t * n).sum() for t, n in zip(outputs, noise, strict=True)]).sum()
