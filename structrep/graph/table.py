"""What torch's operations are, where no schema says it: the one table of their names.

A new operation is a row here, or a word in one, and nothing where its schema says enough: what makes each number of the
one at its place is tagged so (`operations.is_pointwise`). How an operation is read as a map is
`read.functions`' and `read.products`'.
"""

from __future__ import annotations

import enum
import functools
import math
import operator
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Is(enum.Flag):
    """What an operation is, beside what its schema says."""

    OWN = enum.auto()  # gives memory of its own: a composite one, a function in Python, an operator of Python itself
    VIEW = enum.auto()  # may look at what it is given, on some devices
    SHAPE = enum.auto()  # gives the shape that it is given
    LIKE = enum.auto()  # gives the shape of the last value that it is given
    RANK = enum.auto()  # gives as many dims as it is given, in each piece if it gives several
    DTYPE = enum.auto()  # gives the dtype of the floats that it is given, if it is told none; if several, in the first
    MOVES = enum.auto()  # gives numbers that it is given, in other places
    PADS = enum.auto()  # puts numbers around those that it is given: some of them, or others
    AVERAGES = enum.auto()  # gives sums and averages of numbers that it is given, and knows no weights
    FOLDS = enum.auto()  # takes neighbouring dims together, or apart
    RESHAPES = enum.auto()  # the same, to sizes that it is told
    PERMUTES = enum.auto()  # exchanges dims
    PIECES = enum.auto()  # gives several parts of one value
    REDUCES = enum.auto()  # takes dims away, or leaves them with a size of 1: dim, keepdim
    KERNEL = enum.auto()  # has a weight as its second argument
    POOL = enum.auto()  # makes one pixel of those of a window
    MAXIMUM = enum.auto()  # of them, takes the largest
    CAST = enum.auto()  # gives another dtype, or another device
    COUNTS = enum.auto()  # gives a size, if it is given sizes
    COMPARES = enum.auto()  # gives an answer, if it is given numbers
    ASSERTS = enum.auto()  # stops the forward, or does nothing


CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
    "bool": torch.bool, "cfloat": torch.complex64, "cdouble": torch.complex128,
}  # fmt: skip
_MOVED = Is.MOVES | Is.DTYPE
# What no schema says of torch's operations, by their names; of one that several rows name, all of them say something.
_TABLE = [
    # with weights
    (r"conv(_transpose)?[123]d", Is.OWN | Is.DTYPE | Is.KERNEL),
    (r"linear", Is.OWN | Is.RANK | Is.DTYPE | Is.KERNEL),
    (r"[ir]?matmul", Is.OWN | Is.DTYPE),
    (r"mm|bmm|addmm|baddbmm|einsum|embedding", Is.DTYPE),
    (r"bilinear|inner|outer|ger|kron|cross|embedding_bag|lstm|gru|rnn_(tanh|relu)", Is.OWN),
    (r"scaled_dot_product_attention", Is.OWN | Is.RANK | Is.DTYPE),
    # norms, activations
    (r"(batch|layer|group|instance|rms)_norm|normalize|(log_)?softmax", Is.OWN | Is.SHAPE | Is.DTYPE),
    (r"softmin|softsign|tanhshrink|log_?sigmoid", Is.OWN | Is.SHAPE | Is.DTYPE),
    (r"hardswish|dropout([123]d)?|(feature_)?alpha_dropout", Is.SHAPE | Is.DTYPE),
    (r"relu6|rrelu|selu|prelu", Is.OWN),
    # pools, and what takes pixels together or apart
    (r"(adaptive_)?avg_pool[123]d", Is.OWN | Is.DTYPE | Is.POOL | Is.AVERAGES),
    (r"max_pool[123]d", Is.OWN | Is.DTYPE | Is.POOL | Is.MAXIMUM),
    (r"adaptive_max_pool[123]d", Is.OWN | Is.DTYPE | Is.POOL),
    (r"(adaptive_)?max_pool[123]d_with_indices|lp_pool[123]d|max_unpool1d", Is.OWN),
    (r"fold|interpolate|upsample(_\w+)?", Is.OWN | Is.DTYPE | Is.AVERAGES),
    (r"grid_sampler?|affine_grid|one_hot", Is.OWN),
    (r"(pixel_(un)?|channel_)shuffle", _MOVED | Is.RANK | Is.VIEW),
    (r"_?unsafe_\w+|native_channel_shuffle", Is.VIEW),
    (r"pad|(reflection|replication|circular|constant|zero)_pad[123]d", Is.DTYPE | Is.PADS),
    # numbers in other places, and shapes
    (r"view|reshape", _MOVED | Is.FOLDS | Is.RESHAPES),
    (r"flatten", _MOVED | Is.FOLDS),
    (r"unflatten|squeeze|unsqueeze|expand|repeat|unfold|select|t", _MOVED),
    (r"permute|transpose|swapaxes", _MOVED | Is.RANK | Is.PERMUTES),
    (r"movedim|rot90|narrow|index_select|gather", _MOVED | Is.RANK),
    (r"roll|flip|contiguous|clone|detach", _MOVED | Is.SHAPE),
    (r"flip(lr|ud)", _MOVED | Is.OWN | Is.SHAPE),
    (r"(view|reshape|expand)_as", _MOVED | Is.LIKE),
    (r"tile|repeat_interleave", _MOVED | Is.OWN),
    (r"chunk|split|tensor_split|split_with_sizes", _MOVED | Is.RANK | Is.PIECES),
    (r"unbind", _MOVED | Is.PIECES),
    (r"cat", Is.RANK | Is.DTYPE),
    (r"concat(enate)?", Is.OWN | Is.RANK | Is.DTYPE),
    (r"stack", Is.DTYPE),
    (r"[hvd]stack|(row|column)_stack|take_along_dim|msort|where", Is.OWN),
    (rf"to|type|type_as|{'|'.join(CASTS)}", Is.CAST | Is.SHAPE),
    (r"new_(zeros|ones|full|empty)", Is.DTYPE),
    (r"(zeros|ones|full|empty)_like", Is.SHAPE | Is.DTYPE),
    # several numbers as one
    (r"mean", Is.REDUCES | Is.DTYPE | Is.AVERAGES),
    (r"sum|amax|amin|logsumexp|norm", Is.REDUCES | Is.DTYPE),
    (r"std|var", Is.OWN | Is.REDUCES | Is.DTYPE),
    (r"vector_norm", Is.REDUCES),
    (r"max|min", Is.OWN | Is.DTYPE),
    (r"sort|topk|cummax|cummin|kthvalue|median|mode", Is.DTYPE),
    (r"(std|var)_mean|nanmean|(nan)?quantile|argsort|\w+_loss|cosine_similarity", Is.OWN),
    # arithmetic; what makes each number of one at its place says so in its schema
    (r"[ir]?(add|sub|mul|truediv|div|pow)_?|multiply|(true_)?divide|subtract", Is.OWN | Is.RANK),
    (r"[ir]?(floordiv|mod|and|or|xor|lshift|rshift)_?|neg|negative|abs|inv|invert|is_|is_not|truth", Is.OWN),
    (r"clip|square|absolute|arc(cos|sin|tan)h?|arctan2|isclose|isfinite|isreal|special_\w+", Is.OWN),
    (r"(greater|less|not)(_equal)?|index", Is.OWN),
    # sizes and questions
    (r"add|sub|mul|floordiv|mod|neg", Is.COUNTS),
    (r"getitem", Is.MOVES | Is.COUNTS),
    (r"eq|ne|lt|le|gt|ge|not_|contains", Is.OWN | Is.COMPARES),
    (r"len", Is.OWN),
    (r"_assert(_with_msg|_tensor_metadata)?", Is.ASSERTS),
]
# In which range the numbers are that an activation gives.
RANGES = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0)}
CLAMPS = {"relu", "relu6"}  # which leave a number in that range as it is
# What torch looks up sizes for in its own code, which takes no traced ones there, by where it is called.
SIZED: dict[Any, tuple[str, ...]] = {
    torch.Tensor: (
        *("expand", "repeat", "tile", "view", "reshape", "broadcast_to"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "to"),
    ),
    torch: (
        *("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "broadcast_to"),
        *("tensor", "as_tensor", "asarray", "finfo", "iinfo", "cat", "concat", "stack"),
    ),
    F: ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
}
MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}  # comparisons, from the other side


class Question(NamedTuple):
    """What a tensor tells apart from its numbers and its memory, by an attribute or a method.

    Args:
        of: what it is asked for: "rank", "sizes", "dtype", "kind" (what its dtype is like), "place", "gradient",
            "layout" (how its numbers lie).
        like: an answer, of the type that all are of; the one to a yes or no that is taken for granted.
    """

    of: str
    like: Any


QUESTIONS = {
    **dict.fromkeys(("dim", "ndim", "ndimension"), Question("rank", 0)),
    **dict.fromkeys(("shape", "size"), Question("sizes", torch.Size())),
    **dict.fromkeys(("numel", "nelement"), Question("sizes", 0)),
    "dtype": Question("dtype", torch.float32),
    **dict.fromkeys(("itemsize", "element_size"), Question("kind", 0)),
    "is_floating_point": Question("kind", True),
    "is_complex": Question("kind", False),
    "device": Question("place", torch.device("cpu")),
    **dict.fromkeys(("is_cuda", "is_cpu", "is_mps", "is_xpu"), Question("place", False)),
    "requires_grad": Question("gradient", False),
    **dict.fromkeys(("is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_meta"), Question("layout", False)),
    **{"is_contiguous": Question("layout", True), "is_inference": Question("layout", False)},
    **{"layout": Question("layout", torch.strided), "stride": Question("layout", ()), "nbytes": Question("layout", 0)},
    "names": Question("layout", ()),
}


@functools.cache
def facts(name: str) -> Is:
    """What the table says of an operation of torch's."""
    return functools.reduce(operator.or_, (known for names, known in _TABLE if re.fullmatch(names, name)), Is(0))


def spatial_dims(name: str) -> int | None:
    """How many spatial dims a convolution or a pool has that is called so; None for what is neither."""
    return int(name[-2]) if facts(name) & (Is.KERNEL | Is.POOL) and name[-1] == "d" else None
