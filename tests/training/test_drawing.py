"""The gallery of the generators is kept in a file for each."""

import torch

from training.drawing import drawn


def test_images_of_all_files_are_read_in_the_order_of_their_names(tmp_path):
    images, prompts = drawn(tmp_path)
    assert images.shape == (0, 3, 128, 128) and prompts == []
    for value, name in enumerate(("b", "a")):
        part = {"images": torch.full((2, 3, 128, 128), value, dtype=torch.uint8), "prompts": [name] * 2}
        torch.save(part, tmp_path / f"gallery_{name}.pt")
    images, prompts = drawn(tmp_path)
    assert prompts == ["a", "a", "b", "b"] and images[:, 0, 0, 0].tolist() == [1, 1, 0, 0]
