"""The head in the dtype that trains, held against float64.

The whole model is proved in its weights' own dtype (proof.py), and in half precision the head goes
another way: products rounded or written in fp32, sums in blocks, gradients added where they lie.
That way is gone once at start, on random hidden states and some of the model's own words. Where it
is wrong the head is read in fp32, which takes a second pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.models.head import adjusted, in_one_pass, linear_logps
from upweight.models.load import LanguageModel

SCALES = (1.0, 1.0, 1.0, 1.0, 1.0, 30.0, 30.0, 30.0)
"""The spread of each row's logits: of the last, exponentials would overflow."""

WORDS = 1100
"""Of the vocabulary at most, evenly spaced: two blocks of a row's sum, and what is left over."""

CUT = (3, 5)
"""Rows of a chunk, and rows that are kept for the backward pass: of eight some are made again."""


def head_is_right(lm: LanguageModel) -> bool:
    """Whether log-probs and gradients in the compute dtype are as near as its rounding lets them.

    A product and an exponential are each rounded by up to u of themselves (eps / 2), the exponent
    twice where it is shifted, and each word's on its own: log p, a mean over words by their
    probabilities, moves by 5 u sqrt(sum p^2 (|x - x_y| + 1)^2) at six standard deviations, and by u
    at most where a block's sum is rounded. Gradients, of rows of spread 1, go through three
    roundings, and are differences of terms as large as the words' own vectors.
    """
    if not in_one_pass(lm):
        return True
    head = lm.causal.get_output_embeddings()
    assert head is not None
    weight, bias = head.weight, dict(head.named_parameters()).get("bias")
    assert isinstance(weight, Tensor)
    dtype = lm.compute_dtype if weight.dtype == torch.float32 else weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    words = torch.arange(0, len(weight), -(-len(weight) // WORDS), device=weight.device)
    some = [weight.detach()[words].to(dtype)]
    some += [] if bias is None else [bias.detach()[words].float()]
    hidden, targets = _asked(some[0])
    config, unit = lm.causal.config, torch.finfo(dtype).eps / 2

    ours = [x.requires_grad_() for x in (hidden.float(), some[0].float(), *some[1:])]
    got = linear_logps(
        ours[0], ours[1], ours[2] if bias is not None else None, targets,
        config=config, dtype=dtype, cut=CUT,
    )  # fmt: skip
    theirs = [x.detach().double().requires_grad_() for x in ours]
    product = theirs[0] @ theirs[1].T
    table = adjusted(product, theirs[2] if bias is not None else None, config).log_softmax(-1)
    wanted = table.gather(1, targets[:, None])[:, 0]

    away = (product - product.gather(1, targets[:, None])).abs() + 1
    allowed = unit * (1 + 5 * (table.exp() * away).norm(dim=-1))
    if not bool(((got - wanted).abs() <= allowed).all()):
        return False
    slope = (torch.tensor(SCALES, device=got.device) == 1.0).double()
    found = torch.autograd.grad(got, ours, slope.to(got.dtype))
    exact = torch.autograd.grad(wanted, theirs, slope)
    sizes = [x.norm() for x in exact]
    sizes[0] = sizes[0] + (slope[:, None] * theirs[1][targets]).norm()
    off = [(f - e).norm() / size for f, e, size in zip(found, exact, sizes, strict=True)]
    return bool(torch.stack(off).max() <= 5 * unit)


def _asked(
    weight: Float[Tensor, "words width"],
) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " rows"]]:
    """Hidden states whose logits have the spreads of SCALES, in the weight's dtype; some targets
    are the same word."""
    generator = torch.Generator().manual_seed(0)
    rows, (words, width) = len(SCALES), weight.shape
    normal = torch.randn(rows, width, generator=generator)
    targets = torch.randint(0, words, (rows,), generator=generator)
    targets[1] = targets[0]
    size = weight.float().norm(dim=-1).mean()
    scaled = (normal * torch.tensor(SCALES)[:, None]).to(weight.device) / size
    return scaled.to(weight.dtype), targets.to(weight.device)
