"""Random small CNNs, drawn by hypothesis: a list of steps, each of which makes a new map out of earlier ones."""

import torch
from hypothesis import strategies as st
from models import randomised
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = [torch.tanh, torch.sigmoid, F.silu, F.softplus, F.relu]


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * self.excite(torch.tanh(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class LastLinear(nn.Module):
    """A linear layer over the channels, which stand last in between."""

    def __init__(self, channels, out):
        super().__init__()
        self.linear = nn.Linear(channels, out)

    def forward(self, x):
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LastNorm(nn.Module):
    """Layer norm over the channels, as in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shuffled(groups):
    def shuffle(x):
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return shuffle


def folded(x):
    """Channels and positions change places and come back."""
    n, c, h, w = x.shape
    return torch.tanh(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


class Net(nn.Module):
    """steps: (what to do, numbers of the maps it takes); `do` is a module, a function or a pair of them. head: "mean" or
    "flatten" of the last map, then a linear layer, or the last map as it is."""

    def __init__(self, steps, shape, head):
        super().__init__()
        self.modules_ = nn.ModuleList(do for do, _ in steps if isinstance(do, nn.Module))  # one used twice has two names
        self.steps, self.head = steps, head
        if head != "map":
            self.linear = nn.Linear(shape[0] if head == "mean" else shape[0] * shape[1] ** 2, 5)

    def forward(self, x):
        maps = [x]
        for do, sources in self.steps:
            made = do(*(maps[s] for s in sources))
            maps += made if isinstance(made, (tuple, list)) else [made]
        x = maps[-1]
        if self.head == "map":
            return x
        return self.linear(x.mean((2, 3)) if self.head == "mean" else x.flatten(1))

    def __repr__(self):
        steps = "\n".join(
            f"  {do if isinstance(do, nn.Module) else getattr(do, '__qualname__', do)} of {s}" for do, s in self.steps
        )
        return f"Net(\n{steps}\n  {self.head})"


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


class _Draw:
    """shapes: (channels, side) of every map so far."""

    def __init__(self, draw):
        self.draw, self.steps, self.shapes, self.layers = draw, [], [(3, 8)], []

    def pick(self, options):
        return self.draw(st.sampled_from(options))

    def source(self):
        """Mostly the latest map."""
        return self.pick([len(self.shapes) - 1] * 4 + list(range(len(self.shapes))))

    def add(self, do, sources, *shapes):
        self.steps.append((do, sources))
        self.shapes += shapes

    def width(self):
        return self.pick([2, 4, 6, 8, 12])

    def convolution(self):
        s = self.source()
        (c, side), out = self.shapes[s], self.width()
        kernel, stride = self.pick([1, 3]), self.pick([1, 1, 2]) if side > 4 else 1
        layer = nn.Conv2d(c, out, kernel, stride, kernel // 2, bias=self.pick([True, False]))
        self.layers.append((layer, c, out))
        self.add(layer, [s], (out, (side + stride - 1) // stride))

    def shared(self):
        """A layer of stride 1 once more, or another one with its weight, on a map that fits it."""
        fits = [
            (layer, out, i)
            for layer, c, out in self.layers
            for i, shape in enumerate(self.shapes)
            if layer.stride == (1, 1) and shape[0] == c
        ]
        if fits:
            layer, out, s = self.pick(fits)
            if self.pick([True, False]):
                other = nn.Conv2d(layer.in_channels, out, layer.kernel_size, padding=layer.padding)
                other.weight, layer = layer.weight, other
            self.add(layer, [s], (out, self.shapes[s][1]))

    def grouped(self):
        s = self.source()
        c, side = self.shapes[s]
        groups = self.pick(divisors(c))
        self.add(nn.Conv2d(c, groups * self.pick([1, 2, 3]), 3, padding=1, groups=groups), [s], None)
        self.shapes[-1] = (self.steps[-1][0].out_channels, side)

    def transposed(self):
        s = self.source()
        c, side = self.shapes[s]
        if side <= 8:
            groups = self.pick([1, 1, *divisors(c)])
            out = groups * self.pick([1, 2, 3])
            self.add(nn.ConvTranspose2d(c, out, 2, 2, groups=groups), [s], (out, 2 * side))

    def norm(self):
        s = self.source()
        c, side = self.shapes[s]
        kinds = [nn.BatchNorm2d(c), nn.GroupNorm(self.pick(divisors(c)), c), LastNorm(c), nn.LayerNorm([c, side, side])]
        if side > 1:
            kinds += [nn.InstanceNorm2d(c, affine=True), nn.InstanceNorm2d(c, affine=True, track_running_stats=True)]
        self.add(self.pick([nn.BatchNorm2d(c), *kinds]), [s], (c, side))

    def activation(self):
        s = self.source()
        self.add(self.pick(ACTIVATIONS), [s], self.shapes[s])

    def join(self):
        """Sum, product or concatenation with a map of the same size."""
        s = self.source()
        c, side = self.shapes[s]
        same = [i for i, shape in enumerate(self.shapes) if shape == (c, side)]
        alike = [i for i, shape in enumerate(self.shapes) if shape[1] == side]
        other = self.pick(same)
        kind = self.pick(["add", "mul", "cat", "cat", "scale"])
        if kind == "cat":
            other = self.pick(alike)
            self.add(lambda *maps: torch.cat(maps, 1), [s, other], (c + self.shapes[other][0], side))
        elif kind == "scale":
            self.add(lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid(), [s, other], (c, side))
        else:
            self.add(torch.add if kind == "add" else torch.mul, [s, other], (c, side))

    def split(self):
        s = self.source()
        c, side = self.shapes[s]
        kind = self.pick(["chunk", "split", "slice", "step"])
        pieces = self.pick([d for d in divisors(c) if d <= 4])
        if kind == "chunk":
            self.add(lambda x: x.chunk(pieces, 1), [s], *[(c // pieces, side)] * pieces)
        elif kind == "split" and c > 1:
            first = self.draw(st.integers(1, c - 1))
            self.add(lambda x: x.split([first, c - first], 1), [s], (first, side), (c - first, side))
        elif kind == "slice":
            self.add(lambda x: x[:, c // 3 :], [s], (c - c // 3, side))
        else:
            self.add(lambda x: x[:, ::2], [s], ((c + 1) // 2, side))

    def move(self):
        s = self.source()
        c, side = self.shapes[s]
        kind = self.pick(["shuffle", "fold", "pad", "pad channels", "unshuffle", "pixel shuffle", "flip"])
        if kind == "shuffle":
            self.add(shuffled(self.pick([d for d in divisors(c) if d < c or d == 1])), [s], (c, side))  # d is hard-coded
        elif kind == "fold":
            self.add(folded, [s], (c, side))
        elif kind == "pad":
            mode = self.pick(["constant", "reflect", "replicate"]) if side > 1 else "constant"
            self.add(lambda x: F.pad(x, (1, 1, 1, 1), mode), [s], (c, side + 2))
        elif kind == "pad channels":
            before, after = self.pick([0, 1, 2]), self.pick([0, 1, 2])
            self.add(lambda x: F.pad(x, (0, 0, 0, 0, before, after)), [s], (c + before + after, side))
        elif kind == "unshuffle" and side % 2 == 0:
            self.add(lambda x: F.pixel_unshuffle(x, 2), [s], (4 * c, side // 2))
        elif kind == "pixel shuffle" and c % 4 == 0:
            self.add(lambda x: F.pixel_shuffle(x, 2), [s], (c // 4, 2 * side))
        elif kind == "flip":
            self.add(lambda x: x.flip(3), [s], (c, side))

    def resize(self):
        s = self.source()
        c, side = self.shapes[s]
        kind = self.pick(["max", "average", "adaptive", "nearest", "bilinear"])
        if kind in ("nearest", "bilinear") and side <= 6:
            self.add(lambda x: F.interpolate(x, scale_factor=2, mode=kind), [s], (c, 2 * side))
        elif kind == "adaptive":
            self.add(lambda x: F.adaptive_avg_pool2d(x, 2), [s], (c, 2))
        elif side >= 4:
            pool = F.max_pool2d if kind == "max" else F.avg_pool2d
            self.add(lambda x: pool(x, 2), [s], (c, side // 2))

    def excitation(self):
        s = self.source()
        c, side = self.shapes[s]
        self.add(SqueezeExcitation(c, self.pick([2, 4])), [s], (c, side))

    def last(self):
        s = self.source()
        out = self.width()
        self.add(LastLinear(self.shapes[s][0], out), [s], (out, self.shapes[s][1]))


@st.composite
def random_trunks(draw):
    """As `random_nets`: a trunk whose channels are dealt out by splits and shuffles, over and over. Each block takes the trunk
    apart, puts some pieces through layers of their own, joins all, in any order, and shuffles."""
    d = _Draw(draw)
    d.convolution()
    pieces = d.pick([2, 2, 2, 3, 4])
    part = d.pick([3, 4, 5, 6, 8])
    width = pieces * part
    d.add(nn.Conv2d(d.shapes[-1][0], width, 1), [len(d.shapes) - 1], (width, side := d.shapes[-1][1]))
    for _ in range(d.pick([1, 2, 3])):
        trunk = len(d.shapes) - 1
        d.add(lambda x: x.chunk(pieces, 1), [trunk], *[(part, side)] * pieces)
        parts = list(range(trunk + 1, trunk + 1 + pieces))
        for i in draw(st.lists(st.sampled_from(range(pieces)), min_size=1, max_size=pieces, unique=True)):
            layers = [nn.Conv2d(part, hidden := d.width(), 1), nn.Tanh(), nn.Conv2d(hidden, part, 1)]
            if d.pick([True, False]):
                layers += [nn.Conv2d(part, part, 3, padding=1, groups=part), nn.BatchNorm2d(part)]
            if d.pick([True, False, False]):
                layers = [nn.Conv2d(part, part, 3, padding=1, groups=part), *layers]
            d.add(nn.Sequential(*layers), [parts[i]], (part, side))
            parts[i] = len(d.shapes) - 1
        parts = list(draw(st.permutations(parts)))
        d.add(lambda *maps: torch.cat(maps, 1), parts, (width, side))
        if groups := d.pick([0, pieces, pieces, width // part if part % 2 else 2]):
            if width % groups == 0:
                d.add(d.pick([shuffled(groups), nn.ChannelShuffle(groups)]), [len(d.shapes) - 1], (width, side))
    d.convolution()
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = Net(d.steps, d.shapes[-1], d.pick(["mean", "map"]))
    return randomised(net).double().eval()


@st.composite
def random_nets(draw):
    """A net in float64, in eval mode, with weights and statistics of a drawn seed, for inputs [N, 3, 8, 8]."""
    d = _Draw(draw)
    d.convolution()
    kinds = [d.convolution] * 4 + [d.norm] * 2 + [d.activation] * 3 + [d.join] * 2
    kinds += [d.shared, d.grouped, d.transposed, d.split, d.move, d.resize, d.excitation, d.last]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=12)):
        if d.shapes[-1][0] <= 64:
            kind()
    d.convolution()
    head = d.pick(["mean", "mean", "flatten", "map"])
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = Net(d.steps, d.shapes[-1], head)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5) if parameter.ndim > 1 else nn.init.normal_(parameter, 1, 0.1)
    return randomised(net).double().eval()
