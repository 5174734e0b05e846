"""Whose is a row? Where a model stacks images or frames along the batch, a layer sees several rows of each example.

The examples' own numbers ride along with the first dimension of the inputs, and every consumer says which it got. Rows come
either example by example (frames folded into the batch) or batch by batch (two images stacked).
"""

import torch

from taylored._errors import TraceError
from taylored._graph.labels import tensors_of
from taylored._graph.mode import LabelMode, run_pass
from taylored._graph.values import Pass
from taylored._modules import count_examples
from taylored._torch_compat import tree_leaves, tree_map_only

EXAMPLES = 3  # enough to tell the orders apart
ORDERS = ("by example", "by batch", "unknown")


class RowMode(LabelMode):
    """Labels are examples; that they meet means nothing."""

    def __init__(self, model, inputs):
        super().__init__(model)
        self.inputs = {id(t) for t in inputs}
        self.found: dict[str, torch.Tensor | None] = {}  # consumer -> the example of each row of its input

    def fresh(self, size):
        return torch.full((size,), -1)

    def unite(self, a, b): ...

    def freeze(self, label, reason): ...

    def to_meta(self, value):
        found = super().to_meta(value)
        if isinstance(value, torch.Tensor) and id(value) in self.inputs and not self.get(found):
            self.emit(found, 0, torch.arange(len(found)))
        return found

    def execute(self, func, args, kwargs):
        out = super().execute(func, args, kwargs)
        for x in tensors_of(args, kwargs):
            rows = [label for label in self.get(x) if label.shape[0] > 1]
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if rows and isinstance(t, torch.Tensor) and t.ndim and len(t) == len(x) and not self.get(t):
                    self.emit(t, 0, rows[0].reshape(len(x), -1)[:, 0])
        return out

    def applied(self, convolves, filters, outputs, contracted, unlabelled):
        args = self.stack[-1][1] if self.stack else ()
        if args and isinstance(args[0], torch.Tensor) and args[0].ndim:
            self.found.setdefault(self.where(), self.channels(args[0], 0))


def row_orders(model, stand_ins, traced: Pass, consumers: list[str]) -> dict[str, tuple[int, str]]:
    """Consumer -> (rows of each example, in which of ORDERS)."""
    args, kwargs = traced.args, traced.kwargs
    examples = count_examples((args, kwargs))

    def three(t):
        return t.new_empty((EXAMPLES, *t.shape[1:])) if t.ndim and len(t) == examples else t

    args, kwargs = (tree_map_only(torch.Tensor, three, a) for a in (args, kwargs))
    mode = RowMode(
        model, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim and len(t) == EXAMPLES]
    )
    try:
        run_pass(model, stand_ins, mode, traced.training, args, kwargs)
    except TraceError:
        return dict.fromkeys(consumers, (0, ORDERS[2]))
    return {name: _order(mode.found.get(name)) for name in consumers}


def _order(rows: torch.Tensor | None) -> tuple[int, str]:
    if rows is None or len(rows) % EXAMPLES:
        return 0, ORDERS[2]
    times, number = len(rows) // EXAMPLES, torch.arange(EXAMPLES)
    for order, expected in zip(ORDERS, (number.repeat_interleave(times), number.repeat(times))):
        if torch.equal(rows, expected):
            return times, order
    return times, ORDERS[2]
