"""Result of an optimization: noise, scores and provenance."""

import base64
import dataclasses
import html
import io
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ...frames import as_strips
from ...shown_text import shown
from .pipeline_description import describe_pipeline
from .result_file import (
    LATER_TENSORS,
    PER_PROGRESS,
    PER_SCORE,
    PER_STREAM,
    RESULT_TENSORS,
    read_result_file,
    write_result_file,
)
from .settings_diff import settings_diff


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """The state in which a run was interrupted, for `resume_from`.

    Attributes:
        parts: "run" has the state of the run and its method as JSON values, with the names of tensors in their places,
            and "reports" the reports so far.
        tensors: The tensors by name.
    """

    parts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclasses.dataclass(eq=False, repr=False)
class NoiseResult:
    """Result of `optimize_noise` for `B` independent noises.

    `pipe(prompt, latents=result.latents, ...)` with the arguments of the run reproduces the best images. Samplers that
    add noise at each step and pipelines that sample an encoded image also need `generator=result.generator()`.

    Attributes:
        noise: `(B, C, H, W)` float32, unit variance: the best noise, or the last for methods that return it.
        latents: The noise as the pipeline takes it as `latents=`: in its dtype, packed where the family packs.
        scores: Name to `(steps, B)`: each reward at each step, in raw units, higher is better.
        losses: `(steps, B)`, lower is better, without the regularizer. NaN where a sample had stopped.
        norms: `(steps, B)`, ‖noise‖ / √d at each step, about 1 for a Gaussian.
        best_step: `(B,)`, the step whose noise is returned.
        provenance: Model, scheduler, dtype, prompts, seeds, versions, method and its settings as JSON values.
        reports: Reports of callbacks by name, as JSON values; see `HeldOutReward`. After a run with `decoder=` also
            "full_decoder": scores and losses with the pipeline's own decoder, of the baseline (`initial_scores`,
            `initial_loss`) and of the returned noise (`best_scores`, `best_loss`). `scores` and `losses` are then
            approximate: those of the images of the tiny decoder.
        generator_states: Device type and state of each random stream from which a call with `latents` starts.
        initial_noise: `(B, C, H, W)`, the noise of the baseline; `None` in files of versions that did not store it.
        band_changes: `(steps, B, 3)`, the part of ‖noise − initial_noise‖² in the lowest, middle and highest third of
            the radial frequencies at each step; see `frequency_bands`. NaN where a sample had stopped, `None` in files
            of versions that did not store it.
        images: `(B, 3, H, W)` in [0, 1], the images of `noise`, if the run generated them; of videos
            `(B, F, 3, H, W)`, the `frames` that rewards saw. Not saved.
        initial_images: The baseline images. Not saved.
        progress: Where an interrupted run goes on; `None` for a complete one, and for a method whose state cannot be
            stored.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    scores: dict[str, torch.Tensor]
    losses: torch.Tensor
    norms: torch.Tensor
    best_step: torch.Tensor
    provenance: dict[str, Any]
    generator_states: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    initial_noise: torch.Tensor | None = None
    band_changes: torch.Tensor | None = None
    images: torch.Tensor | None = None
    initial_images: torch.Tensor | None = None
    progress: Progress | None = None

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.noise.shape))
        ends = ((name, values.mean(), self.best_scores[name].mean()) for name, values in self.initial_scores.items())
        best = ", ".join(f"{shown(name)} {before:.4g} → {after:.4g}" for name, before, after in ends)
        decoder = self.provenance.get("decoder")
        by = f", by {shown(decoder.get('class'))}" if isinstance(decoder, dict) else ""
        settings = self.provenance.get("settings", {})
        steps, planned = len(self.losses), shown(settings.get("budget") or settings.get("steps"))
        found = f"best of {steps} steps" if self.complete else f"interrupted at step {steps} of {planned}, best"
        return f"NoiseResult({shape}, {found} at {self.best_step.tolist()}: {best}{by})"

    @property
    def complete(self) -> bool:
        """Return whether the run ended as it was asked to: after its steps, or by a callback or a stop rule.

        A run that was interrupted by Ctrl-C or an error, or whose process died, is not complete. Files of versions that
        did not record it count as complete.
        """
        return self.provenance.get("complete", True)

    @property
    def best_scores(self) -> dict[str, torch.Tensor]:
        """Name to `(B,)`: the rewards of the returned noise."""
        return {name: self.at_best(values) for name, values in self.scores.items()}

    @property
    def initial_scores(self) -> dict[str, torch.Tensor]:
        """The rewards of the baseline by name, each `(B,)`."""
        return {name: values[0] for name, values in self.scores.items()}

    @property
    def best_loss(self) -> torch.Tensor:
        """`(B,)`: the loss of the returned noise."""
        return self.at_best(self.losses)

    @property
    def band_shares(self) -> torch.Tensor | None:
        """`(steps, B, 3)`: `band_changes` as shares of their sum; NaN where nothing changed."""
        return None if self.band_changes is None else self.band_changes / self.band_changes.sum(-1, keepdim=True)

    def at_best(self, values: torch.Tensor) -> torch.Tensor:
        return values.gather(0, self.best_step.to(values.device)[None])[0]

    def pil(self) -> list[Image.Image]:
        """Return `images` as PIL images; of each video one with its frames side by side.

        Raises:
            ValueError: If there are none: the method did not generate them, or the result was read from a file.
        """
        if self.images is None:
            raise ValueError(
                "Expected a result with images, but this one has none. Draw them with "
                "`pipe(prompt, latents=result.latents, generator=result.generator(), ...)`."
            )
        return as_pil(self.images)

    def _repr_html_(self) -> str:
        """Return what notebooks show: the images before and after, if the run generated them, and the `repr`."""
        pictures = ""
        if self.images is not None and self.initial_images is not None:
            pairs = zip(as_pil(self.initial_images), as_pil(self.images), strict=True)
            pictures = "".join(f"<p>{html_image(before)} {html_image(after)}</p>" for before, after in pairs)
        return f"<div>{pictures}<code>{html.escape(repr(self))}</code></div>"

    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Return new generators for a call with `latents`; a list if the run had one for each image.

        `None` if their states are not stored.
        """
        fresh = []
        for device, state in self.generator_states:
            fresh.append(torch.Generator(device))
            fresh[-1].set_state(state)
        if not fresh:
            return None
        return fresh if self.provenance.get("generators") == "list" else fresh[0]

    def differences(self, pipe) -> list[str]:
        """Return a sentence for each thing in which a pipeline differs from that of the run, if it was recorded.

        Model, scheduler, and LoRA and IP-Adapters with their weights are compared: where they differ, the same noise
        gives other images. Arguments of the call are in `provenance["arguments"]`; images and embeddings among them are
        not recorded, only named in `provenance["unrecorded"]`.
        """
        given = describe_pipeline(pipe)
        known = {name: self.provenance[name] for name in given if name in self.provenance}
        return settings_diff(known, {name: given[name] for name in known})

    def without_images(self) -> "NoiseResult":
        """Return the result as a file of it reads: on the CPU, without images."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: value.cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}
        scores = {name: values.cpu() for name, values in self.scores.items()}
        return dataclasses.replace(self, **moved | {"scores": scores, "images": None, "initial_images": None})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the provenance as JSON in its header.

        The write is atomic: if it is interrupted or the disk is full, a previous file stays as it was.

        Raises:
            ValueError: For a folder or a device, and for reports that are no JSON values or too large.
            OSError: If the file cannot be written.
        """
        own = {name: getattr(self, name) for name in RESULT_TENSORS + LATER_TENSORS}
        tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
        tensors |= {f"{PER_SCORE}{name}": values for name, values in self.scores.items()}
        tensors |= {f"{PER_STREAM}{index}": state for index, (_, state) in enumerate(self.generator_states)}
        devices = [device for device, _ in self.generator_states]
        header = {"provenance": self.provenance, "generator_devices": devices, "reports": self.reports}
        if self.progress is not None:
            header["progress"] = self.progress.parts
            tensors |= {f"{PER_PROGRESS}{name}": tensor for name, tensor in self.progress.tensors.items()}
        write_result_file(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "NoiseResult":
        """Read a file of `save`. Files are untrusted: nothing is unpickled, and all content is checked before use.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, is damaged, foreign or inconsistent, or was written by a newer
                version.
        """
        header, tensors = read_result_file(Path(path))
        streams = enumerate(header["generator_devices"])
        states = [(kind, tensors.pop(f"{PER_STREAM}{index}")) for index, kind in streams]
        parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PER_PROGRESS)}
        parts = {name.removeprefix(PER_PROGRESS): tensor for name, tensor in parts.items()}
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        names = [name for name in tensors if name.startswith(PER_SCORE)]
        scores = {name.removeprefix(PER_SCORE): tensors.pop(name) for name in names}
        records = {name: header[name] for name in ("provenance", "reports")}
        progress = Progress(header["progress"], parts) if header["progress"] else None
        return cls(**tensors, **records, scores=scores, generator_states=states, progress=progress)


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    """Return images `(B, 3, H, W)` in [0, 1], or strips of videos `(B, F, 3, H, W)`, as PIL images."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(as_strips(images.detach().clamp(0, 1))))


def html_image(image: Image.Image, side: int = 256) -> str:
    """Return an `img` element with the image in it, at most `side` pixels wide and high."""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
