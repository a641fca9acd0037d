"""Float32 matrix products of a CPU through oneDNN where MKL is slow; both come with torch.

torch takes MKL's, which on processors that aren't Intel's leaves half of the vector width unused: on a Zen 5 core 105
GFLOP/s, oneDNN 235, on its AVX2 alone 118. Numbers differ by rounding. oneDNN compiles a kernel for every new shape
(about 2 ms) and keeps 1,024, so this is for loops whose shapes return: pretraining, not rows of every length.
"""

import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

LEAST = 2**21  # multiplications: MKL is as fast for less, since its call is shorter
_installed: list[torch.library.Library] = []  # kept: a library's kernels go with it


def mkl_is_slow() -> bool:
    """Whether torch's products are MKL's on an x86 processor that isn't Intel's."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available():
        return False
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "GenuineIntel" not in facts.read_text()


def use_onednn() -> bool:
    """Has oneDNN make this process's large products of float32 matrices from now on; returns whether it does.

    It is the kernels of `mm`, `addmm` and `bmm` for the CPU that are replaced, so forward and backward passes of every
    module use them, and nothing in a model changes.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not _installed and there and mkl_is_slow():
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is another kernel: we know
            library.impl("mm", product, "CPU")
            library.impl("addmm", product_with_bias, "CPU")
            library.impl("bmm", products, "CPU")
        _installed.append(library)
    return bool(_installed)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] times b [k, m]."""
    if not _large(a, b):
        return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    if a.shape[0] > b.shape[1] and not a.is_contiguous():  # oneDNN's first matrix is copied then: rather the smaller
        return _onednn(b.t(), a.t(), None).t()
    return _onednn(a, b, None)


def product_with_bias(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta bias [m] + alpha a [n, k] times b [k, m]; a bias of any shape that broadcasts."""
    plain = alpha == beta == 1 and bias.shape == (b.shape[1],) and bias.dtype is torch.float32
    if not plain or not _large(a, b):
        out = a.new_empty(a.shape[0], b.shape[1])
        return torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
    return _onednn(a, b, bias)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a [i, n, k] times b [i, k, m], one by one where they are large."""
    if not 0 < len(a) == len(b) or not _large(a[0], b[0]):
        return torch.ops.aten.bmm.out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))
    return torch.stack([product(x, y) for x, y in zip(a, b, strict=True)])


def _large(a: Tensor, b: Tensor) -> bool:
    both = a.dtype is torch.float32 and b.dtype is torch.float32 and a.shape[1] == b.shape[0]
    return both and a.numel() * b.shape[1] >= LEAST


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    weight = b.t() if b.is_contiguous() or b.t().is_contiguous() else b.t().contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
