"""The grammar of the random programs, steps that have layers of their own: `LAYERS`, a name -> a function that makes the module.

Like those of grammar.py, each takes a map [N, 8, 8, 8] and gives such a map again.
"""

import collections
import dataclasses
import functools

import torch
from grammar import CHANNELS, ROWS, SIZE, aten, halves_written, heads, scale, spatial, tokens, untokens, written_at
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize


class Two(nn.Module):
    """A function of the map and of what a second convolution makes of it, whose filters are others."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.layer, self.function = layer or nn.Conv2d(CHANNELS, CHANNELS, 1), function

    def forward(self, y):
        return self.function(y, self.layer(y))


class Of(nn.Module):
    """A function of the map and parameters of those shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function, self.tensors = function, nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, y):
        return self.function(y, *self.tensors)


class Distils(nn.Module):
    """In training mode two maps are compared."""

    def __init__(self):
        super().__init__()
        self.student = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, y):
        z = self.student(y)
        if self.training:
            self.loss = F.mse_loss(z, y)
        return y + z.mean(1, keepdim=True)


class Drops(nn.Module):
    def forward(self, y):
        if self.training:
            y = F.dropout(y, 0.1) + torch.native_dropout(y, 0.1, True)[0]
        return y


@dataclasses.dataclass
class Maps:
    first: torch.Tensor
    others: dict


