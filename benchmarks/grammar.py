"""The grammar of the random programs (programs.py): what forward passes do to a map between two convolutions, as functions.

Each takes a map [N, 8, 8, 8] and gives such a map again, rightly or in a way that does not survive a cut: `FIRST` are those with
which it began, `MORE` reach what they do not, and grammar_layers.py has steps with layers of their own.
"""

import functools
import math

import torch
from torch.nn import functional as F

aten = torch.ops.aten
CHANNELS, SIZE = 8, 8


def spatial(y):
    """The map as it was, where a step made it smaller."""
    return y if y.shape[2:] == (SIZE, SIZE) else F.interpolate(y, size=(SIZE, SIZE))


def written(y, write):
    w = torch.ones(1, y.shape[1], 1, 1, dtype=y.dtype)
    write(w)
    return y * w


def buffer(y):
    out = torch.zeros(len(y), y.shape[1], SIZE + 2, SIZE + 2, dtype=y.dtype)
    out[:, :, 1:-1, 1:-1] = y
    return out


def shuffled(y, groups):
    return y.view(len(y), groups, -1, SIZE, SIZE).transpose(1, 2).reshape(y.shape)


def stacked(y):
    return torch.stack(torch.unbind(y, 2), 2)


# name -> a function
FIRST = {
    # element by element, constants of one value
    "relu": torch.relu,
    "silu": F.silu,
    "mish in place": lambda y: F.mish(y, inplace=True),
    "hardtanh": F.hardtanh,
    "leaky": lambda y: F.leaky_relu(y, inplace=True),
    "scaled": lambda y: y * 0.5 + 1,
    "ones": lambda y: y * torch.ones_like(y),
    "where": lambda y: torch.where(y > 0, y, y * 0.1),
    "clamp": lambda y: y.clamp(-1, 1),
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "ones of C": lambda y: y * torch.ones(y.shape[1])[:, None, None],
    "ramp over space": lambda y: y * torch.linspace(0, 1, y.shape[3]),
    "root of the width": lambda y: y / math.sqrt(y.shape[3]),
    "gate": lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    "expanded gate": lambda y: y * y[:, :, :1, :1].sigmoid().expand_as(y),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    # numbers and constants that depend on channels
    "root of the channels": lambda y: y / math.sqrt(y.shape[1]),
    "share": lambda y: y * (1 / y.shape[1]),
    "mean position": lambda y: y * (1 + torch.arange(y.shape[1]).float().mean()),
    "power": lambda y: y.relu() ** (y.shape[1] / 8),
    "filled": lambda y: y + torch.full((), float(y.shape[1])),
    "constants": lambda y: y * torch.linspace(0, 2, 8).view(1, -1, 1, 1),
    "ramp over channels": lambda y: y * torch.linspace(0, 2, y.shape[1]).view(1, -1, 1, 1),
    "written: copy": lambda y: written(y, lambda w: w.copy_(torch.arange(w.shape[1]).view(1, -1, 1, 1))),
    "written: item": lambda y: written(y, lambda w: w[:, 0].fill_(3)),
    "written: all": lambda y: written(y, lambda w: w.fill_(3)),
    "written: index_fill": lambda y: written(y, lambda w: w.index_fill_(1, torch.tensor([0, 1]), 3)),
    "written: mul": lambda y: written(y, lambda w: w.mul_(torch.linspace(0, 2, w.shape[1]).view(1, -1, 1, 1))),
    "written: part": lambda y: written(y, lambda w: w[:, : w.shape[1] // 2].mul_(2)),
    "index": lambda y: y * torch.arange(64.0).sin()[y.flatten(2).argmax(2)].mean(1)[:, None, None, None],
    # along other dimensions
    "max pool": lambda y: spatial(F.max_pool2d(y, 2)),
    "avg pool": lambda y: spatial(F.avg_pool2d(y, 2)),
    "adaptive": lambda y: spatial(F.adaptive_avg_pool2d(y, 3)),
    "unpool": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "bilinear": lambda y: spatial(F.interpolate(y, scale_factor=2, mode="bilinear")),
    "antialiased": lambda y: spatial(F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True)),
    "reflect": lambda y: spatial(F.pad(y, (1, 1, 1, 1), mode="reflect")),
    "circular": lambda y: spatial(F.pad(y, (1, 1, 1, 1), mode="circular")),
    "replicate": lambda y: spatial(F.pad(y, (1, 0, 1, 0), mode="replicate")),
    "buffer": lambda y: spatial(buffer(y)),
    "flip": lambda y: y.flip(3),
    "roll": lambda y: y.roll(1, 2),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "cumsum": lambda y: y.cumsum(2),
    "sorted": lambda y: y.sort(3)[0],
    "transposed": lambda y: y.transpose(2, 3),
    "softmax over space": lambda y: y.flatten(2).softmax(2).view(y.shape),
    "fold": lambda y: F.fold(F.unfold(y, 2, stride=2).sigmoid(), (SIZE, SIZE), 2, stride=2),
    "stack": stacked,
    "gather": lambda y: y.gather(3, torch.arange(SIZE).flip(0).expand_as(y)),
    "chunked space": lambda y: torch.cat(y.chunk(2, 2)[::-1], 2),
    "fft": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=(SIZE, SIZE)),
    "sampled": lambda y: spatial(y[:, :, ::2, 1::2]),
    "norm over space": lambda y: y / (1 + y.norm(dim=(2, 3), keepdim=True)),
    "grid": lambda y: F.grid_sample(y, y.new_zeros(len(y), 8, 8, 2), align_corners=False),
    # over channels
    "max over channels": lambda y: (
        y * F.adaptive_max_pool1d(y.flatten(2).transpose(1, 2), 1).reshape(len(y), 1, SIZE, SIZE).sigmoid()
    ),
    "avg over channels": lambda y: y * F.adaptive_avg_pool3d(y.unsqueeze(1), (1, SIZE, SIZE)).squeeze(1).sigmoid(),
    "resized channels": lambda y: y * F.interpolate(y.mean((2, 3)).unsqueeze(1), size=2, mode="linear").mean(2)[..., None, None],
    "lrn": lambda y: F.local_response_norm(y, 3),
    "layer norm": lambda y: F.layer_norm(y, y.shape[1:]),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "max": lambda y: y * y.amax(1, keepdim=True).sigmoid(),
    "glu": lambda y: F.glu(torch.cat([y, y.tanh()], 1), 1),
    "group norm of tokens": lambda y: (
        y * F.group_norm(y.flatten(2).transpose(1, 2), SIZE * SIZE).relu().mean((1, 2)).view(-1, 1, 1, 1)
    ),
    # channels move
    "halves": lambda y: torch.cat([a.tanh() for a in y.chunk(2, 1)], 1),
    "swapped": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "added halves": lambda y: torch.cat([sum(y.chunk(2, 1))] * 2, 1),
    "shuffle": lambda y: shuffled(y, 2),
    "flattened": lambda y: y.flatten(1).view(y.shape),
    "slice of all": lambda y: y * torch.ones(1, CHANNELS, 1, 1)[:, : y.shape[1]],
    "first half": lambda y: torch.cat([y[:, :4], y[:, 4:] * 2], 1),
    "permuted": lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "doubled": lambda y: torch.cat([y, y], 1)[:, : y.shape[1]],
    "einsum": lambda y: torch.einsum("nchw,c->nchw", y, torch.ones(y.shape[1], dtype=y.dtype)),
    "pixels": lambda y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
}


