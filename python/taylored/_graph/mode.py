"""Run a model's forward pass on stand-ins for its tensors, and carry labels along.

`LabelMode` is a dispatch mode: each ATen operator runs on the meta device (shapes, no data) or what takes its place
(shapes.py), and its rule says what became of the labels (rules.py). `run_pass` runs a model under one.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from taylored._errors import TraceError
from taylored._graph.labels import Labels, along_axis, tensors_of
from taylored._graph.moves import movement, opaque
from taylored._graph.numbers import Numbers
from taylored._graph.rules import noise, rule_of, uniform
from taylored._graph.shapes import BIAS_ONLY, SHAPES, is_elementwise, packets, sparing
from taylored._graph.values import Pass
from taylored._modules import CONSUMERS, holders, in_mode, tensors_in, untouched, user_line
from taylored._torch_compat import (
    TorchDispatchMode,
    around_calls,
    eager,
    flop_registry,
    operator_name,
    tree_map_only,
    writes,
)

# What a forward pass computes: shapes alone, on the meta device; all but convolutions and matrix products (a model that looks
# at its data); everything.
VALUES = ("none", "some", "all")
INSTEAD = {"none": SHAPES, "some": BIAS_ONLY, "all": {}}

# What takes channels by their places.
PLACES = frozenset(
    packets("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "index", "index_put", "index_put_")
    + packets("gather", "index_select", "select", "flip", "roll", "sort", "native_channel_shuffle", "channel_shuffle", "repeat")
    + packets("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "constant_pad_nd", "as_strided", "bmm", "baddbmm")
)

_running = contextvars.ContextVar("taylored_labels_running", default=False)


def labels_running() -> bool:
    """Whether this thread runs a forward pass for its labels; masks that are in force meanwhile step aside."""
    return _running.get()


class LabelMode(Labels, TorchDispatchMode):
    """Runs operators, carries labels along, and knows which module runs."""

    labelled = True  # whether there are labels to carry; shapes and FLOPs are found without

    def __init__(self, model: nn.Module, values: str = "none"):
        TorchDispatchMode.__init__(self)
        Labels.__init__(self)
        self.values = values  # which operators compute, see `VALUES`
        self.modules = {module: name for name, module in model.named_modules()}
        self.stack: list[tuple[nn.Module, tuple, int]] = []  # module, arguments, number of the call
        self.calls = itertools.count()
        self.meta: dict[int, torch.Tensor] = {}
        self.owned: set[int] = set()  # the model's own tensors, and those of them that an op has used
        self.seen: set[int] = set()
        self.numbers = Numbers()
        self.steps = 1  # for which what runs stands
        self.dynamic = False  # whether an op's shape depended on its data

    # -- modules -----------------------------------------------------------------------------------------------------

    def where(self) -> str:
        return self.modules.get(self.stack[-1][0], type(self.stack[-1][0]).__name__) if self.stack else "forward"

    def line(self) -> str:
        """'file.py:12': the line of the model's own code that runs, `NO_LINE` where that is torch's alone."""
        return user_line(outermost=run_pass.__code__)

    def enter_module(self, module, args):
        self.stack.append((module, args, next(self.calls)))
        if self._recurs(module, args) and (steps := args[0].shape[time := _time(module, args)]) > 1:
            self.steps = steps
            return (args[0].narrow(time, 0, 1), *args[1:])
        return args

    def leave_module(self, module, args, output):
        _, given, _ = self.stack.pop()
        if self._recurs(module, given) and isinstance(output, tuple):
            shape, time, self.steps = list(output[0].shape), _time(module, given), 1
            shape[time] = given[0].shape[time]
            return (output[0].expand(shape), *output[1:])
        return output

    def _recurs(self, module, args) -> bool:
        """Whether a layer that takes one step after another takes a single one instead: all cost and label the same."""
        return self.values == "none" and isinstance(module, nn.RNNBase) and bool(args) and isinstance(args[0], torch.Tensor)

    # -- operators ---------------------------------------------------------------------------------------------------

    def to_meta(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) in self.owned:
                self.seen.add(id(value))
            if value.is_meta:
                return value
            if id(value) not in self.meta:
                self.meta[id(value)] = torch.empty_like(value, device="meta")
                self.foreign.add(id(self.meta[id(value)]))
                self.places_matter |= value.numel() > 1
                self.hold(value)
            return self.meta[id(value)]
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return type(value)(self.to_meta(v) for v in value)
        return value

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return self.execute(func, args, kwargs or {})

    def execute(self, func, args, kwargs):
        """Run an operator, on the meta device or what takes its place, and carry the labels along."""
        given, given_kwargs = args, kwargs
        if self.values == "none":
            args = tuple(self.to_meta(a) for a in args)
            kwargs = {k: self.to_meta(v) for k, v in kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        else:
            self.seen |= self.owned.intersection(map(id, tensors_of(args, kwargs)))
        seen = self._with_alias(args) if torch.Tag.inplace_view in func.tags else args
        packet, table = func.overloadpacket, INSTEAD[self.values]
        instead = None if kwargs else table.get(packet)
        if instead is None and self.values == "some":
            instead = None if kwargs else table.get(operator_name(func))  # of a library that need not be there
            out = instead(*args) if instead else sparing(func, args, kwargs)
        else:
            out = (instead or func)(*args, **kwargs)
        if self.values != "all" and (found := self.numbers.of(func, given, given_kwargs, out, self.owned)):
            self.computed_with((self.where(), str(packet)), found, args, kwargs)
        self.dynamic |= torch.Tag.dynamic_output_shape in func.tags
        dimensions = self.carry(func, seen, kwargs, out) if self.labelled else None
        if packet in flop_registry:
            flops = self.steps * flop_registry[packet](*args, **kwargs, out_val=out)
            self.counted(flops, [d for d in dimensions or () if d is not None])
        return out

    def _with_alias(self, args):
        """The arguments of an operator that gives the first one another shape, as a rule must see them: with the old shape, and
        the labels that belong to it."""
        x, alias = args[0], args[0].detach()
        self.set(alias, self.get(x))
        self.set(x, ())
        self.share_uniform(alias, x)
        return (alias, *args[1:])

    def computed_with(self, place: tuple[str, str], numbers, args, kwargs) -> None:
        """An operator computed with numbers; place: module and operator."""
        self.numbers.noted.setdefault(place, []).append(numbers)

    def carry(self, func, args, kwargs, out):
        """Give what an operator has made its labels."""
        dimensions = None
        self.places_matter |= func.overloadpacket in PLACES
        if (rule := rule_of(func)) is not None:
            dimensions = rule(self, func, args, kwargs, out)
        else:
            name = operator_name(func)
            opaque(self, args, kwargs, out, f'{name} in {self.where()!r} has no rule: taylored.trace_rule("{name}") can add one')
        if writes(func) and rule is not movement and args and isinstance(args[0], torch.Tensor) and self.is_uniform(args[0]):
            others = tensors_of(args[1:], kwargs)
            alike = is_elementwise(func) and all(t.numel() == 1 or self.is_uniform(t) for t in others)
            self.set_uniform(args[0], not self.is_part(args[0]) and (rule in (uniform, noise) or alike))
        if self._lost:
            self.pass_on_losses(tensors_of(args, kwargs), out)
        return dimensions


def looks_at_data(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of asking a tensor of the meta device for what it holds."""
    while error is not None:
        if isinstance(error, (RuntimeError, NotImplementedError)) and "meta tensor" in str(error):
            return True
        error = error.__cause__
    return False


