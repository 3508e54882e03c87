"""LPIPS by its package, and the file with which `tests/rewards/features/test_lpips_features.py` compares ours.

torchvision must not be installed beside the tests (see CONTRIBUTING.md), so this runs in an environment of its own:

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 transformers==5.23.0 numpy scipy tqdm pillow
    oracle/bin/pip install --no-deps lpips==0.1.4 torchvision==0.28.0
    PYTHONPATH=src oracle/bin/python tests/oracles/lpips_distance.py tests/rewards/features/data/lpips.safetensors

The wheel has the published linear layers. The trunks are random: their weights are on pytorch.org. It prints the
largest differences of distances and gradients, raises if they are more than rounding, and writes for the AlexNet the
activations `layer.N` of three images, the published weights of the channels `weight.N`, and the package's `distances`.
"""
# pyright: reportMissingImports=false

import sys
import warnings
from typing import Any

import torch
from safetensors.torch import save_file

# The wheel of torchvision that pip finds is built for CUDA, and beside a CPU torch two operators are missing at import.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, operator):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lpips  # noqa: E402

from noiseopt.rewards import LPIPSAlexFeatures, LPIPSFeatures, PairwiseDistance  # noqa: E402

SIZES = [(64, 64), (40, 33), (57, 96)]


def random_images(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(seed))


def package_model(net: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        return lpips.LPIPS(pretrained=True, pnet_rand=True, net=net, verbose=False)


def by_package(model: Any, images: torch.Tensor) -> torch.Tensor:
    """(N, N), one pair at a time."""
    rows = [[model(a[None], b[None], normalize=True).squeeze() for b in images] for a in images]
    return torch.stack([torch.stack(row) for row in rows])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(features: LPIPSFeatures, model: Any, height: int, width: int) -> tuple[float, float]:
    """The differences of the distances of three images and of the gradient of their sum.

    In float64: in float32 the order of sums decides which of two equal activations a pooling takes.
    What is left is the 1e-10 that the package adds to norms, where ours are at least that.
    """
    images, distance = random_images(height, width).double().requires_grad_(), PairwiseDistance(features)
    ours, theirs = distance(images), by_package(model, images)
    pairs = torch.triu_indices(3, 3, offset=1).unbind()
    gradients = [torch.autograd.grad(values[pairs].sum(), images)[0] for values in (ours, theirs)]
    return difference(ours, theirs), difference(*gradients)


def record(model: Any) -> dict[str, torch.Tensor]:
    images = random_images(40, 33, seed=1)
    layers = model.net(model.scaling_layer(2 * images - 1))
    weights = [lin.model[-1].weight for lin in model.lins]
    found = {f"layer.{index}": layer for index, layer in enumerate(layers)}
    found |= {f"weight.{index}": weight for index, weight in enumerate(weights)}
    return {"distances": by_package(model, images), "images": images, **found}


if __name__ == "__main__":
    for entry in (LPIPSFeatures, LPIPSAlexFeatures):
        model = package_model(entry.net)
        features = entry(model.double())
        assert sum(parameter.numel() for parameter in features.parameters()) == entry.parameter_count
        for size in SIZES:
            value, gradient = compare(features, model, *size)
            print(f"{entry.name} {size}: distances differ by {value:.1e}, gradients by {gradient:.1e}")
            assert value < 1e-8 and gradient < 1e-8
    tensors = {name: tensor.detach().contiguous() for name, tensor in record(package_model("alex")).items()}
    save_file(tensors, sys.argv[1], metadata={"lpips": "0.1.4, weights of its channels: BSD-2-Clause"})