def scale(y, values):
    """y times one value for each example and channel, [N, C]."""
    return y * values[..., None, None]


def tokens(y):
    """[N, 64, C]"""
    return y.flatten(2).transpose(1, 2)


def untokens(t):
    return t.transpose(1, 2).reshape(len(t), -1, SIZE, SIZE)


def in_place(y):
    for f in (F.celu, F.elu, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.selu, F.hardswish, F.mish, F.relu6, F.silu):
        y = f(y, inplace=True)
    return aten.gelu_(aten.rrelu_with_noise_(F.threshold_(y, 0.1, 0.2), torch.ones_like(y)))


def fresh(y):
    """Constants of one value, however they were made."""
    size = (1, y.shape[1], 1, 1)
    made = [torch.zeros(size), torch.full(size, 0.5), torch.ones(size), torch.rand(size).zero_(), torch.randn(size).mul_(0)]
    made += [y.new_zeros(size), y.new_full(size, 0.5), y.new_ones(size), torch.empty(size).fill_(2), y.new_empty(size).zero_()]
    made += [torch.empty(size).uniform_(1, 1), torch.empty(size).normal_(0, 0), torch.empty(size).bernoulli_(1.0)]
    return functools.reduce(torch.mul, made[1:], y) + y * made[0]


def like(y):
    made = [torch.zeros_like(y), torch.full_like(y, 0.5), torch.rand_like(y) * 0, torch.randn_like(y) * 0]
    made += [torch.empty_like(y).fill_(2), torch.bernoulli(torch.ones_like(y)), y.clone().bernoulli_(1.0), y.detach()]
    return y * sum(made)


