"""Matrix products through oneDNN against float64, and against torch's own where they aren't taken over."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf import products

N, K, M = 192, 160, 96  # more multiplications than LEAST


def laid_out(rows: int, columns: int) -> list[Tensor]:
    """One shape in memory in every way that a product meets: by rows, by columns, inside a larger one, repeated."""
    return [
        torch.randn(rows, columns),
        torch.randn(columns, rows).t(),
        torch.randn(rows, 2 * columns)[:, ::2],
        torch.randn(rows, columns + 5)[:, 5:],
        torch.randn(1, columns).expand(rows, columns),
    ]


def close(found: Tensor, a: Tensor, b: Tensor, more: Tensor | float = 0.0) -> None:
    torch.testing.assert_close(found.double(), a.double() @ b.double() + more, atol=2e-5, rtol=2e-5)


def test_products_are_right_however_they_lie_in_memory() -> None:
    torch.manual_seed(0)
    assert N * K * M >= products.LEAST
    for a in [*laid_out(N, K), *laid_out(N, K)]:
        for b in laid_out(K, M):
            close(products.product(a, b), a, b)
            close(products.product(b.t(), a.t()), b.t(), a.t())


@pytest.mark.parametrize("small", [True, False])
def test_biases_and_batches(small: bool) -> None:
    torch.manual_seed(0)
    n = 4 if small else N
    a, b, bias, whole = torch.randn(n, K), torch.randn(K, M), torch.randn(M), torch.randn(n, M)
    close(products.product_with_bias(bias, a, b), a, b, bias.double())
    close(products.product_with_bias(whole, a, b, beta=2, alpha=-1), -a, b, 2 * whole.double())
    many, others = torch.randn(3, n, K), torch.randn(3, K, M)
    close(products.products(many, others), many, others)
    assert products.products(many[:0], others[:0]).shape == (0, n, M)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_other_kinds_of_numbers_are_torch_s(kind: torch.dtype) -> None:
    a, b = (torch.arange(N * K) % 7).view(N, K).to(kind), (torch.arange(K * M) % 5).view(K, M).to(kind)
    assert torch.equal(products.product(a, b), a @ b)


INSIDE = """
import torch
from rlhf import products
torch.manual_seed(0)
layer, x = torch.nn.Linear(160, 96), torch.randn(2, 96, 160, requires_grad=True)
def run():
    layer.zero_grad(); x.grad = None
    out = layer(x); out.square().sum().backward()
    return [out.detach(), x.grad, layer.weight.grad, layer.bias.grad]
before, called, real = run(), [], products._onednn
products.mkl_is_slow = lambda: True
products._onednn = lambda *args: called.append(1) or real(*args)
assert products.use_onednn() and products.use_onednn()
after = run()
assert len(called) == 3, called  # forward, and two gradients
for one, other in zip(before, after): torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
try: torch.mm(torch.ones(2, 3), torch.ones(4, 5))
except RuntimeError: pass
else: raise AssertionError("shapes that don't fit")
products._installed.clear()
"""


def test_a_module_uses_them_in_both_directions() -> None:
    """In a process of its own: what is taken over stays."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", INSIDE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize(
    ("processor", "slow"), [("vendor_id : GenuineIntel", False), ("vendor_id : AuthenticAMD", True)]
)
def test_intel_s_own_are_left_to_mkl(processor: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., str] = lambda *_: processor  # noqa: E731
    monkeypatch.setattr("rlhf.products.Path.read_text", read)
    monkeypatch.setattr("rlhf.products.Path.exists", lambda *_: True)
    monkeypatch.setattr("rlhf.products.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    assert products.mkl_is_slow() is slow
