"""The compiled operators, as Python functions. All calls of ``torch.ops.taylored`` are here, with the fake kernels that
tell ``torch.compile`` and ``torch.export`` what shape comes out.

Maps are ``[N, C, *spatial]``, contiguous or channels-last of any spatial rank; other strides cost one contiguous copy.
A ``[N, L, F]`` tensor is a map as ``x.movedim(-1, 1)``. Element types are float64, float32, bfloat16 and float16. Sums
are float32 over short stretches whose totals are added in float64 (float64 throughout for float64), and have the same
bits whatever the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taylored import _library

_library.load()
_ops = torch.ops.taylored

REDUCTIONS = {"abs": 0, "batch": 1, "square": 2}


def contribution(x: Tensor, g: Tensor) -> Tensor:
    """First-order change of the loss per example and channel: ``t[n, c] = sum_p x[n, c, p] * g[n, c, p]``
    (arXiv:1611.06440, equation 8, before absolute value and division by the number of positions).

    x, g: ``[N, C, *spatial]``, same shape and dtype; g is brought to x's layout.
    Returns ``[N, C]``, float32, or float64 for float64.
    Raises RuntimeError for other dtypes, fewer than two dimensions, or an x and g that differ.
    """
    return _ops.contribution.default(x, g)


def relu_backward(y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU's backward pass and the contribution of its output, from one read of both.

    y: output of ReLU, ``[N, C, *spatial]``; g: gradient with respect to it, same shape and dtype.
    Returns ``g`` where ``y > 0`` and zero elsewhere (strides of ``torch.empty_like(y)``), and ``contribution(y, g)``.
    Raises as `contribution` does.
    """
    return _ops.relu_backward.default(y, g)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and number of zeros over positions, in one pass: the parts of mean, standard deviation and
    APoZ (Hu et al., arXiv:1607.03250).

    x: ``[N, C, *spatial]``.
    Returns three ``[N, C]``: sum and sum of squares as float32 (float64 for float64), zeros as int64.
    Raises RuntimeError for other dtypes or fewer than two dimensions.
    """
    return _ops.channel_statistics.default(x)


def sparse_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution, stride 1, padding 1, in time proportional to the elements of x that are not zero (the idea is
    that of SparseTrain, Gong et al., arXiv:1911.10175). On a processor with AVX-512 it overtakes a dense one where about
    a quarter of x is zero, and is 1.4 times as fast where half is.

    x: float32 ``[N, C, H, W]``, best channels-last. weight: float32 ``[3, C, 3, outputs]``: that of ``nn.Conv2d`` as
    ``weight.permute(2, 1, 3, 0)``. bias: float32 ``[outputs]``.
    Returns float32 ``[N, outputs, H, W]``, channels-last. Raises RuntimeError for other shapes or dtypes. Has no gradient.
    """
    return _ops.sparse_conv.default(x, weight, bias)


def clamp_difference_(d: Tensor, clean: Tensor, rows: Tensor, low: float, high: float) -> None:
    """What a clamp makes of a difference, in place: ``d[p] = clamp(clean[rows[p]] + d[p]) - clamp(clean[rows[p]])``,
    computed in float32. With bounds of zero and infinity that is ReLU.

    d: bfloat16 ``[P, ...]``; clean: float32 ``[N, ...]``, its rows of d's shape and dense in the same layout; rows: int64
    ``[P]``, below N. On a GPU it is composed of torch's operators. Raises RuntimeError, with nothing changed, for others.
    Has no gradient.
    """
    if d.device.type == "cpu":
        _ops.clamp_difference_.default(d, clean, rows, low, high)
    else:
        old = clean.index_select(0, rows)
        d.copy_((old + d).clamp_(low, high).sub_(old.clamp(low, high)))