def checked(y):
    torch._assert_async(torch.ones((), dtype=torch.bool))
    return y if aten.is_same_size(y, y.clone()) else -y


def halves_written(y, function):
    """Halves of the rows of a fresh map, written one after the other."""
    out = torch.zeros_like(y)
    out[:, :, :4], out[:, :, 4:] = y[:, :, :4], function(y)[:, :, 4:]
    return out


def channels_written(y):
    out = torch.zeros(len(y), 2 * y.shape[1], SIZE, SIZE, dtype=y.dtype)
    out[:, : y.shape[1]], out[:, y.shape[1] :] = y, y.tanh()
    return sum(out.chunk(2, 1))


def turned_written(y):
    """Into the same buffer, with the channels in another dimension the second time."""
    out = torch.zeros(len(y), 8, 8, SIZE, dtype=y.dtype)
    out[..., :4] = y[..., :4]
    out[..., 4:] = y.transpose(1, 2)[..., 4:]
    return out


def written_at(x, indices, values):
    x[indices] = values
    return x


def fresh_like(y):
    return torch.zeros(y.shape, dtype=y.dtype)


ROWS = torch.arange(2)


def boxes(y):
    return torch.tensor([[0.0, 0, 0, 7, 7], [1, 1, 1, 6, 6]], dtype=y.dtype)


def roi(name, y, corners):
    import torchvision  # noqa: F401  (registers the operator)

    op = getattr(torch.ops.torchvision, name)
    return op(y, corners, 1.0, SIZE, SIZE, *((2, False) if name == "roi_align" else ()))[0 if name == "roi_pool" else ...]


def statistics(y):
    """All that adds up, sorts or picks, over rows."""
    s, positive = y[:, :, :, 0], y.sigmoid()
    found = [y.sum(3), y.amin(3), y.var(3), y.std(3), *torch.var_mean(y, 3), *torch.std_mean(y, 3), positive.prod(3)]
    found += [y.max(3)[0], y.min(3)[0], y.median(3)[0], y.logsumexp(3), y.topk(2, 3)[0].sum(3), y.cumprod(3)[..., 0]]
    found += [torch.linalg.vector_norm(y, dim=3), aten.norm(y, 2, [3]), y.argmax(3), y.argmin(3), (y > 0).all(3), (y > 0).any(3)]
    return y * sum(f.to(y.dtype).sigmoid() for f in (s, *found))[..., None]


def complex_numbers(y):
    z = torch.view_as_complex(y.unflatten(3, (4, 2)))
    z = z.conj().resolve_conj() + torch.conj_physical(z)
    return torch.view_as_real(z).flatten(3) + z.conj().imag.resolve_neg().repeat(1, 1, 1, 2) + torch._neg_view(y)


def spaces(y):
    """Pooling and interpolation in one, two and three dimensions."""
    line, block = y[:, :, 0], y.unsqueeze(2)
    found = [F.max_pool1d(line, 2), F.avg_pool1d(line, 2), F.adaptive_max_pool1d(line, 4), F.adaptive_avg_pool1d(line, 4)]
    found += [F.interpolate(line, size=4, mode=mode) for mode in ("nearest", "linear", "nearest-exact")]
    small = sum(found)[:, :, None, :].expand(-1, -1, 4, -1)
    found = [F.max_pool3d(block, (1, 2, 2)), F.avg_pool3d(block, (1, 2, 2)), F.adaptive_avg_pool3d(block, (1, 4, 4))]
    found += [F.adaptive_max_pool3d(block, (1, 4, 4))]
    found += [F.interpolate(block, size=(1, 4, 4), mode=mode) for mode in ("nearest", "trilinear", "nearest-exact")]
    small = small + sum(found).squeeze(2) + F.adaptive_max_pool2d(y, 4)
    found = [F.interpolate(y, size=4, mode=mode, antialias=True) for mode in ("bilinear", "bicubic", "lanczos")]
    found += [F.interpolate(y, size=4, mode=mode) for mode in ("nearest", "bicubic", "nearest-exact")]
    return spatial(small + sum(found))


