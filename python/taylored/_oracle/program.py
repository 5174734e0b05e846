"""The model as a program: exported once, with a dynamic batch, its consumers' calls marked and its batch norms folded.

In: a model and the names of its consumers. Out: a `Program` of nodes, of which the oracle runs what lies downstream of a unit.
"""

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from taylored import _gate
from taylored._modules import as_arguments, two_examples
from taylored._torch_compat import symbol, tree_leaves, tree_map_only

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default)
# Others that consumers may be: run again whole, with the unit's channels zeroed.
OTHER_LAYERS = tuple(
    getattr(getattr(aten, name), overload)
    for name, overload in [
        ("conv1d", "padding"), ("conv2d", "padding"), ("conv3d", "padding"), ("conv_transpose1d", "default"),
        ("conv_transpose2d", "input"), ("conv_transpose3d", "input"), ("convolution", "default"),
    ]
)  # fmt: skip


class NotReplayable(Exception):
    """The model cannot be exported, or not so that its examples are told apart."""


@dataclasses.dataclass(frozen=True)
class Program:
    """nodes: in order, without inputs and output; inputs: those that are examples; calls: the nodes that apply a consumer -> its
    name; constants: weights and other fixed values by node; folded: weight and bias of the layers that have taken in the batch
    norms behind them; batch: the symbol for the number of examples; output_spec: how the outputs are nested."""

    nodes: list[Node]
    inputs: list[Node]
    output: Node
    output_spec: Any
    calls: dict[Node, str]
    constants: dict[Node, torch.Tensor]
    folded: dict[Node, tuple[torch.Tensor, torch.Tensor]]
    batch: object


def export(model, consumers: list[str], example_inputs) -> Program:
    """Raises NotReplayable for a model that torch.export does not take, or not so that its examples are told apart."""
    program = _export(model, consumers, example_inputs)
    graph, signature = program.graph, program.graph_signature
    calls = _calls(graph, consumers)
    tensors = {**program.state_dict, **program.constants}
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named |= signature.inputs_to_lifted_tensor_constants
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    constants = {n: tensors[named[n.name]].detach() for n in placeholders if n.name in named}
    folded = _fold_batch_norms(graph, constants)
    inputs = [n for n in placeholders if n.name not in named]
    output = next(n for n in graph.nodes if n.op == "output")
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n.users]
    batch = _batch_symbol(inputs, nodes)
    return Program(nodes, inputs, output, program.call_spec.out_spec, calls, constants, folded, batch)


def _export(model, consumers, example_inputs):
    """The model as a program in which the input of consumer number i is marked so. (Of which module an operator comes, torch
    does not say reliably where one has several names.)"""
    args, kwargs = as_arguments(example_inputs)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, i=i: (_gate.mark(args[0], i), *args[1:]))
        for i, name in enumerate(consumers)
    ]
    try:
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = two_examples(
                *tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            )  # a batch of one looks constant
            shapes = torch.export.ShapesCollection()
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.ndim:
                    shapes[tensor] = {0: torch.export.Dim.AUTO}
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            return program.run_decompositions({})
    except Exception as error:  # whatever the model's code runs into
        lines = str(error).strip().splitlines() or [""]
        raise NotReplayable(f"it cannot be exported ({type(error).__name__}: {lines[0]})") from error
    finally:
        for handle in handles:
            handle.remove()


def _calls(graph, consumers) -> dict[Node, str]:
    """The nodes that apply a consumer -> its name; takes the marks out of the graph."""
    calls: dict[Node, str] = {}
    for node in list(graph.nodes):
        if node.target is _gate.MARK:
            name, users = consumers[node.args[1]], list(node.users)
            if not all(user.target in LAYERS + OTHER_LAYERS and user.args[0] is node for user in users):
                what = ", ".join(str(user.target) for user in users)
                raise NotReplayable(f"{name!r} was exported as {what}, not as one layer")
            calls |= dict.fromkeys(users, name)
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return calls


def _batch_symbol(inputs, nodes):
    """The symbol that stands for the number of examples; every tensor must have it in front, or not at all."""
    symbols = {symbol(shape_of(n)[0]) for n in inputs if shape_of(n) and isinstance(shape_of(n)[0], torch.SymInt)}
    if len(symbols) != 1 or not next(iter(symbols)).is_Symbol:
        raise NotReplayable("its batch dimension is not dynamic")
    batch = next(iter(symbols))
    for node in nodes:
        if node.op != "call_function":
            raise NotReplayable(f"its graph has a {node.op} node")
        for value in tree_leaves(node.meta.get("val")):
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            if any(isinstance(size, torch.SymInt) and (d or symbol(size) != batch) for d, size in enumerate(shape)):
                raise NotReplayable(f"{node.name} has shape {shape}: examples are not along its first dimension")
    return batch


def _fold_batch_norms(graph, constants) -> dict[Node, tuple[torch.Tensor, torch.Tensor]]:
    """Batch norm in evaluation is a scale and a shift: give them to the convolution before it. Returns that one's new
    weight and bias, and takes the batch norm out of the graph."""
    folded = {}

    def values(node, otherwise, channels):
        return torch.full((channels,), otherwise, dtype=torch.float64) if node is None else constants[node].double()

    for norm in list(graph.nodes):
        if norm.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        layer, *arguments = norm.args[:5]
        if layer.target not in CONVOLUTIONS or len(layer.users) > 1 or layer.args[1] not in constants:
            continue
        channels = shape_of(layer)[1]
        if layer not in folded:  # several batch norms in a row fold into it one after the other
            old = values(layer.args[2] if len(layer.args) > 2 else None, 0.0, channels)
            folded[layer] = constants[layer.args[1]].double(), old.to(constants[layer.args[1]].device)
        weight, bias = folded[layer]
        scale, shift, mean, var = (values(*pair, channels).to(bias.device) for pair in zip(arguments, (1.0, 0.0, 0.0, 1.0)))
        scale = scale / torch.sqrt(var + norm.args[6])
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        folded[layer] = weight, (bias - mean) * scale + shift
        for part in list(norm.users):
            part.replace_all_uses_with(layer)
            graph.erase_node(part)
        graph.erase_node(norm)
    return {layer: tuple(t.to(constants[layer.args[1]].dtype) for t in pair) for layer, pair in folded.items()}


def shape_of(node) -> tuple:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
