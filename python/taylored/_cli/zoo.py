"""Build a classifier by name, give it weights, and fit its last layer to a number of classes.

Names are torchvision's, `timm:NAME`, `small_vgg`, or `file.py:function`. Weights are `none`, `DEFAULT` (downloaded), or
a file, whose tensors are matched by name or, where no name agrees, by order and shape.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taylored._cli.data import IMAGENET
from taylored._modules import in_mode

COUNTER = "num_batches_tracked"  # batch norm's: some files have it, some do not, and nothing depends on it


class ModelError(ValueError):
    """A model or its weights cannot be had as asked."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier and how it wants its images. new_head: the name of the last layer if it was replaced, else None."""

    model: nn.Module
    new_head: str | None
    channels: int
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: tuple[str, ...]  # what was done on the way that the user should know


def build(name: str, weights: str, num_classes: int | None, *, channels: int = 3, image_size: int | None = None) -> Network:
    """The model called `name` with `weights` and an output of `num_classes`. 0: as many classes as it or its weights come with.
    None: as it comes, whatever its outputs; for weights 'none' or 'DEFAULT'.

    channels: of the images, for a model that lets one choose; image_size: for finding the last layer by a forward pass,
    the model's own by default. Raises ModelError naming the option that cannot be met."""
    if weights not in ("none", "DEFAULT") and not Path(weights).is_file():
        raise ModelError(f"--weights {weights}: no such file; expected 'none', 'DEFAULT', or a .safetensors, .pth or .pt file")
    pretrained = weights == "DEFAULT"
    config: dict = {}
    if name == "small_vgg":
        model = small_vgg(num_classes or 10, channels)
    elif ".py:" in name:
        model = _from_file(name, num_classes)
    elif name.startswith("timm:"):
        model, config = _from_timm(name.removeprefix("timm:"), pretrained)
    else:
        model, config = _from_torchvision(name, pretrained)
    if pretrained and not config:
        raise ModelError(f"--weights DEFAULT: {name} has no default weights; expected 'none' or a file")
    channels = _input_channels(name, model)
    image_size = image_size or config.get("image_size", 224)
    if num_classes is None:
        return Network(model, None, channels, image_size, config.get("mean"), config.get("std"), ())
    head = find_head(model, torch.zeros(1, channels, image_size, image_size))
    notes = [load_weights(model, head, weights)] if weights not in ("none", "DEFAULT") else []
    _drop_auxiliary(model)
    new_head = None
    if num_classes and _outputs(model.get_submodule(head)) != num_classes:
        notes.append(f"replaced the last layer, {head}: {_outputs(model.get_submodule(head))} -> {num_classes} classes")
        replace_head(model, head, num_classes)
        new_head = head
    told = tuple(note for note in notes if note)
    return Network(model, new_head, channels, image_size, config.get("mean"), config.get("std"), told)