def fractional(y):
    half = torch.full((len(y), y.shape[1], 3), 0.5, dtype=y.dtype)
    flat = aten.fractional_max_pool2d(y, [2, 2], [4, 4], half[:, :, :2])[0]
    deep = aten.fractional_max_pool3d(y.unsqueeze(2).repeat(1, 1, 4, 1, 1), [2, 2, 2], [2, 4, 4], half)[0].mean(2, keepdim=True)
    return spatial(flat + deep.squeeze(2))


def padded(y):
    line, block = y[:, :, 0], y.unsqueeze(2)
    lines = F.pad(line, (1, 1), mode="reflect") + F.pad(line, (1, 1), mode="replicate")
    blocks = F.pad(block.expand(-1, -1, 2, -1, -1), (1, 1, 1, 1, 1, 1), mode="reflect").sum(2)
    blocks = blocks + F.pad(block, (1, 1, 1, 1, 1, 1), mode="replicate").sum(2)
    return spatial(blocks + lines[:, :, None] + F.pad(y, (1, 1, 1, 1), value=0.5))


def normed(op, y):
    ones = torch.ones(y.shape[1], dtype=y.dtype)
    stats = (ones * 0, ones)
    if op is aten._batch_norm_with_update:
        return op(y, ones, ones, *(s.clone() for s in stats), 0.1, 1e-5)[0]
    if op is aten._native_batch_norm_legit_no_training:
        return op(y, ones, ones, *stats, 0.1, 1e-5)[0]
    return op(y, ones, ones, *stats, False, 0.1, 1e-5)[0]


def heads(y):
    """[N, 2, C / 2, 8, 8]"""
    return y.unflatten(1, (2, -1))


def covariance(y):
    """[N, C, C]"""
    mean = y.mean((2, 3))
    return mean[:, :, None] * mean[:, None]


def blurred(y):
    kernel = torch.ones(1, 1, 3, 3, dtype=y.dtype) / 9
    return F.conv2d(y, kernel.expand(y.shape[1], -1, -1, -1), padding=1, groups=y.shape[1])


def attention(y):
    t = tokens(y)
    return untokens((t @ t.transpose(1, 2)).softmax(2) @ t)


