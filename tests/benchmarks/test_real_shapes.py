"""The pipelines of published sizes have the published number of parameters, counted on the meta device."""

import pytest
import real_shapes  # pyright: ignore[reportMissingImports]
import torch

COUNTS = {
    "sd_turbo": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl_turbo": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "flux": {
        "transformer": 11_891_178_560,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
}


def modules_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("name", COUNTS)
def test_parts_have_the_published_number_of_parameters(name):
    parts = modules_of(getattr(real_shapes, name)(torch.bfloat16, "meta", text_encoders=True))
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == COUNTS[name]
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", COUNTS)
def test_embeddings_and_the_tiny_decoder_fit_the_pipeline(name):
    pipe = getattr(real_shapes, name)(torch.float32, "meta")
    assert modules_of(pipe).keys() == COUNTS[name].keys() - {"text_encoder", "text_encoder_2"}
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    width = denoiser.config.get("cross_attention_dim") or denoiser.config.joint_attention_dim
    prompts = real_shapes.embeddings(pipe, 2)
    assert prompts["prompt_embeds"].shape[::2] == (2, width)
    latents = torch.empty(1, pipe.vae.config.latent_channels, 4, 4, device="meta")
    for decoder in (pipe.vae, real_shapes.tiny_decoder(pipe)):
        assert decoder.decode(latents, return_dict=False)[0].shape == (1, 3, 32, 32)
