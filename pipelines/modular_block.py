"""A block of modular pipelines that optimizes the initial noise."""

import copy
import inspect
import re
from typing import Any, ClassVar, get_type_hints

import torch

from ..private_names import blocks_of, input_param, is_modular, output_param, with_blocks
from .hook import optimize_noise
from .method_mixin import MethodMixin, merged_settings
from .modular import as_standard, copied, inputs_of, split_at_latents

COMMON = {
    "method_kwargs": "Settings of the method, by name.",
    "noise_sampler": 'The distribution of the initial noise, such as "pink".',
    "reward_prompt": "The prompt that rewards are asked about instead of the prompt of the call.",
}


class NoiseBlock:
    """Base class of blocks that find the initial noise, to run before a modular pipeline draws its latents.

    `class CNOBlock(NoiseBlock, ModularPipelineBlocks)` with a `mixin` is a block of that method, whose inputs are the
    arguments of the pipeline classes of the method. Its outputs are `latents`, which the pipeline then starts from, and
    `noise_result`.

        pipe = block.into(pipe)
        images = pipe(prompt="a cat", num_images_per_prompt=4, output="images")
    """

    mixin: ClassVar[type[MethodMixin]]

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.mixin) or "").partition("\n")[0]

    @property
    def inputs(self) -> list[Any]:
        texts, hints = argument_texts(self.mixin), get_type_hints(self.mixin.own_method)
        own = [input_param(name, hints[name], texts[name]) for name in self.mixin.own_arguments]
        return [*own, *(input_param(name, None, text) for name, text in COMMON.items())]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [
            output_param("latents", torch.Tensor, "The latents of the noise that was found."),
            output_param("noise_result", None, "The `NoiseResult`: noise, scores, and how it was found."),
        ]

    def into(self, pipe: Any, **inputs: Any) -> Any:
        """Return a modular pipeline with the same components and this block before the one that draws the latents.

        Args:
            pipe: A loaded modular pipeline.
            inputs: Names of inputs that choose other blocks than those from text to image, with any value.

        Raises:
            TypeError: For anything else, or blocks that draw no latents.
        """
        if not is_modular(pipe):
            raise TypeError(
                f"Expected a loaded modular pipeline, but got {type(pipe).__name__}. Load it with "
                "`ModularPipeline.from_pretrained(...)`, or use `optimize_noise(pipe, ...)`, which takes any pipeline."
            )
        blocks = copy.deepcopy(blocks_of(pipe)).get_execution_blocks(**(inputs or {"prompt": True}))
        leaves = list(blocks.sub_blocks.values())
        before, _, _ = split_at_latents(leaves, type(pipe).__name__)
        blocks.sub_blocks.insert("optimize_noise", self, len(before))
        return with_blocks(pipe, blocks)

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Find the noise of the call in progress."""
        arguments = {name: state.get(name) for name in self.mixin.own_arguments if state.get(name) is not None}
        method = self.mixin.method_of(merged_settings(arguments, state.get("method_kwargs")))
        if method is not None:
            self.find(components, state, method)
        return components, state

    def find(self, components: Any, state: Any, method: Any) -> None:
        """Optimize the noise from the state, and let the pipeline go on from it."""
        pipe = as_standard(with_blocks(components, self.others(components, state)))
        given = copied(state)
        given.parts = split_at_latents(list(blocks_of(pipe).sub_blocks.values()), type(pipe).__name__)
        vars(pipe)["_given_state"] = given
        request = {each.name: state.get(each.name) for each in inputs_of(pipe)}
        request = {name: value for name, value in request.items() if value is not None}
        ours = {name: state.get(name) for name in ("noise_sampler", "reward_prompt")}
        result = optimize_noise(pipe, request.pop("prompt", None), method, **ours, **request)
        state.values.update(latents=result.latents, noise_result=result)
        state.values["generator"] = advanced(state.get("generator"), result.generator())

    def others(self, components: Any, state: Any) -> Any:
        """Return the blocks of the call in progress without those of this kind."""
        given = {name: value for name, value in state.values.items() if value is not None}
        blocks = blocks_of(components).get_execution_blocks(**given)
        for name in [name for name, block in blocks.sub_blocks.items() if isinstance(block, NoiseBlock)]:
            del blocks.sub_blocks[name]
        return blocks


def advanced(generator: Any, found: Any) -> Any:
    """Let the generator of a call go on from the state of another, or return that if the call has none."""
    if generator is None:
        return found
    own, others = (each if isinstance(each, list) else [each] for each in (generator, found))
    for stream, other in zip(own, others, strict=True):
        stream.set_state(other.get_state())
    return generator


def argument_texts(mixin: type[MethodMixin]) -> dict[str, str]:
    """Return the descriptions of the arguments in the docstring of a mixin."""
    section = (inspect.getdoc(mixin) or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*\n?(?:     +.*\n?)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
