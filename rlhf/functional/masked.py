"""Reductions that padding never reaches. B rows, T positions; masks are bool [B, T], True counts."""

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """The values in float32, or as they are where they have more digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum of the values that count, a scalar. What stands behind the mask may be anything, NaN too."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values that count, a scalar; 0 where none counts."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of the values that count, float64 [3]: what ranks add up before dividing once."""
    kept = torch.where(mask, values, 0.0).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance from (count, sum, sum of squares)."""
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


def whiten(values: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps) where the mask counts, 0 elsewhere. Shape and dtype of `values`."""
    scaled = (values.double() - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, scaled, 0.0).to(values.dtype)
