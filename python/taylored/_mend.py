"""Let what is left of a layer's inputs say what the removed ones said: least squares at the cut.

For a consumer with weight W, inputs x of which x_K are kept and x_R removed, `E |W x + b - W' x_K - b'|^2` is least for

    W' = W_K + W_R M,   b' = b + W_R (E[x_R] - M E[x_K]),   M = C_RK (C_KK + r diag C_KK)^-1

with C the covariance of x. The ridge r is what fits examples best that the fit did not see. All taps of a kernel take the same M.
No parameter is added: what the bias would hold goes into the layer's bias or, without one, into the running mean of the batch
norm that alone follows; where there is neither, means are not subtracted from the moments.
"""

import dataclasses

import torch

from taylored._graph.follow import following_norms
from taylored._graph.values import ChannelGraph, complement
from taylored._modules import holders
from taylored._moments import InputMoments, Moments, best_ridge, ridge_of
from taylored._plan import PrunePlan
from taylored._residual import input_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Mending:
    """How one layer is mended. weight: its name; axis: the weight's dimension of inputs; places: [C, m], which of its indices are
    mixed as one; kept, removed: rows of places; mix: M, [removed, kept]; offset: E[x_R] - M E[x_K], [removed]; constant: the name
    of the bias, or of the running mean (from which it is subtracted), that takes W_R offset; None: nothing does. ridge: r;
    residual: the held-out error of the outputs as a share of that of the cut without mending, NaN where nothing was held out."""

    weight: str
    axis: int
    places: torch.Tensor
    kept: torch.Tensor
    removed: torch.Tensor
    mix: torch.Tensor
    offset: torch.Tensor
    constant: str | None
    subtracted: bool
    ridge: float
    residual: float

    def of(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mended tensors, uncut, of a model or an average of it that has these."""
        weight = tensors[self.weight].detach()
        inputs = weight.double().movedim(self.axis, 0).flatten(1)  # [inputs, outputs x taps]
        mixed = inputs.clone()
        for m in range(self.places.shape[1]):
            kept, removed = self.places[self.kept, m], self.places[self.removed, m]
            mixed[kept] += self.mix.T @ inputs[removed]
        found = {self.weight: mixed.reshape(weight.movedim(self.axis, 0).shape).movedim(0, self.axis).to(weight.dtype)}
        if self.constant in tensors:  # an average of the parameters alone has no running means
            gone = inputs[self.places[self.removed]].sum(1).reshape(len(self.removed), *weight.movedim(self.axis, 0).shape[1:])
            change = torch.einsum("ro,r->o", gone.flatten(2).sum(2) if gone.ndim > 2 else gone, self.offset)
            constant = tensors[self.constant].detach()
            found[self.constant] = (constant.double() + (-change if self.subtracted else change)).to(constant.dtype)
        return found


def mendings(graph: ChannelGraph, plan: PrunePlan, measured: InputMoments, frozen: bool = False) -> dict[str, Mending]:
    """Layer -> how it is mended when the plan is applied: every measured layer that loses inputs. frozen: also those whose
    weights take no gradient."""
    model, name_at, collected = measured.model, holders(measured.model), measured.collected()
    modules: dict[str, list[str]] = {}  # a weight that several layers share is mended once, for all that they take in
    for name in collected:
        modules.setdefault(name_at[f"{name}.weight"], []).append(name)
    tensors = dict(model.named_parameters())
    found = {}
    norms: dict[str, str] | None = None
    for weight, names in modules.items():
        axis = int(not getattr(model.get_submodule(names[0]), "transposed", False))
        if (weight, axis) not in plan.keep or not (frozen or tensors[weight].requires_grad):
            continue
        if norms is None:
            norms = following_norms(model, graph, set(collected))
        constant, subtracted, moments = name_at.get(f"{names[0]}.bias"), False, collected[names[0]]
        if constant is None:
            constant = norms.get(names[0])
            subtracted = constant is not None
        elif not (frozen or tensors[constant].requires_grad):
            constant = None
        if len(names) > 1:
            constant, subtracted = None, False  # each layer has one of its own
            moments = Moments(len(moments.pivot), moments.pivot.device)
            for name in names:
                moments += collected[name]
        found[names[0]] = _mending(
            model.get_submodule(names[0]), weight, axis, measured.places[names[0]], plan, moments, constant, subtracted
        )
    measured.residuals = {layer: mending.residual for layer, mending in found.items()}
    if measured.parallel is not None:  # what one process has solved, so that all have the same bits
        for mending in found.values():
            for x in (mending.mix, mending.offset):
                shared = x.to(next(model.parameters()).device)
                torch.distributed.broadcast(shared, 0, group=measured.parallel.process_group)
                x.copy_(shared)
    return found


def _mending(module, weight, axis, places, plan, moments: Moments, constant, subtracted) -> Mending:
    stays = torch.zeros(plan.shapes[weight][axis], dtype=torch.bool)
    stays[plan.keep[weight, axis]] = True
    kept = stays[places[:, 0]].nonzero().flatten()
    removed = complement(kept, len(places))
    centred = constant is not None
    device = moments.sums.device
    gone = input_weights(module, places)[:, removed].permute(0, 2, 3, 1).flatten(0, 2).to(device)  # [outputs x places x taps, R]
    gram = gone.T @ gone

    def of(covariance, share):
        """M, fitted on a covariance."""
        return torch.linalg.solve(ridge_of(covariance, share)[kept][:, kept], covariance[kept][:, removed]).T

    def error(test, mix):
        """Mean square error of the outputs: tr(W_R E W_R'), with E that of x_R - M x_K."""
        crossed = mix @ test[kept][:, removed]
        left = test[removed][:, removed] - crossed - crossed.T + mix @ test[kept][:, kept] @ mix.T
        return float((gram * left).sum())

    halves = list(moments.halves(centred))
    share, held_out = best_ridge(moments, lambda share: sum(error(test, of(fit, share)) for fit, test in halves))
    before = sum(float((gram * test[removed][:, removed]).sum()) for _, test in halves)
    mean, covariance = moments.over(centred=centred)
    mix = of(covariance, share)
    offset = mean[removed] - mix @ mean[kept]
    residual = held_out / before if before > 0 else float("nan")
    return Mending(weight, axis, places, kept, removed, mix.cpu(), offset.cpu(), constant, subtracted, share, residual)