def small_vgg(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A VGG for small images: 3 stages of 2 convolutions (32, 64, 128 filters) with batch norm, then a linear layer.

    0.29 M parameters; on 8x8 images the linear layer sees every one of the last 2x2 positions, as VGG16's sees 7x7."""
    layers: dict[str, nn.Module] = {}
    for stage, width in enumerate((32, 64, 128), start=1):
        for number in (1, 2):
            layers[f"conv{stage}_{number}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            layers[f"norm{stage}_{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{stage}_{number}"] = nn.ReLU(inplace=True)
            in_channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2) if stage < 3 else nn.AdaptiveAvgPool2d(2)
    layers |= {"flatten": nn.Flatten(), "dropout": nn.Dropout(0.2), "classifier": nn.Linear(in_channels * 4, num_classes)}
    return nn.Sequential(OrderedDict(layers))


def find_head(model: nn.Module, example: torch.Tensor) -> str:
    """The name of the layer that makes the class outputs: the last linear layer or convolution that runs."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        with in_mode(model, training=False), torch.no_grad():
            output = model(example)
    except Exception as error:  # whatever its forward raises
        raise ModelError(f"--model: it cannot run on an image of shape {tuple(example.shape[1:])}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(f"--model: its output is {what}; expected a tensor of shape [images, classes]")
    if not ran or _outputs(model.get_submodule(ran[-1])) != output.shape[1]:
        raise ModelError(f"--model: no linear layer or convolution makes its {output.shape[1]} outputs")
    return ran[-1]


def replace_head(model: nn.Module, name: str, num_classes: int) -> None:
    """Put a new layer of the same kind, with `num_classes` outputs and fresh weights, in place of the one called `name`."""
    old: Any = model.get_submodule(name)
    is_convolution, bias = isinstance(old, nn.Conv2d), old.bias is not None
    if is_convolution:
        new: nn.Module = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, bias=bias)
    else:
        new = nn.Linear(old.in_features, num_classes, bias=bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def load_weights(model: nn.Module, head: str, path: str) -> str | None:
    """Copy a file's tensors into the model; returns a note if they had to be matched by order.

    A last layer (`head`) with another number of classes is given the file's. Everything else must agree."""
    state = read_weights(path)
    target = {name: t for name, t in model.state_dict().items() if not name.endswith(COUNTER)}
    counters = {name: t for name, t in state.items() if name.endswith(COUNTER)}
    state = {name: t for name, t in state.items() if not name.endswith(COUNTER)}
    note = None
    if not state.keys() & target.keys():
        state = _by_order(state, target, path)
        counters = {}
        note = f"{path} names its tensors differently: matched {len(state)} tensors by order, kind and shape"
    missing, foreign = [n for n in target if n not in state], [n for n in state if n not in target]
    if missing or foreign:
        raise ModelError(
            f"--weights {path} does not fit the model: {_some('it lacks', missing)}{_some('the model lacks', foreign)}"[:-2]
        )
    classes = len(state[f"{head}.weight"])
    if classes != len(target[f"{head}.weight"]):
        replace_head(model, head, classes)
        target = model.state_dict()
    for name, tensor in state.items():
        if tensor.shape != target[name].shape:
            raise ModelError(
                f"--weights {path} does not fit the model: {name} has shape {tuple(tensor.shape)}, "
                f"the model's has {tuple(target[name].shape)}"
            )
    model.load_state_dict(state | {n: t for n, t in counters.items() if n in model.state_dict()}, strict=False)
    return note


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth or .pt file loaded with weights_only=True, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    expected = "expected a state dict in a .safetensors, .pth or .pt file"
    state: Any
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(f"--weights {path} cannot be read ({str(error).splitlines()[0]}); {expected}") from error
    for key in ("state_dict", "model"):  # where training scripts wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ModelError(f"--weights {path} holds no tensors by name; {expected}")
    if any(name.startswith("plan:") for name in state):
        raise ModelError(f"--weights {path} is an already pruned model; open it with taylored.load")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _by_order(state, target, path):
    """Files of other implementations: the same tensors under other names. Kinds (weight, bias, ...) must agree too."""
    if len(state) != len(target):
        raise ModelError(
            f"--weights {path} does not fit the model: no name agrees, and it has {len(state)} tensors, not {len(target)}"
        )
    for (theirs, a), (ours, b) in zip(state.items(), target.items(), strict=True):
        # The last layer may have another number of classes: only its first dimension, and only at the very end.
        same = a.shape == b.shape or (ours in list(target)[-2:] and a.shape[1:] == b.shape[1:])
        if not same or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ModelError(
                f"--weights {path} does not fit the model: no name agrees, and in order {theirs} {tuple(a.shape)} "
                f"stands where the model has {ours} {tuple(b.shape)}"
            )
    return dict(zip(target, state.values(), strict=True))


def _from_torchvision(name, pretrained):
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ModelError(f"--model {name} needs torchvision: pip install 'taylored[cli]'") from error
    known = models.list_models(module=models)
    if name not in known:
        hint = f"; did you mean {', '.join(close)}?" if (close := difflib.get_close_matches(name, known)) else ""
        raise ModelError(f"--model {name} is unknown{hint} Expected a torchvision name, timm:NAME, small_vgg or file.py:function")
    weights = models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    model = _download(name, lambda: models.get_model(name, weights=weights)) if pretrained else models.get_model(name)
    return model, {"image_size": transform.crop_size[0], "mean": tuple(transform.mean), "std": tuple(transform.std)}


def _from_timm(name, pretrained):
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModelError(f"--model timm:{name} needs timm: pip install 'taylored[cli]'") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models())
        raise ModelError(f"--model timm:{name} is unknown to timm{'; did you mean timm:' + close[0] + '?' if close else ''}")
    model = _download(name, lambda: timm.create_model(name, pretrained=True)) if pretrained else timm.create_model(name)
    config = model.pretrained_cfg
    mean, std = config.get("mean") or IMAGENET[0], config.get("std") or IMAGENET[1]
    return model, {"image_size": (config.get("input_size") or (3, 224, 224))[-1], "mean": tuple(mean), "std": tuple(std)}


def _from_file(name, num_classes):
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ModelError(f"--model {name}: there is no file {path}")
    with _neighbours_importable(Path(path)):
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file raises
            raise ModelError(f"--model {name}: running {path} raised {type(error).__name__}: {error}") from error
        make = getattr(module, function, None)
        if not callable(make):
            raise ModelError(f"--model {name}: {path} has no function {function!r}")
        parameters = inspect.signature(make).parameters.values()
        takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
        try:
            model = make(num_classes=num_classes) if takes and num_classes else make()
        except Exception as error:
            raise ModelError(f"--model {name}: {function} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {name}: {function} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


@contextlib.contextmanager
def _neighbours_importable(file: Path):
    """Within the context a file may import what lies beside it, as for `python file.py`."""
    before = list(sys.path)
    sys.path.insert(0, str(file.absolute().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _download(name, create):
    """Build with downloaded weights; the libraries' errors for failing at it have no type in common."""
    try:
        return create()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"--weights DEFAULT: {name} could not be had ({reason}); give a file, or 'none'") from error


def _drop_auxiliary(model):
    """googlenet and inception_v3 have further outputs in training: the loss here is of the main one."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)


def _input_channels(name, model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ModelError(f"--model {name} has no convolution: there are no channels to prune")


def _outputs(layer) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _some(verb, names):
    return f"{verb} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}; " if names else ""
