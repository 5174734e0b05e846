"""One plain torch reference in float64 per operator."""

from torch.nn.functional import conv2d


def contribution(x, g):
    return (x.double() * g.double()).flatten(2).sum(2) if x.ndim > 2 else x.double() * g.double()


def channel_statistics(x):
    x = x.double().unsqueeze(-1).flatten(2)
    return x.sum(2), x.square().sum(2), (x == 0).sum(2)


def sparse_conv(x, weight, bias=None):
    return conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def clamp_difference(d, clean, rows, low, high):
    old = clean.double()[rows]
    return (old + d.double()).clamp(low, high) - old.clamp(low, high)


def compact(x, keep):
    for dimension, indices in keep.items():
        x = x.index_select(dimension, indices)
    return x


def accumulate(total, t, reduction, scale):
    s = scale * sum(one.double() for one in t)
    return total + {"abs": s.abs().sum(0), "batch": s.sum(0).abs(), "square": s.square().sum(0)}[reduction]