MORE = {
    "beside": None,  # programs.py
    # element by element
    "in place": in_place,
    "rrelu": lambda y: aten.rrelu_with_noise(y, torch.ones_like(y)),
    "zeroed": lambda y: y + y.clone().zero_(),
    "equal": lambda y: y if torch.equal(y, y.clone()) else -y,
    "hardswish and leaky": lambda y: F.leaky_relu(F.hardswish(y)),
    "item": lambda y: y * torch.ones(()).item(),
    "number from data": lambda y: y / math.sqrt(y.shape[1]) * torch.ones(()).item(),
    "pooled after a look": lambda y: spatial(F.adaptive_avg_pool2d(y * torch.ones(()).item(), 4)) * F.avg_pool1d(y[0], 1).mean(2)[None, ..., None].sigmoid(),
    "checked": checked,
    "fresh": fresh,
    "like": like,
    "bits": lambda y: y.to(torch.float64).to(y.dtype).contiguous(),
    "rows written": lambda y: halves_written(y, torch.tanh),
    "reversed rows written": lambda y: halves_written(y, lambda z: z.flip(1)),
    "channels written": channels_written,
    "turned and written": turned_written,
    "written: reversed": lambda y: written(y, lambda w: w.copy_(torch.ones(w.shape[1]).cumsum(0).flip(0).view(1, -1, 1, 1))),
    "written: view": lambda y: written(y, lambda w: w.view(-1)[1:].mul_(2)),
    "reversed sum": lambda y: y + y.flip(1).tanh(),
    # channels move, and come back
    "flat pieces": lambda y: y.flatten(1).view(len(y), -1, SIZE, SIZE // 2, 2).flatten(3).flip(1),
    "flat halves": lambda y: y.flatten(1).view(len(y), -1, 4, SIZE, SIZE).transpose(1, 2).flatten(1, 2),
    "one row of all": lambda y: y.flatten(1).view(len(y), 2, -1).flip(1).view(y.shape),
    "flipped": lambda y: y.flip(1),
    "shuffled by torch": lambda y: F.channel_shuffle(y, 2),
    "shuffled natively": lambda y: torch.native_channel_shuffle(y, 2),
    "repeated in space": lambda y: spatial(y.repeat(1, 1, 2, 2)),
    "expanded": lambda y: y.unsqueeze(2).expand(-1, -1, 3, -1, -1).mean(2),
    "squeezed": lambda y: y[:, :, None].squeeze(2).mT.mT,
    "pixels of channels": lambda y: F.interpolate(F.pixel_shuffle(y, 2), size=(SIZE, SIZE)).repeat(1, 4, 1, 1)[:, : y.shape[1]],
    "outer": lambda y: scale(y, covariance(y).flatten(1).view(len(y), 8, -1).mean(2)),
    "diagonal": lambda y: scale(y, covariance(y).diagonal(0, 1, 2)),
    "number of a diagonal": lambda y: y + covariance(y).diagonal(0, 1, 2).mean(),
    "shuffled rows": lambda y: torch.native_channel_shuffle(y.transpose(1, 2), 2).transpose(1, 2),
    "mask of rows": lambda y: y[:, :, torch.ones(8, dtype=torch.bool)],
    "t": lambda y: scale(y, y.mean((2, 3)).t().sigmoid().t()),
    "windows": lambda y: spatial(y.unfold(2, 2, 2).mean(4)),
    "selected row": lambda y: y * y.select(2, 0).unsqueeze(2),
    "selected channel": lambda y: y * y.select(1, 0).unsqueeze(1),
    "windows of channels": lambda y: y * y.unfold(1, 2, 2).mean((1, 4))[:, None],
    "heads": lambda y: (y.unflatten(1, (2, -1)) * y.unflatten(1, (2, -1)).mean(2, keepdim=True)).flatten(1, 2),
    "first of heads": lambda y: (y.unflatten(1, (2, -1)) * y.unflatten(1, (2, -1))[:, :, :1].sigmoid()).flatten(1, 2),
    "index of rows": lambda y: y[:, :, torch.arange(8).flip(0)],
    "index of places": lambda y: y[:, :, torch.arange(8).flip(0), torch.arange(8)][..., None].expand(y.shape) + y,
    "index of channels": lambda y: y[:, torch.arange(y.shape[1]).flip(0)],
    "index of 8 channels": lambda y: y[:, torch.arange(8).flip(0)],
    "index by mask": lambda y: y * y[y > 0].mean(),
    "index select": lambda y: y.index_select(2, torch.arange(8).flip(0)),
    "index select of channels": lambda y: y.index_select(1, torch.arange(y.shape[1]).flip(0)),
    "index of heads": lambda y: y.unflatten(1, (2, -1))[:, torch.tensor([1, 0])].flatten(1, 2),
    "written by index": lambda y: written_at(fresh_like(y), (ROWS,), y * 2),
    "written over": lambda y: written_at(y.clone(), (ROWS,), y * 2),
    "written over, reversed": lambda y: written_at(y.clone(), (ROWS,), y.flip(1)),
    "written line": lambda y: written_at(y.clone(), (ROWS,), torch.linspace(0, 1, 8, dtype=y.dtype)),
    "written by mask": lambda y: written_at(y.clone(), (y > 1,), y.mean()),
    "written number": lambda y: written_at(y.clone(), (ROWS[:1],), 3.0),
    "written number at channels": lambda y: written_at(y.clone(), (slice(None), ROWS), 3.0),
    "written number at turned": lambda y: written_at(y.transpose(0, 1).clone(), (ROWS,), 3.0).transpose(0, 1),
    "written at channels": lambda y: written_at(y.clone(), (slice(None), ROWS), y[:, :2] * 2),
    "written at all channels": lambda y: written_at(fresh_like(y.mT).transpose(0, 1), (torch.arange(8),), y.transpose(0, 1)).transpose(0, 1),
    "written at two": lambda y: written_at(y.transpose(0, 1).clone(), (ROWS,), y.transpose(0, 1)[:2] * 2).transpose(0, 1),
    "put": lambda y: y.clone().index_put((ROWS,), y * 2),
    "written at an index of features": lambda y: written_at(y.clone(), (y.mean((2, 3)).argmax(1) * 0,), y[:1] * 2),
    "unequal pieces": lambda y: torch.cat([a.tanh() for a in y.split([3, y.shape[1] - 3], 1)], 1),
    "equal pieces": lambda y: torch.cat([a.tanh() for a in torch.unsafe_split(y, y.shape[1] // 2, 1)], 1),
    "equal sizes": lambda y: torch.cat([a.tanh() for a in aten.unsafe_split_with_sizes(y, [y.shape[1] // 2] * 2, 1)], 1),
    "pieces": lambda y: torch.cat(y.split(4, 1)[::-1], 1),
    "unbound channels": lambda y: torch.stack(y.unbind(1)[::-1], 1),
    "unbound examples": lambda y: torch.stack([example.tanh() for example in y], 0),
    "pieces of constants": lambda y: torch.cat([a * b for a, b in zip(y.chunk(2, 1), torch.ones(1, y.shape[1], 1, 1).chunk(2, 1))], 1),
    "pieces of examples": lambda y: torch.cat(y.split([1, 1], 0)[::-1], 0),
    "glu over rows": lambda y: F.glu(y.repeat(1, 1, 2, 1), 2),
    "glu over columns": lambda y: aten.glu(y.repeat(1, 1, 1, 2)),
    "glu of itself": lambda y: spatial(F.glu(y.repeat(1, 2, 1, 1), 1)),
    "glu, reversed": lambda y: F.glu(torch.cat([y, y.flip(1)], 1), 1),
    "joined with zeros": lambda y: torch.cat([y, fresh_like(y)], 2)[:, :, :SIZE],
    "joined with a ramp": lambda y: torch.cat([y, torch.linspace(0, 1, 8, dtype=y.dtype).view(1, -1, 1, 1).expand(y.shape)], 2)[:, :, ::2],
    "joined with reversed rows": lambda y: torch.cat([y, y.flip(1)], 2)[:, :, ::2],
    "joined pools": lambda y: y * torch.cat([y.mean((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)], 3).mean(3, keepdim=True),
    "joined outer": lambda y: scale(y, torch.cat([covariance(y), covariance(y)], 0)[:2].mean(2)),
    "joined with nothing": lambda y: torch.cat([y, torch.zeros(0, dtype=y.dtype)], 1),
    "zeros for channels": lambda y: sum(torch.cat([y, fresh_like(y)], 1).chunk(2, 1)),
    "ramp for channels": lambda y: sum(torch.cat([y, torch.linspace(0, 1, 8, dtype=y.dtype).view(1, -1, 1, 1).expand(y.shape)], 1).chunk(2, 1)),
    "stacked, reversed": lambda y: torch.stack([y, y.flip(1)], 4).mean(4),
    "padded": padded,
    "padded channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1 : y.shape[1] + 1],
    "padded and cropped channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, -1)),
    "replicated channels": lambda y: untokens(F.pad(tokens(y), (1, 0), mode="replicate")[..., :-1]),
    "reflected channels": lambda y: untokens(F.pad(tokens(y), (1, 0), mode="reflect")[..., :-1]),
    # along other dimensions
    "statistics": statistics,
    "spaces": spaces,
    "fractional": fractional,
    "unpool 3d": lambda y: F.max_unpool3d(*F.max_pool3d(y.unsqueeze(2), (1, 2, 2), return_indices=True), (1, 2, 2)).squeeze(2),
    "grid 3d": lambda y: F.grid_sample(y.unsqueeze(2), y.new_zeros(len(y), 1, 8, 8, 3), align_corners=False).squeeze(2),
    "grid of features": lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "grid of turned": lambda y: F.grid_sample(y.transpose(1, 2), y.new_zeros(len(y), y.shape[1], 8, 2), align_corners=False).transpose(1, 2),
    "shapes in place": lambda y: y.clone().unsqueeze_(2).squeeze_(2),
    "turned in place": lambda y: y[:, :, :, 0].mean(0).clone().t_().t_()[None, ..., None] + y,
    "rois": lambda y: roi("roi_align", y, boxes(y)),
    "roi pool": lambda y: roi("roi_pool", y, boxes(y)),
    "rois of features": lambda y: roi("roi_align", y, boxes(y) + y.mean((2, 3))[:, :1].sigmoid()),
    "gather of fewer": lambda y: spatial(y.gather(3, torch.arange(4).expand(2, y.shape[1], 8, 4))),
    "gather of fewer channels": lambda y: y * y.gather(3, torch.arange(8).expand(2, 1, 8, 8)),
    "gather over channels": lambda y: y.sin().gather(1, torch.arange(y.shape[1]).flip(0).view(1, -1, 1, 1).expand_as(y)),
    "gather by order": lambda y: y.gather(3, y.flip(1).argsort(3)),
    "unfolded": lambda y: y + F.unfold(y, 3, padding=1).unflatten(1, (-1, 9)).mean(2).view(y.shape),
    "unfolded rows": lambda y: F.unfold(y.transpose(1, 2), 3, padding=1).unflatten(1, (-1, 9)).mean(2).view(len(y), 8, -1, 8).transpose(1, 2),
    "folded rows": lambda y: F.fold(y.flatten(2), (16, 16), 2, stride=2)[:, :, ::2, ::2].repeat(1, 4, 1, 1)[:, : y.shape[1]],
    "folded columns": lambda y: y + F.fold(tokens(y)[:, :, :4].contiguous(), (4, 4), 2, stride=2).mean((1, 2, 3)).view(-1, 1, 1, 1),
    "complex": complex_numbers,
    "complex channels": lambda y: torch.view_as_real(torch.view_as_complex(y.permute(0, 2, 3, 1).contiguous().unflatten(3, (-1, 2))) * 1j).flatten(3).permute(0, 3, 1, 2),
    "fft of complex": lambda y: torch.fft.ifft(torch.fft.fft(y, dim=3) * 0.5, dim=3).real,
    "fft over channels": lambda y: torch.fft.ifft(torch.fft.fft(y, dim=1).cumsum(1), dim=1).real,
    "log softmax": lambda y: y.log_softmax(2) + y.log_softmax(1) * 0.5,
    "mean of no dimensions": lambda y: y * y.mean([]).sigmoid(),
    "sum over channels": lambda y: y + y.sum(1, keepdim=True),
    "sum over all": lambda y: y + y.sum(),
    "softmax of heads": lambda y: y.unflatten(1, (2, -1)).softmax(2).flatten(1, 2),
    "layer norm in space": lambda y: F.layer_norm(y, y.shape[2:]),
    "group norm": lambda y: F.group_norm(y, 2),
    "group norm by constants": lambda y: F.group_norm(y, y.shape[1] // 2, torch.linspace(0, 1, 8, dtype=y.dtype)),
    "group norm of each": lambda y: F.group_norm(y, y.shape[1]),
    "batch norm of constants": lambda y: F.batch_norm(y, torch.zeros(y.shape[1], dtype=y.dtype), torch.linspace(1, 2, y.shape[1], dtype=y.dtype)),
    "batch norm of rows": lambda y: F.batch_norm(y.transpose(1, 2), torch.zeros(8, dtype=y.dtype), torch.ones(8, dtype=y.dtype)).transpose(1, 2),
    "batch norm of one map": lambda y: F.batch_norm(y.flatten(0, 1)[:, None], *torch.ones(2, 1, dtype=y.dtype)).view(y.shape),
    "batch norm: legit": lambda y: normed(aten._native_batch_norm_legit, y),
    "batch norm: no training": lambda y: normed(aten._native_batch_norm_legit_no_training, y),
    "batch norm: update": lambda y: normed(aten._batch_norm_with_update, y),
    "instance norm": lambda y: F.instance_norm(y),
    "renorm of channels": lambda y: y.renorm(2, 1, 0.5),
    "renorm of examples": lambda y: y.renorm(2, 0, 0.5),
    # two maps become a number
    "loss of each": lambda y: y * F.mse_loss(y, y.tanh(), reduction="none"),
    "losses": lambda y: y * (F.smooth_l1_loss(y, y.tanh()) + F.huber_loss(y, y.tanh()) + F.soft_margin_loss(y, y.sign().detach())),
    "entropy": lambda y: y * F.binary_cross_entropy(y.sigmoid(), y.sigmoid().detach()),
    "dot": lambda y: y * torch.dot(y.flatten(), y.flatten()).sigmoid(),
    "vdot": lambda y: y * torch.vdot(y.flatten(), y.flatten()).sigmoid(),
    "mv": lambda y: y + torch.mv(tokens(y)[0], y.mean((0, 2, 3))).view(1, 1, 8, 8),
    # products
    "attention": attention,
    "attention over channels": lambda y: ((y.flatten(2) @ tokens(y)).softmax(2) @ y.flatten(2)).view(y.shape),
    "batched over channels": lambda y: (y.transpose(0, 1).flatten(2).transpose(1, 2) @ y.transpose(0, 1).flatten(2)).mean((1, 2)) .view(1, -1, 1, 1) + y,
    "product of constants": lambda y: untokens(tokens(y) @ torch.eye(8, dtype=y.dtype)),
    "mixed by constants": lambda y: (torch.linspace(0, 1, 128, dtype=y.dtype).view(2, 8, 8) @ y.flatten(2)).view(y.shape),
    "added to constants": lambda y: torch.baddbmm(y.flatten(2), *(torch.linspace(0, 1, n * 16, dtype=y.dtype).view(2, 8, n) for n in (8, 64))).view(y.shape),
    "product of rows": lambda y: torch.eye(8, dtype=y.dtype).flip(0) @ y,
    "added to a product": lambda y: torch.baddbmm(y.flatten(2), torch.eye(8, dtype=y.dtype).expand(2, 8, 8), y.flatten(2)).view(y.shape),
    "added to a product of places": lambda y: untokens(torch.baddbmm(tokens(y).flip(2), torch.eye(64, dtype=y.dtype).expand(2, 64, 64), tokens(y))),
    "added to a matrix": lambda y: torch.stack([torch.addmm(e.flip(0).flatten(1).t(), torch.eye(64, dtype=e.dtype), e.flatten(1).t()).t().view(e.shape) for e in y]),
    # sizes that are read from shapes
    "group norm of fours": lambda y: F.group_norm(y, y.shape[1] // 4),
    "shuffle of fours": lambda y: F.channel_shuffle(y, y.shape[1] // 4),
    "pieces of four": lambda y: (y.unflatten(1, (-1, 4)) * y.unflatten(1, (-1, 4)).mean(2, keepdim=True)).flatten(1, 2),
    "fours in turn": lambda y: y.unflatten(1, (-1, 4)).flip(1).flatten(1, 2),
    "joined fours": lambda y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1),
    "every other": lambda y: torch.cat([y[:, ::2], y[:, 1::2]], 1),
    "rolled channels": lambda y: y.roll(1, 1),
    "best channels": lambda y: y * y.topk(y.shape[1] // 2, 1)[0].mean(1, keepdim=True),
    "narrowed": lambda y: torch.cat([y.narrow(1, y.shape[1] // 2, y.shape[1] // 2), y.narrow(1, 0, y.shape[1] // 2)], 1),
    "mean by hand": lambda y: y - y.sum((2, 3), keepdim=True) / (y[0].numel() / y.shape[1]),
    "mean of all by hand": lambda y: y - y.flatten(1).sum(1).view(-1, 1, 1, 1) / y[0].numel(),
    "normal over rows": lambda y: y.flatten(0, 1).softmax(1).unflatten(0, (2, -1)),
    "blurred": blurred,
    "constant kernel": lambda y: F.conv2d(y, torch.ones(8, 8, 1, 1, dtype=y.dtype) / 8),
    "constant transposed": lambda y: F.conv_transpose2d(y, torch.ones(8, 1, 1, 1, dtype=y.dtype), groups=8),
    "constant depthwise": lambda y: F.conv2d(y, torch.ones(8, 1, 1, 1, dtype=y.dtype), groups=8),
    "convolved rows": lambda y: F.conv2d(y.transpose(1, 2), torch.ones(8, 8, 1, 1, dtype=y.dtype) / 8).transpose(1, 2),
    "each alone": lambda y: F.conv2d(y.reshape(-1, 1, 8, 8), torch.ones(1, 1, 1, 1, dtype=y.dtype)).view(y.shape),
}  # fmt: skip
