"""Features whose squared L2 distance is LPIPS. Requires the package `lpips`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.transforms import at_least_float32
from .features import Features, check_no_checkpoint, import_optional, register_features


@register_features("lpips")
class LPIPSFeatures(Features):
    """LPIPS with VGG, which its authors recommend as a loss: https://arxiv.org/abs/1801.03924.

    LPIPS of two images is the sum over layers l of the mean over positions of `Σ_c w_lc (f̂a_lc − f̂b_lc)²`, where f̂ are
    the activations normalized over channels and w ≥ 0. This is the squared L2 distance of vectors with the entries
    `√(w_lc / (H_l W_l)) f̂_lc`, which are the features here. So all distances between N and M images need N + M forward
    passes instead of N M. The dimension grows with the image (32 million, 130 MB, for 512 × 512), and only images of
    the same size can be compared.

    Args:
        model: An `lpips.LPIPS` with linear layers (`lpips=True`, the default) of non-negative weights.

    Raises:
        ValueError: If the model has negative weights, because then its values are not distances.
    """

    name = "lpips"
    metric = "squared_l2"
    license = "bsd-2-clause (layers; torchvision's trunk: bsd-3-clause)"
    package = "lpips"
    parameter_count = 14_716_160
    net = "vgg"
    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        lowest = min(weight.min().item() for weight in self.channel_weights())
        if lowest < 0:
            raise ValueError(
                f"Expected LPIPS with non-negative channel weights, but got {lowest:.3g}. Use the published "
                "`lpips.LPIPS(pretrained=True)`."
            )

    def channel_weights(self) -> list[Tensor]:
        """Return the channel weights (1, C, 1, 1) of each layer."""
        lins: Any = self.model.lins
        return [at_least_float32(lin.model[-1].weight) for lin in lins]

    def encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        pixels = 2 * images - 1
        # Version 0.0 was trained without the normalization of the trunk's own training.
        pixels = pixels if getattr(model, "version", "0.1") == "0.0" else model.scaling_layer(pixels)
        activations = model.net(pixels.to(self.dtype))
        layers = []
        for activation, weight in zip(activations, self.channel_weights(), strict=True):
            unit = F.normalize(at_least_float32(activation), dim=1, eps=1e-10)
            layers.append((unit * (weight / unit[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(layers, 1)

    @classmethod
    def load(cls, checkpoint: str | None, hub: dict[str, Any]) -> "LPIPSFeatures":
        """Load the package's model, whose trunk torchvision downloads from pytorch.org to torch's own cache."""
        check_no_checkpoint(cls, checkpoint)
        return cls(import_optional("lpips").LPIPS(net=cls.net, verbose=False))


@register_features("lpips_alex")
class LPIPSAlexFeatures(LPIPSFeatures):
    """LPIPS with AlexNet, which its authors recommend as a metric."""

    name = "lpips_alex"
    parameter_count = 2_470_848
    net = "alex"