def _time(module, args) -> int:
    """The dimension of a recurrent layer's input along which it takes steps."""
    return args[0].ndim - 2 if module.batch_first else 0


def stand_in(mode: LabelMode, model: nn.Module, name: str, tensor: torch.Tensor, shape) -> torch.Tensor | None:
    """A tensor without the values of one of the model's, which has that shape instead; None where a run looks at them."""
    if mode.values == "none":
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    unseen = mode.values == "some" and tensor.ndim > 1 and isinstance(model.get_submodule(name.rpartition(".")[0]), CONSUMERS)
    return tensor.new_zeros([1] * len(shape)).expand(shape) if unseen else None


def stand_ins_of(mode: LabelMode, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For each of the model's tensors what stands in for it, whole: a blank, or a copy where a run looks at its values."""
    blanks = {name: stand_in(mode, model, name, tensor, tensor.shape) for name, tensor in tensors.items()}
    return {name: tensors[name].detach().clone() if blank is None else blank for name, blank in blanks.items()}


def label_all(mode: LabelMode, stand_ins: dict[str, torch.Tensor]) -> dict[tuple[str, int], int]:
    """Give every dimension labels of its own. Returns the first label of each."""
    offsets = {}
    for name, tensor in stand_ins.items():
        labels: list[torch.Tensor] = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                mine = mode.fresh(size)
                offsets[name, d] = int(mine[0])
                labels += along_axis(mine, tensor.ndim, d)
        mode.set(tensor, labels)
    return offsets


def run_pass(model: nn.Module, stand_ins: dict[str, torch.Tensor], mode: LabelMode, training: bool, args, kwargs) -> Pass:
    """One forward pass under a label mode, with other tensors in the place of the model's own; freezes its outputs."""
    mode.stack.clear()
    mode.training = training
    mode.owned = {id(t) for t in stand_ins.values()}
    mode.numbers = Numbers(computed=mode.values != "none")
    rng = contextlib.nullcontext() if mode.values == "none" else torch.random.fork_rng(devices=[])
    try:
        if mode.values == "none":
            known = mode.foreign.copy(), mode.places_matter
            args, kwargs = (tree_map_only(torch.Tensor, mode.to_meta, a) for a in (args, kwargs))
            mode.foreign, mode.places_matter = known  # the inputs are no constants of the model
        with untouched(model), in_mode(model, training), _following(mode), torch.no_grad(), rng, eager(), mode:
            # not tied by torch, which loses the tensors of a module with several names
            everywhere = {place: stand_ins[name] for place, name in holders(model).items()}
            output = torch.func.functional_call(model, everywhere, args, kwargs, tie_weights=False)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"{user_line(error.__traceback__)}: {type(error).__name__}: {error}") from error
    try:
        outputs = list(tensors_in(output))
    except TypeError as error:
        raise TraceError(f"the model's output: {error}; return tensors, or containers and objects that hold them") from error
    for tensor in outputs:
        mode.freeze_all(tensor, "the model's output")
    if mode.values == "none":
        args, kwargs = (tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), a) for a in (args, kwargs))
    numbers = {place: tuple(calls) for place, calls in mode.numbers.noted.items()}
    return Pass(training, mode.values, mode.dynamic, args, kwargs, [tuple(t.shape) for t in outputs], numbers)


@contextlib.contextmanager
def _following(mode: LabelMode) -> Iterator[None]:
    """Let the mode know which module runs, before the user's own hooks do."""
    token = _running.set(True)
    try:
        with around_calls(mode.modules, mode.enter_module, mode.leave_module):
            yield
    finally:
        _running.reset(token)
