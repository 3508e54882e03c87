"""The weights of open_clip under transformers' names, key by key."""

import pytest
import torch
from tiny_clip_rewards import build_clip, open_clip_state

from noiseopt.rewards.preference.open_clip import clip_model_from_open_clip, clip_state_from_open_clip


def test_every_key_becomes_the_one_it_was_made_of():
    """`open_clip_state` is the conversion the other way round, written by itself."""
    model = build_clip()
    converted = clip_state_from_open_clip(open_clip_state(model), "x.pt")
    assert converted.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(converted[key], value), key


def test_the_buffer_of_older_versions_is_left_out():
    state = open_clip_state(build_clip()) | {"attn_mask": torch.zeros(16, 16)}
    assert "attn_mask" not in clip_state_from_open_clip(state, "x.pt")


@pytest.mark.parametrize(
    "key",
    [
        "visual.attn_pool.query",
        "visual.trunk.blocks.0.norm1.weight",
        "transformer.resblocks.0.ls_1.gamma",
        "transformer.resblocks.0.mlp.c_gate.weight",
        "visual.transformer.resblocks.0.attn.in_proj_scale",
        "logit_bias",
        "module.logit_scale",
    ],
)
def test_a_key_of_another_architecture_is_refused_by_name(key: str):
    state = open_clip_state(build_clip()) | {key: torch.ones(3)}
    with pytest.raises(
        ValueError, match=f"Expected x.pt to hold the weights of an open_clip .*, but got the key '{key}'"
    ):
        clip_state_from_open_clip(state, "x.pt")


def test_missing_keys_and_other_shapes_are_refused_by_name():
    model = build_clip()
    state = open_clip_state(model)
    del state["visual.ln_post.bias"], state["transformer.resblocks.1.attn.in_proj_weight"]
    state["text_projection"] = torch.ones(32, 8)
    with pytest.raises(
        ValueError,
        match=r"of CLIPModel, but missing: text_model.encoder.layers.1.self_attn.k_proj.weight, .*"
        r"vision_model.post_layernorm.bias; of another shape: text_projection.weight \(8, 32\) for \(16, 32\)",
    ):
        clip_model_from_open_clip(state, model.config, "x.pt")
    state = open_clip_state(model)
    state |= {key.replace("resblocks.1", "resblocks.2"): value for key, value in state.items()}
    with pytest.raises(ValueError, match="unexpected: text_model.encoder.layers.2"):
        clip_model_from_open_clip(state, model.config, "x.pt")


def test_the_model_is_whole_in_float32_and_of_the_weights_it_was_given():
    model = build_clip()
    state = {key: value.half() for key, value in open_clip_state(model).items()}
    converted = clip_model_from_open_clip(state, model.config, "x.pt")
    assert not converted.training
    rounded, found = model.half().float().state_dict(), converted.state_dict()
    for key, value in rounded.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value), key
    # Buffers that no checkpoint has are made too, although the model was first built without storage.
    for name, buffer in converted.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_float32_weights_are_taken_over_without_a_copy():
    model = build_clip()
    state = open_clip_state(model)
    converted = clip_model_from_open_clip(state, model.config, "x.pt")
    taken = converted.text_model.embeddings.token_embedding.weight
    assert taken.data_ptr() == state["token_embedding.weight"].data_ptr()