class Boxed(nn.Module):
    """A module that gives its maps in a data class, a list and a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, y):
        return Maps(self.layer(y), collections.OrderedDict(rest=[y, {"tanh": y.tanh()}]))


class Unboxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.boxed = Boxed()

    def forward(self, y):
        maps = self.boxed(y)
        return maps.first + maps.others["rest"][0] + maps.others["rest"][1]["tanh"]


class Renormed(nn.Module):
    def forward(self, weight):
        return torch.renorm(weight, 2, 0, 0.5)


def parametrized(layer, parametrization):
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def conv(*options, **more):
    return functools.partial(nn.Conv2d, CHANNELS, CHANNELS, *options, **more)


class Deformed(nn.Module):
    """A deformable convolution, at offsets that the features say, or fixed ones."""

    def __init__(self, of_features):
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.offsets, self.layer = nn.Conv2d(8, 18, 3, padding=1) if of_features else None, DeformConv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(26 if of_features else 8, 8, 1)

    def forward(self, y):
        if self.offsets is None:
            return self.last(self.layer(y, y.new_zeros(len(y), 18, *y.shape[2:])))
        offsets = self.offsets(y)
        return self.last(torch.cat([self.layer(y, offsets), offsets], 1))


class Around(nn.Module):
    """A layer between two functions."""

    def __init__(self, before, layer, after):
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, y):
        return self.after(self.layer(self.before(y)))


# name -> a function that makes a module
LAYERS = {
    "convolution": conv(3, padding=1),
    "depthwise": conv(3, padding=1, groups=CHANNELS),
    "depthwise of one map": lambda: Around(lambda y: y.mean(1, keepdim=True).expand(y.shape), conv(1, groups=8)(), lambda y: y),
    "grouped": conv(3, padding=1, groups=2),
    "multiplied": lambda: nn.Sequential(nn.Conv2d(8, 16, 1, groups=8), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "transposed convolution": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "grouped, transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2),
    "narrow, transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 4, 1, groups=4), nn.Conv2d(4, 8, 1)),
    "1d": lambda: Around(lambda y: y.flatten(2), nn.Conv1d(8, 8, 1), lambda y: y.unflatten(2, (8, 8))),
    "3d": lambda: Around(lambda y: y.unsqueeze(2), nn.Conv3d(8, 8, 1), lambda y: y.squeeze(2)),
    "same layer twice": lambda: Around(lambda y: y, layer := conv(1)(), lambda y: layer(y)),
    "linear": lambda: Around(tokens, nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), untokens),
    "linear of a pool": lambda: Two(scale, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8, bias=False))),
    "linear in space": lambda: Around(lambda y: y.flatten(2), nn.Linear(64, 64), lambda t: t.unflatten(2, (8, 8))),
    "linear of all": lambda: Around(lambda y: y[:, :, ::2, ::2].flatten(1), nn.Linear(128, 128), lambda t: spatial(t.view(-1, 8, 4, 4))),
    "squeeze and excite": lambda: Two(
        scale, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    ),
    "mean of heads": lambda: Around(lambda y: heads(y).mean(2), nn.Conv2d(2, 8, 1), torch.relu),
    "pool of heads": lambda: Around(lambda y: F.adaptive_avg_pool2d(heads(y).flatten(3), 8), nn.Conv2d(2, 8, 1), torch.relu),
    "last of heads": lambda: Around(lambda y: heads(y)[:, :, -1], nn.Conv2d(2, 8, 1), torch.relu),
    "fourth of heads": lambda: Around(lambda y: heads(y)[:, :, torch.tensor([3])].flatten(1, 2), nn.Conv2d(2, 8, 1), torch.relu),
    "linear of heads": lambda: Around(lambda y: heads(y).movedim(2, -1).flatten(0, 3), nn.Linear(4, 4), lambda t: t.view(2, 2, 8, 8, -1).movedim(-1, 2).flatten(1, 2)),
    "heads of linear": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), conv(1)()),
    "attention layer": lambda: Around(tokens, nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), untokens),
    "recurrent": lambda: Around(tokens, nn.GRU(8, 8, batch_first=True), lambda t: untokens(t[0])),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "group norm layer": lambda: nn.GroupNorm(2, 8),
    "group norm of one": lambda: nn.GroupNorm(1, 8),
    "group norm of rows": lambda: Around(lambda y: y.transpose(1, 2), nn.GroupNorm(2, 8), lambda y: y.transpose(1, 2)),
    "instance norm layer": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "layer norm layer": lambda: Around(lambda y: y.permute(0, 2, 3, 1), nn.LayerNorm(8), lambda y: y.permute(0, 3, 1, 2)),
    "layer norm of places": lambda: nn.LayerNorm((8, 8)),
    "prelu": lambda: nn.PReLU(8),
    "weight norm": lambda: parametrizations.weight_norm(conv(1)()),
    "weight norm of depthwise": lambda: parametrizations.weight_norm(conv(3, padding=1, groups=CHANNELS)()),
    "weight norm by hand": lambda: Of(lambda y, v, g: F.conv2d(y, aten._weight_norm_interface(v, g)[0]), (8, 8, 1, 1), (8, 1, 1, 1)),
    "weight norm of inputs": lambda: parametrizations.weight_norm(conv(1)(), dim=1),
    "spectral norm": lambda: parametrizations.spectral_norm(conv(1)()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(8, 8, 1), orthogonal_map="householder"),
    "renorm of filters": lambda: parametrized(conv(1)(), Renormed()),
    "scaled by a parameter": lambda: Of(lambda y, w: y * w, (8, 1, 1)),
    "parameter reversed": lambda: Of(lambda y, w: y * w.flip(0), (8, 1, 1)),
    "pooled shift": lambda: Of(lambda y, w: F.batch_norm(y, w.detach() * 1, w.detach() * 1), 8),
    "shift and scale": lambda: Of(lambda y, w, b: F.group_norm(y, 2, w, b), 8, 8),
    "matrix": lambda: Of(lambda y, w: untokens(tokens(y) @ w), (8, 8)),
    "kernel of parameters": lambda: Of(lambda y, w, b: F.conv2d(y, w, b), (8, 8, 1, 1), 8),
    "kernel and constant bias": lambda: Of(lambda y, w: F.conv2d(y, w, torch.linspace(0, 1, 8, dtype=y.dtype)), (8, 8, 1, 1)),
    "layer norm of a constant": lambda: Of(lambda y, w: F.layer_norm(y.permute(0, 2, 3, 1), (8,), w).permute(0, 3, 1, 2), 8),
    "drops": Drops,
    "distils": Distils,
    "boxed": Unboxed,
    # two maps meet
    "added": lambda: Two(torch.add),
    "dense": lambda: Around(lambda y: torch.cat([y, y.tanh()], 1), nn.Conv2d(16, 8, 1), torch.relu),
    "padded layer": lambda: Around(lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)), nn.Conv2d(10, 8, 1), torch.relu),
    "joined with constants": lambda: Around(
        lambda y: torch.cat([y, torch.linspace(0, 1, SIZE, dtype=y.dtype).expand(len(y), 2, 8, 8)], 1), nn.Conv2d(10, 8, 1), torch.relu
    ),
    "repeated": lambda: Around(lambda y: y.repeat(1, 2, 1, 1), nn.Conv2d(16, 8, 1), torch.relu),
    "unshuffled": lambda: Around(lambda y: F.pixel_unshuffle(y, 2), nn.Conv2d(32, 8, 1), spatial),
    "super resolution": lambda: nn.Sequential(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)),
    "deformed": lambda: Deformed(False),
    "deformed by features": lambda: Deformed(True),
    "gated": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1)),
    "gather of two": lambda: Two(lambda y, z: y.gather(3, z.argsort(3))),
    "unpool of two": lambda: Two(lambda y, z: F.max_unpool2d(F.avg_pool2d(y, 2), F.max_pool2d(z, 2, return_indices=True)[1], 2)),
    "where of two": lambda: Two(lambda y, z: torch.where(z > 0, y, z)),
    "stack of two": lambda: Two(lambda y, z: torch.stack([y, z]).mean(0)),
    "joined in space": lambda: Two(lambda y, z: torch.cat([y, z], 2)[:, :, ::2]),
    "joined over examples": lambda: Two(lambda y, z: sum(torch.cat([y, z], 0).chunk(2, 0))),
    "written by a second": lambda: Two(lambda y, z: written_at(y.clone(), (ROWS,), z)),
    "rows of a second": lambda: Two(lambda y, z: halves_written(y, lambda _: z)),
    "losses of two": lambda: Two(lambda y, z: F.mse_loss(y, z, reduction="none")),
    "layer norm by features": lambda: Two(lambda y, z: z * F.layer_norm(y.mean(1), (8,), z.mean((0, 2, 3)))[:, None]),
    "group norm by another": lambda: Two(lambda y, z: z * F.group_norm(y.transpose(1, 2).mean(2, keepdim=True).expand(2, 8, 8, 8), 2, z.mean((0, 2, 3)))),
    "kernel of a second": lambda: Two(lambda y, z: z * F.conv2d(torch.ones(2, 16, 8, 8, dtype=y.dtype), z.mean((0, 3)).t()[..., None, None], groups=2).mean(1, keepdim=True)),
    "loss of two": lambda: Two(lambda y, z: y + F.mse_loss(y, z, reduction="none").mean(1, keepdim=True)),
    "number of two": lambda: Two(lambda y, z: y + F.mse_loss(y, z)),
    "places of two": lambda: Two(lambda y, z: untokens((tokens(y) @ z.flatten(2)).softmax(2) @ tokens(y))),
    "channels of two": lambda: Two(lambda y, z: ((z.flatten(2) @ tokens(y)).softmax(2) @ y.flatten(2)).view(y.shape)),
    "added to a product of two": lambda: Two(lambda y, z: untokens(torch.baddbmm(tokens(z), tokens(y) @ z.flatten(2), tokens(y)))),
    "batched over two": lambda: Two(lambda y, z: y + (y.flatten(0, 1) @ z.flatten(0, 1)).view(y.shape)),
    "halves of two": lambda: Two(lambda y, z: torch.cat([y.chunk(2, 1)[0], z.chunk(2, 1)[1]], 1)),
    "glu of two": lambda: Two(lambda y, z: F.glu(torch.cat([y, z], 1), 1)),
    "copied into": lambda: Two(lambda y, z: y.clone().copy_(z) + y),
    "lerp of two": lambda: Two(lambda y, z: torch.lerp(y, z, 0.5)),
    "kernels of features": lambda: Two(
        lambda y, z: F.conv2d(y.flatten(0, 1)[None], z.mean((2, 3)).view(-1, 1, 1, 1), groups=y.shape[0] * y.shape[1]).view(y.shape)
    ),
}  # fmt: skip
