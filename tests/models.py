"""Small nets that the tests share, one for each way in which channels hang together."""

import torch
from torch import nn
from torch.nn import functional as F


class Chain(nn.Module):
    """Convolutions with batch norm, one after the other; flatten to a linear layer. Smooth, for finite differences."""

    def __init__(self, classes=5):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.Linear(6 * 16, classes)

    def forward(self, x):
        x = self.norm(self.first(x)).tanh()
        return self.head(self.second(x).tanh().flatten(1))


class Residual(nn.Module):
    """Two blocks that add into one stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.branch, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        x = x + self.outer(self.inner(x).tanh())
        x = x + self.branch(x.sigmoid())
        return self.head(x.tanh().mean((2, 3)))


class Concatenation(nn.Module):
    """Branches joined along the channels, and joined once more with an earlier map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.norm, self.last, self.head = nn.BatchNorm2d(15), nn.Conv2d(15, 7, 3), nn.Linear(7, 5)

    def forward(self, x):
        x = self.stem(x).tanh()
        x = torch.cat([self.left(x), x, self.right(x)], 1)
        return self.head(self.last(self.norm(x).tanh()).sigmoid().mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck: expansion, depthwise convolution, squeeze-excitation, projection, residual sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.depthwise, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).tanh()
        y = self.norm(self.depthwise(self.expand(x).tanh())).tanh()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return self.head((x + self.project(y)).tanh().mean((2, 3)))


class Flatten(nn.Module):
    """A map flattened into hidden linear layers, as in VGG: several inputs of the linear layer per unit."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1))
        self.classifier = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 10), nn.Tanh(), nn.Linear(10, 5))

    def forward(self, x):
        return self.classifier(self.features(x))


class Twice(nn.Module):
    """One convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.shared(self.stem(x).tanh()).tanh()
        return self.head(F.avg_pool2d(self.shared(x).tanh(), 2).mean((2, 3)))


class Dealt(nn.Module):
    """Channels that are halved and shuffled, as in ShuffleNet: which half one comes to depends on how many there are."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        for block in self.blocks:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, block(right).tanh()], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class Aliases(nn.Module):
    """One module under several names, and one parameter in several modules."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(24, 5)
        self.second = self.third = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Tanh())
        self.last, self.other = nn.Conv2d(24, 24, 3, padding=1), self.second[1]
        self.last.weight = self.second[0].weight

    def forward(self, x):
        x = self.first(x)
        x = x + self.third(self.second(x))
        return self.head(self.other(self.last(x)).mean((2, 3)))


NETS = {net.__name__.lower(): net for net in (Chain, Residual, Concatenation, Depthwise, Flatten, Twice, Dealt, Aliases)}


def inputs(examples=2, seed=0, dtype=torch.float32):
    return torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(model, x=None):
    """In place: statistics and scales such as training leaves behind. x: a batch to take the statistics from, so that
    signals keep their size in a deep net and the examples stay apart in the output."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    flags = {m: m.training for m in model.modules()}
    with torch.no_grad():
        for module in model.modules():
            affine = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
            if affine and module.weight is not None:
                module.weight.uniform_(0.8, 1.2)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith(("gamma", "skipinit_gain")):
                parameter.uniform_(0.5, 1.5)
        if x is not None:
            model.eval()
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train().momentum = 1.0
            model(x)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm in norms:
            scale = norm.running_var.sqrt()
            norm.running_mean.add_(0.1 * scale * torch.randn_like(scale))
            norm.running_var.mul_(torch.rand_like(scale) + 0.75)
    for module, flag in flags.items():
        module.training = flag
    return model


def small(name="chain", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return randomised(NETS[name]()).to(dtype).eval()


def snapshot(model):
    """Everything about a model that an operation might change."""
    tensors = {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()}
    attributes = {
        name: {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str, tuple))}
        for name, m in model.named_modules()
    }
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    return tensors, attributes, hooks, {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}


def unchanged(before, model):
    after = snapshot(model)
    same = before[0].keys() == after[0].keys() and all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    return same and before[1:] == after[1:]