def accumulate_(total: Tensor, t: list[Tensor], reduction: str, scale: float) -> Tensor:
    """Add a batch's contributions to a running score, in place. With ``s[n, u] = scale * sum_k t[k][n, u]``:

    - ``"abs"``: ``total[u] += sum_n |s[n, u]|`` (arXiv:1611.06440)
    - ``"batch"``: ``total[u] += |sum_n s[n, u]|`` (Gildenblat's code)
    - ``"square"``: ``total[u] += sum_n s[n, u]^2`` (Molchanov et al. 2019, arXiv:1906.10771)

    total: contiguous ``[units]``, float32 or float64. t: one or more ``[N, units]``, float32 or float64.
    Returns total. Raises ValueError for an unknown reduction, RuntimeError for shapes or dtypes.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
    _ops.accumulate_.default(total, t, REDUCTIONS[reduction], scale)
    return total


def compact_(x: Tensor, keep: dict[int, Tensor]) -> Tensor:
    """Keep some indices of some dimensions, in x's own memory, and return the smaller tensor: a view of the same
    storage, packed, its strides in the order of x's.

    x: any dtype, dense (contiguous, channels-last, any permutation of them). It keeps its shape; what lies behind the
    returned view is left over. keep: for each dimension a strictly increasing int64 index vector, on the CPU or where
    x is. On the GPU the host waits for nothing; indices that are there already are checked there, and bad ones stop the
    device, as torch's own index errors do.
    Equal to ``x.index_select`` over each dimension. Raises RuntimeError, before anything is moved, where x is not
    dense or an index vector is not sorted or out of range.
    """
    _ops.compact_.default(x, list(keep), list(keep.values()))
    return front(x, keep)


def compact_many_(x: list[Tensor], keep: list[dict[int, Tensor]]) -> None:
    """`compact_` of each x[i] with keep[i], all or nothing: every tensor is checked before anything is moved. What stays of
    each is its `front`. On the GPU one launch moves up to eight neighbours that are alike and share their index vectors, such
    as a weight, its gradient and its momenta. All tensors are on one device. Raises as `compact_` does.
    """
    dims, vectors = [d for cut in keep for d in cut], [index for cut in keep for index in cut.values()]
    if x:  # of nothing torch does not know the device
        _ops.compact_many_.default(x, [len(cut) for cut in keep], dims, vectors)


def front(x: Tensor, keep: dict[int, Tensor]) -> Tensor:
    """The part of x's memory in which `compact_` puts what is kept, in the shape that it has."""
    shape = list(x.shape)
    for dim, index in keep.items():
        shape[dim] = index.shape[0]
    return x.as_strided(shape, packed_strides(shape, x))


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill a stretch of memory without gap or overlap: what `compact_` asks of x."""
    return x.is_contiguous() or all(s == 1 or a == b for s, a, b in zip(x.shape, x.stride(), packed_strides(x.shape, x)))


def packed_strides(shape: Sequence[int], like: Tensor) -> list[int]:
    """Strides of dense memory of that shape, its dimensions nested as those of `like`."""
    strides, step = [0] * len(shape), 1
    order = list(range(len(shape) - 1, -1, -1))
    if not like.is_contiguous():  # a stable sort: equal strides (dimensions of size one) keep contiguous order
        order = sorted(order, key=like.stride)
    for dim in order:
        strides[dim] = step
        step *= shape[dim] or 1
    return strides


@torch.library.register_fake("taylored::contribution")
def _(x, g):
    return x.new_empty(x.shape[:2], dtype=_sum_dtype(x))


@torch.library.register_fake("taylored::relu_backward")
def _(y, g):
    return torch.empty_like(y), y.new_empty(y.shape[:2], dtype=_sum_dtype(y))


@torch.library.register_fake("taylored::channel_statistics")
def _(x):
    total, squares = (x.new_empty(x.shape[:2], dtype=_sum_dtype(x)) for _ in range(2))
    return total, squares, x.new_empty(x.shape[:2], dtype=torch.int64)


@torch.library.register_fake("taylored::sparse_conv")
def _(x, weight, bias=None):
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, weight.shape[3]).permute(0, 3, 1, 2)


@torch.library.register_fake("taylored::clamp_difference_")
def _(d, clean, rows, low, high):
    return None


@torch.library.register_fake("taylored::accumulate_")
def _(total, t, reduction, scale):
    return None


@torch.library.register_fake("taylored::compact_")
def _(x, dims, keep):
    return None


@torch.library.register_fake("taylored::compact_many_")
def _(x, counts, dims, keep):
    return None


def _sum_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
