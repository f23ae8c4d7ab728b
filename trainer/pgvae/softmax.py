"""The multinomial likelihood over a sample of the catalogue, with its gradient in few passes over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# oneDNN keeps what it made for each shape of a product in bfloat16, a megabyte and more: few shapes must occur.
_COLUMNS = 256


class SampledSoftmax(torch.autograd.Function):
    """Gives -sum_t weight_t · log softmax(x · items^T + bias)[row_t, column_t], a scalar in nats.

    `x` [U, Z], `items` [C, Z], `bias` [C]; `row`, `column`, `weight` [T], each (row, column) at most once. The
    gradient with respect to the logits, weight_u · softmax - target, is made in the forward pass, in the place of the
    logits: PyTorch's own would pass ten times over [U, C]. With `use_bfloat16` the three products are in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        items: Tensor,
        bias: Tensor,
        row: Tensor,
        column: Tensor,
        weight: Tensor,
        use_bfloat16: bool,
    ) -> Tensor:
        """Gives the loss, and keeps the gradient of the logits."""
        column_count = len(items)
        if use_bfloat16:
            spare = -column_count % _COLUMNS
            x, items = x.bfloat16(), pad(items.bfloat16(), (0, 0, 0, spare))
            bias = pad(bias, (0, spare), value=-torch.inf)
        logits = (x @ items.T).float()
        logits += bias
        place = row * logits.shape[1] + column
        wanted = logits.view(-1)[place]
        peak = logits.amax(dim=1, keepdim=True)
        logits.sub_(peak).exp_()
        total = logits.sum(dim=1)
        evidence = torch.log(total) + peak[:, 0]
        loss = (weight * (evidence[row] - wanted)).sum()
        user_weight = torch.zeros_like(total).index_add_(0, row, weight)
        gradient = logits.mul_((user_weight / total)[:, None])
        gradient.view(-1)[place] -= weight
        ctx.save_for_backward(x, items, gradient.to(x.dtype), gradient.sum(dim=0))
        ctx.candidates = column_count
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients of x, items and bias."""
        x, items, gradient, of_bias = ctx.saved_tensors
        scale, count = outputs[0], ctx.candidates
        return (
            (gradient @ items).float() * scale,
            (gradient.T @ x)[:count].float() * scale,
            of_bias[:count] * scale,
            None,
            None,
            None,
            None,
        )
