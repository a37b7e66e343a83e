"""Matrix products of tokens that are sorted by expert, each expert's with a matrix of its own.

Dimensions in names: t tokens, E experts, m output neurons, n input neurons. `offsets` int32 [E] says where each expert's
tokens end; tokens behind the last offset belong to none. Where an expert's tokens end is known to the device alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def grouped_linear(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """y[i] = matrices[e(i)] x[i]: x [t, n] and matrices [E, m, n], of one dtype -> [t, m].

    Rows of tokens that belong to no expert are not written: they may hold anything.
    """
    turned = matrices.transpose(-2, -1)
    if _has_aligned_strides(x) and _has_aligned_strides(turned) and matrices.shape[1] % _step(x) == 0:
        return functional.grouped_mm(x, turned, offs=offsets)
    # Sizes that the kernel does not take, of models for tests: no copy of the matrices is made, the host waits.
    y, start = x.new_zeros(x.shape[0], matrices.shape[1]), 0
    for expert, stop in enumerate(offsets.tolist()):
        torch.mm(x[start:stop], turned[expert], out=y[start:stop])
        start = stop
    return y


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """For each expert the sum over its tokens of left[i] right[i]^T: [t, a] and [t, b] -> [E, a, b]; zeros if it has none."""
    a, b, step = left.shape[1], right.shape[1], _step(left)
    left, right = (functional.pad(x, (0, -x.shape[1] % step)) if x.shape[1] % step else x for x in (left, right))
    product = functional.grouped_mm(left.contiguous().t(), right.contiguous(), offs=offsets)
    counts = count_of_each(offsets)
    # Kernels were seen to leave something else than zeros where there is nothing to sum.
    product = product.masked_fill_((counts == 0).view(-1, 1, 1), 0)
    return product if product.shape[1:] == (a, b) else product[:, :a, :b].contiguous()


def narrow_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_outer` of a few rows and columns, so that copies of both are nothing; in fp32 where that is faster.

    On a CPU oneDNN makes a bf16 kernel for every number of tokens that an expert is ever sent, and keeps it; that takes longer
    than so small a product. In fp32 none is made. A plan's fake tensors stand for a GPU's, and stay as they are.
    """
    if left.device.type == "cpu" and left.element_size() < 4 and type(left) is Tensor:
        left, right = left.float(), right.float()
    return grouped_outer(left, right, offsets)


def count_of_each(offsets: Tensor) -> Tensor:
    """Tokens of each expert: int64 [E], of where they end, int32 [E]."""
    return torch.diff(offsets.to(torch.int64), prepend=offsets.new_zeros(1, dtype=torch.int64))


def take_of_owner(matrix: Tensor, index: Tensor, owners: Tensor) -> Tensor:
    """matrix[i, index[e(i)]] for each token: matrix [t, k], index int64 [E, j], owners int64 [t] -> [t, j]."""
    return torch.gather(matrix, 1, index[owners])


def _step(x: Tensor) -> int:
    """Sizes that the kernel takes are multiples of this: 16 bytes."""
    return 16 // x.element_size()


def _has_aligned_strides(x: Tensor) -> bool:
    step = _step(x)
    return all(stride == 1 or stride % step == 0 for stride in x.stride()) and 1 in x.stride()[-2:]
