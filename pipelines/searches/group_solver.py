"""The selection of the group of items that is best together, by the value of each and of all pairs."""

import torch
from torch import Tensor


def group_value(unary: Tensor, pairwise: Tensor, chosen: Tensor, weight: float) -> Tensor:
    """Return `Σ_i u_i + λ Σ_{i<j} b_ij` over a group, which `select_group` maximizes: a scalar, float64.

    Args:
        unary: u, `(N,)`.
        pairwise: b, `(N, N)`; the mean of `b_ij` and `b_ji` counts, the diagonal does not.
        chosen: `(K,)` different indices.
        weight: λ.
    """
    bonus = pair_bonus(pairwise, weight)[chosen][:, chosen]
    return unary.double().cpu()[chosen].sum() + bonus.sum() / 2


def select_group(unary: Tensor, pairwise: Tensor, count: int, weight: float = 1.5) -> Tensor:
    """Select the K of N items that maximize `Σ u_i y_i + λ Σ_{i<j} b_ij y_i y_j`, y in {0, 1}.

    The problem of group inference, https://arxiv.org/abs/2508.15773, whose released code needs a commercial solver.
    Here the best of N + 1 starts is taken: each single item, grown to K items by the largest gain, and the first K
    items; each is improved by exchanges of two items while one gains. So the group is never worse than the first K
    items; it is the optimum in most cases, not in all.

    Args:
        unary: u, `(N,)`, finite.
        pairwise: b, `(N, N)`, finite; the mean of `b_ij` and `b_ji` counts, the diagonal does not.
        count: K, from 1 to N.
        weight: λ.

    Returns:
        `(K,)` indices on the CPU, ascending. Equal arguments give equal groups; ties go to the earliest start.

    Raises:
        ValueError: For other shapes, an impossible count, or values that are NaN or infinite.
    """
    check_group(unary, pairwise, count)
    gains, bonus = unary.detach().double().cpu(), pair_bonus(pairwise, weight)
    starts = [torch.arange(count), *torch.arange(len(gains))[:, None]]
    groups = [exchanged(grown(start, gains, bonus, count), gains, bonus) for start in starts]
    values = torch.stack([gains[group].sum() + bonus[group][:, group].sum() / 2 for group in groups])
    return groups[int(values.argmax())].sort().values


def check_group(unary: Tensor, pairwise: Tensor, count: int) -> None:
    """Raise `ValueError` for other shapes, an impossible count, or values that are not finite."""
    size = len(unary) if unary.ndim == 1 else 0
    if not size or pairwise.shape != (size, size):
        raise ValueError(
            f"Expected `unary` of shape (N,) and `pairwise` of shape (N, N), but got {tuple(unary.shape)} and "
            f"{tuple(pairwise.shape)}."
        )
    if not 1 <= count <= size:
        raise ValueError(f"Expected to choose from 1 to {size} of {size} candidates, but got {count}. Draw more.")
    if not (unary.isfinite().all() and pairwise.isfinite().all()):
        raise ValueError("Expected finite values of the candidates and of their pairs, but some are NaN or infinite.")


def pair_bonus(pairwise: Tensor, weight: float) -> Tensor:
    """Return `λ·b`, symmetric and 0 on the diagonal, float64 on the CPU."""
    bonus = pairwise.detach().double().cpu() * weight
    return ((bonus + bonus.mT) / 2).fill_diagonal_(0)


def grown(group: Tensor, gains: Tensor, bonus: Tensor, count: int) -> Tensor:
    """Add the item with the largest gain until the group has `count` items."""
    while len(group) < count:
        added = gains + bonus[:, group].sum(1)
        added[group] = -torch.inf
        group = torch.cat([group, added.argmax()[None]])
    return group


def exchanged(group: Tensor, gains: Tensor, bonus: Tensor) -> Tensor:
    """Exchange two items, the pair that gains the most, until none gains."""
    group = group.clone()
    rounding = 1e-12 * float(gains.abs().max() + bonus.abs().sum(1).max())  # a smaller gain could cycle
    while True:
        added = gains + bonus[:, group].sum(1)
        change = added - added[group][:, None] - bonus[group]  # of each member (K) for each item (N)
        change[:, group] = -torch.inf
        member, item = divmod(int(change.argmax()), len(gains))
        if not change[member, item] > rounding:
            return group
        group[member] = item
