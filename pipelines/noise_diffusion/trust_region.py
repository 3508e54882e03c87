"""A limit of the step γ for each image, by the measured against the predicted gain of its last step."""

import torch

BAD, GOOD = 0.25, 0.75  # of the predicted gain
GROWTH, SHRINKAGE = 4.0, 4.0**-0.25  # of γ; of its root, the length of the step, 2 and 2^(−1/4)


class TrustRegion:
    """The largest γ in which the gradient is trusted to tell the gain, for each image.

    As in trust region methods (Conn, Gould and Toint, 2000, https://doi.org/10.1137/1.9780898719857, chapter 6), the
    radius grows if the measured gain is more than 3/4 of the predicted one, ⟨∇s, v⟩ with v the whole change of the
    noise, its shrinking included; it shrinks if it is less than 1/4, or no gain. A step is shrunk by a fourth of its
    growth, in logarithms, since much of a gain is the luck of the candidate: where nothing is predicted this is the 1/5
    success rule of evolution strategies, by whose rate of success the two cancel.

    A gradient with the outputs of the denoiser held constant is that of another function, and predicts gains up to a
    factor. It is taken to be the mean size of the measured gains over that of the predicted ones, both relative to the
    length of the step √γ.

    Args:
        like: A tensor `(B,)`.
        radius: The first radius, in (0, 1].
        true: Whether the gradient is that of the score itself, so that the factor is 1.

    Attributes:
        radius, gamma, predicted: `(B,)`: the radius, and γ and ⟨∇s, v⟩ of the last step.
    """

    def __init__(self, like: torch.Tensor, radius: float, true: bool) -> None:
        self.radius, self.true = torch.full_like(like, radius), true
        self.gamma = self.predicted = torch.zeros_like(like)
        self.measured_sizes = self.predicted_sizes = torch.zeros_like(like)

    def expect(self, gamma: torch.Tensor, predicted: torch.Tensor) -> None:
        """Remember a step γ and its predicted gain, both `(B,)`."""
        self.gamma, self.predicted = gamma, predicted

    def learn(self, gain: torch.Tensor) -> None:
        """Adapt the radius to the measured gain `(B,)` of the last step; not where nothing moved."""
        tried = (self.gamma > 0) & gain.isfinite()
        length = self.gamma.sqrt()
        self.measured_sizes = self.measured_sizes + torch.where(tried, gain.abs() / length, 0)
        self.predicted_sizes = self.predicted_sizes + torch.where(tried, self.predicted.abs() / length, 0)
        expected = self.expected_gain()
        good, bad = gain > (GOOD * expected).clamp_min(0), gain <= (BAD * expected).clamp_min(0)
        grown, shrunk = torch.maximum(self.radius, GROWTH * self.gamma).clamp(max=1), SHRINKAGE * self.gamma
        radius = torch.where(good, grown, torch.where(bad, shrunk, self.radius))
        self.radius = torch.where(tried, radius, self.radius)

    def expected_gain(self) -> torch.Tensor:
        """Return the gain that the last step was predicted to have, `(B,)`, in the units of the score."""
        if self.true:
            return self.predicted
        tiny = torch.finfo(self.predicted.dtype).tiny
        return self.predicted / self.predicted_sizes.clamp_min(tiny) * self.measured_sizes
