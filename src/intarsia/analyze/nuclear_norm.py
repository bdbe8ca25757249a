"""Matrix nuclear-norm (MNN): how spread out the hidden states of a text are, without a decomposition, and the entropy beside it.

Li et al. 2024, "Large Language Model Evaluation via Matrix Nuclear-Norm", arXiv:2410.10672, sec. 3:

    H <- H - mean over tokens,  each row <- row / ||row||,    MNN = (1/L) sum of the D largest ||H[:, j]||,  D = min(L, d)

For every matrix ||H||_* <= sum_j ||H[:, j]|| over all columns, with equality where these are orthogonal: O(L d) in place of a
singular value decomposition. The score of a data set is the mean over its texts. As the authors' code does, the sum is divided by
the number of tokens. Use it to compare a base with adapted models on the same texts.

L tokens of one text, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError


def matrix_nuclear_norm(H: Tensor, *, columns: int | None = None) -> float:
    """MNN of the hidden states of one text, H (L, d); 0 for a text of one token, of which centring leaves nothing.

    Args:
        columns: D, how many of the largest columns to take; by default min(L, d). With d, L times the value is never below the
            nuclear norm of the centred, normalised H.

    Raises:
        IntarsiaError: for what is no matrix, no tokens, or numbers that are not finite.
    """
    H = _normalised(_checked(H), centre=True)
    L, d = H.shape
    D = min(L, d) if columns is None else columns
    if not 1 <= D <= d:
        raise IntarsiaError(f"columns={columns!r}; expected 1 to {d}")
    lengths: Tensor = torch.linalg.vector_norm(H, dim=0)
    return float(lengths.topk(D).values.double().sum()) / L


def matrix_entropy(H: Tensor) -> float:
    """Entropy of the eigenvalues of A / tr(A), A = Z^T Z / L with Z the rows of H normalised, divided by log d: 0..1.

    The measure that MNN stands in for: O(d^3). H (L, d), d > 1. Raises IntarsiaError as :func:`matrix_nuclear_norm` does.
    """
    Z = _normalised(_checked(H), centre=False).double()
    L, d = Z.shape
    if d < 2:
        raise IntarsiaError("the entropy of states of width 1 means nothing; expected a width of 2 or more")
    # Z^T Z and Z Z^T have the same eigenvalues but for zeros, which add nothing to the entropy.
    A = (Z.mT @ Z if d <= L else Z @ Z.mT) / L
    trace = A.trace()
    if not trace > 0:
        return 0.0
    e = torch.linalg.eigvalsh(A / trace)
    e = e[e > 0]
    return max(0.0, float(-(e * e.log()).sum()) / math.log(d))


def _checked(H: Tensor) -> Tensor:
    if H.ndim != 2 or not H.numel():
        raise IntarsiaError(f"hidden states are {tuple(H.shape)}; expected (tokens, width) of one text")
    if not bool(H.isfinite().all()):
        raise IntarsiaError("hidden states have numbers that are not finite")
    return H.detach().to(torch.promote_types(H.dtype, torch.float32))


def _normalised(H: Tensor, centre: bool) -> Tensor:
    """Rows of length 1; those that are zero, or zero but for the rounding of the mean, become zero."""
    least = H.abs().amax() * torch.finfo(H.dtype).eps * 4
    H = H - H.mean(dim=0) if centre else H
    lengths: Tensor = torch.linalg.vector_norm(H, dim=1, keepdim=True)
    return torch.where(lengths > least, H / lengths.clamp_min(torch.finfo(H.dtype).tiny), torch.zeros_like(H))


@torch.no_grad()
def hidden_states(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    """The last hidden states of every text, one (L, d) a text, without padding; the model's mode is as before.

    For MNN take them as they are; for RankMe of texts the mean of each: ``torch.stack([H.mean(0) for H in hidden_states(...)])``.

    Raises:
        IntarsiaError: for a model that does not tell its hidden states.
    """
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
            if not states:
                raise IntarsiaError(
                    f"{type(model).__name__} does not tell its hidden states (output_hidden_states=True)"
                )
            H = states[-1]
            mask = inputs.get("attention_mask", torch.ones(H.shape[:2], dtype=torch.int64)).bool()
            yield from (one[kept] for one, kept in zip(H, mask, strict=True))
    finally:
        model.train(training)
