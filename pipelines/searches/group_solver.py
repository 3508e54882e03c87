"""Which items of many make the best group: each by itself, and all pairs of them."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_LIMIT = 1_000_000  # groups that are counted through
HEADS_AT_ONCE = 4096


def group_value(unary: Tensor, pairwise: Tensor, chosen: Tensor, weight: float) -> Tensor:
    """`Σ_i u_i + λ Σ_{i<j} b_ij` over the items of a group: what `select_group` maximises, a scalar, float64.

    Args:
        unary: u, `(N,)`.
        pairwise: b, `(N, N)`, of which the mean of `b_ij` and `b_ji` counts, and the diagonal does not.
        chosen: `(K,)` indices, each once.
        weight: λ.
    """
    bonus = pair_bonus(pairwise, weight)[chosen][:, chosen]
    return unary.double().cpu()[chosen].sum() + bonus.sum() / 2


def select_group(
    unary: Tensor, pairwise: Tensor, count: int, weight: float = 1.5, restarts: int = 10, seed: int = 0
) -> Tensor:
    """The K of N items that maximise `Σ u_i y_i + λ Σ_{i<j} b_ij y_i y_j`, y in {0, 1}, as group inference asks for.

    https://arxiv.org/abs/2508.15773, whose released code needs a commercial solver. Exact where there are at most 10⁶
    groups to choose from. Beyond, the best of several starts, each grown to K items by the largest gain and improved by
    the best exchange of two items as long as one gains: the first K items, the best pair, and `restarts` random pairs.
    So it is never worse than the first K items; ten restarts reach the optimum in most cases, not in all.

    Args:
        unary: u, `(N,)`, finite.
        pairwise: b, `(N, N)`, finite; the mean of `b_ij` and `b_ji` counts, and the diagonal does not.
        count: K, from 1 to N.
        weight: λ.
        restarts: Random starts, where the choice is not exact; at least 0.
        seed: Of these.

    Returns:
        `(K,)` indices on the CPU, ascending. Equal arguments give equal groups.

    Raises:
        ValueError: For other shapes, a count that cannot be had, or values that are NaN or infinite.
    """
    check_group(unary, pairwise, count)
    gains, bonus = unary.detach().double().cpu(), pair_bonus(pairwise, weight)
    if math.comb(len(gains), count) <= EXACT_LIMIT:
        return best_group(gains, bonus, count)
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.arange(count), best_pair(gains, bonus)]
    starts += [torch.randperm(len(gains), generator=generator)[:2] for _ in range(restarts)]
    groups = [exchanged(grown(start[:count], gains, bonus, count), gains, bonus) for start in starts]
    values = torch.stack([gains[group].sum() + bonus[group][:, group].sum() / 2 for group in groups])
    return groups[int(values.argmax())].sort().values


def check_group(unary: Tensor, pairwise: Tensor, count: int) -> None:
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
    """`λ·b`, symmetric and 0 on the diagonal, float64 on the CPU."""
    bonus = pairwise.detach().double().cpu() * weight
    return ((bonus + bonus.mT) / 2).fill_diagonal_(0)


def best_group(gains: Tensor, bonus: Tensor, count: int) -> Tensor:
    """The best group of all; of equals the first in the order of `itertools.combinations`.

    Large groups are told by what is left out, which is a problem of the same form: the value is that of all items, less
    each one's gain and its bonus with all others, plus the bonus of the pairs that were subtracted twice.
    """
    size = len(gains)
    if count == size:
        return torch.arange(size)
    if 2 * count > size:
        left_out = best_group(-(gains + bonus.sum(1)), bonus, size - count)
        kept = torch.ones(size, dtype=torch.bool)
        kept[left_out] = False
        return kept.nonzero().flatten()
    best, chosen = -torch.inf, torch.arange(count)
    heads = itertools.combinations(range(size), count - 1)
    while block := list(itertools.islice(heads, HEADS_AT_ONCE)):
        value, group = best_of_heads(gains, bonus, torch.tensor(block, dtype=torch.long))
        if value > best:
            best, chosen = value, group
    return chosen


def best_of_heads(gains: Tensor, bonus: Tensor, heads: Tensor) -> tuple[float, Tensor]:
    """The best group that begins with one of the `(M, K - 1)` ascending heads and ends with an item after it."""
    size = len(gains)
    members = torch.zeros(len(heads), size, dtype=gains.dtype).scatter_(1, heads, 1.0)
    added = gains + members @ bonus
    values = (members * (gains + added)).sum(1) / 2
    last = F.pad(heads, (1, 0), value=-1)[:, -1:]
    totals = (values[:, None] + added).where(torch.arange(size) > last, -torch.inf)
    index = int(totals.argmax())
    head, item = divmod(index, size)
    return float(totals[head, item]), torch.cat([heads[head], torch.tensor([item])])


def best_pair(gains: Tensor, bonus: Tensor) -> Tensor:
    """`(2,)`: the two items that are best together."""
    values = (gains[:, None] + gains + bonus).triu(1) + torch.full_like(bonus, -torch.inf).tril()
    return torch.tensor(divmod(int(values.argmax()), len(gains)))


def grown(group: Tensor, gains: Tensor, bonus: Tensor, count: int) -> Tensor:
    """A group with the item of the largest gain added, again and again, until it has `count`."""
    while len(group) < count:
        added = gains + bonus[:, group].sum(1)
        added[group] = -torch.inf
        group = torch.cat([group, added.argmax()[None]])
    return group


def exchanged(group: Tensor, gains: Tensor, bonus: Tensor) -> Tensor:
    """A group after the exchange of two items that gains the most, again and again, while one gains."""
    group = group.clone()
    rounding = 1e-12 * float(gains.abs().max() + bonus.abs().sum(1).max())  # less than this is no gain: it would cycle
    while True:
        added = gains + bonus[:, group].sum(1)
        change = added - added[group][:, None] - bonus[group]  # of one of the group (K) against each item (N)
        change[:, group] = -torch.inf
        place, item = divmod(int(change.argmax()), len(gains))
        if not change[place, item] > rounding:
            return group
        group[place] = item
