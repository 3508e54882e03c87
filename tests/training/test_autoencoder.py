"""The autoencoder: its windows, and the normalization of its latents."""

import argparse
import random

import torch

from noiseopt import shapes_world
from training import autoencoder
from training.data import sample_pictures


@torch.no_grad()
def test_normalized_latents_have_zero_mean_and_unit_covariance(tmp_path):
    raw = autoencoder.new_vae().eval()
    torch.save({"average": raw.state_dict()}, tmp_path / "vae.pt")
    vae = autoencoder.normalized(argparse.Namespace(output=tmp_path, device="cpu"), count=100)
    rng = random.Random(1)
    scenes, looks, _ = sample_pictures([shapes_world.captions.sample_request(rng) for _ in range(100)], rng)
    images = shapes_world.render(scenes, torch.Generator().manual_seed(1), looks, 128) * 2 - 1
    z = vae.encoder(images).movedim(1, -1).flatten(0, 2)
    assert z.mean(0).abs().max() < 0.3
    assert (z.T.cov() - torch.eye(4)).abs().max() < 0.4
    inside = slice(1, -1)
    small, first = raw.encoder(images), raw.decoder.layers[0]
    same = vae.decoder.layers[0](vae.encoder(images))
    torch.testing.assert_close(same[..., inside, inside], first(small)[..., inside, inside], atol=1e-3, rtol=1e-3)


def test_windows_are_cut_where_shapes_are():
    images = torch.zeros(64, 3, 128, 128, dtype=torch.uint8)
    images[:, :, 96:, 96:] = 200
    masks = images[:, :1]
    cut = autoencoder.crops(images, masks, 64)
    assert cut.shape == (64, 3, 64, 64)
    assert (cut.flatten(1).amax(1) == 200).float().mean() > 0.7
