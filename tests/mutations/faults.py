"""Faults that the tests must find, each a replaced text of one file."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A fault: `old`, which occurs exactly once in the file at `path`, is replaced by `new`.

    Attributes:
        tests: The test file that comes first, if none has the name of the file.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str | None = None

    def mutated(self, root: Path = ROOT) -> str:
        """Return the text of the file with the fault. Raises `ValueError` unless `old` occurs exactly once."""
        text = (root / self.path).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"Expected the text of the fault '{self.name}' once in {self.path}, but got it {count} times. Update "
                f"{Path(__file__).name}."
            )
        return text.replace(self.old, self.new)

    def nearest_tests(self, root: Path = ROOT) -> list[str]:
        """Return the test file that is given or named after the file, then those of the folder that mirrors its own."""
        file = Path(self.path)
        folder = root / "tests" / Path(*[part for part in file.parent.parts if part not in ("src", "noiseopt")])
        while not folder.is_dir():
            folder = folder.parent
        named = sorted((root / "tests").rglob(f"test_{file.stem}.py")) if self.tests is None else [root / self.tests]
        return [str(path.relative_to(root)) for path in dict.fromkeys([*named, *sorted(folder.glob("test_*.py"))])]


FAULTS = (
    Fault(
        "best chosen by the wrong sign",
        "pipelines/loop.py",
        "better = run.loss < best.loss",
        "better = run.loss > best.loss",
    ),
    Fault(
        "stop of a callback ignored",
        "pipelines/loop.py",
        "if asks_to_stop(callback.on_step_end(run)):\n            run.stop()",
        "callback.on_step_end(run)",
        "tests/callbacks/test_callbacks.py",
    ),
    Fault(
        "gradient clip dropped",
        "pipelines/reno/method.py",
        "gradient = clip_per_sample(gradient, self.max_grad_norm)",
        "gradient = gradient.clone()",
    ),
    Fault(
        "learning rate counts the channels",
        "pipelines/noise_math.py",
        "return math.sqrt(height * width) / 64",
        "return math.sqrt(noise[0].numel() / 4) / 64",
        "tests/pipelines/reno/test_reno.py",
    ),
    Fault(
        "momentum not carried",
        "pipelines/reno/method.py",
        "state.velocity = self.momentum * state.velocity + gradient",
        "state.velocity = gradient",
    ),
    Fault(
        "only the first view counts",
        "pipelines/reno/objective.py",
        "for view in views]).mean(0)",
        "for view in views])[0]",
    ),
    Fault(
        "directions along the wrong axis",
        "pipelines/cno/contrastive_loss.py",
        "F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=1)",
        "F.normalize(F.adaptive_avg_pool2d(x0, (down, across)).flatten(2), dim=2)",
    ),
    Fault(
        "norm of the displacement not squared",
        "pipelines/noise_diffusion/candidate_choice.py",
        "v.square().flatten(1).sum(1)",
        "v.square().flatten(1).sum(1).sqrt()",
    ),
    Fault(
        "radius grows whatever was gained",
        "pipelines/noise_diffusion/trust_region.py",
        "gain > (GOOD * expected).clamp_min(0)",
        "gain > -torch.inf",
    ),
    Fault(
        "sum over a set instead of the mean",
        "pipelines/never_too_late/method.py",
        "gradient = gradient / per_image(self.sizes, gradient)",
        "gradient = gradient.clone()",
    ),
    Fault(
        "guard that never rejects",
        "pipelines/never_too_late/quality_guard.py",
        "found |= ~(run.scores[name] > self.limits[name]).to(found.device)",
        "found |= ~(run.scores[name] > -torch.inf).to(found.device)",
    ),
    Fault(
        "acceptance without the temperature",
        "pipelines/searches/pcn.py",
        "return loss / temperature if temperature",
        "return loss if temperature",
    ),
    Fault(
        "radius reached from inside too",
        "pipelines/baselines/noise_pgd.py",
        "(self.radius * length / per_sample_norm(way)).clamp(max=1)",
        "(self.radius * length / per_sample_norm(way))",
        "tests/pipelines/noise_diffusion/test_noise_diffusion.py",
    ),
    Fault(
        "prompts replayed in reverse order",
        "pipelines/sampling/sampler.py",
        '{"encode_prompt": self.encoded,',
        '{"encode_prompt": self.encoded[::-1],',
    ),
    Fault(
        "frozen gradient passes the denoiser",
        "pipelines/sampling/sampler.py",
        '{"frozen": without_gradient, "full"',
        '{"full"',
    ),
    Fault(
        "latents unpacked in packed order",
        "pipelines/sampling/latent_space.py",
        "return latents.flatten(1).gather(1, packing.positions.to(latents.device)).view(packing.noise)",
        "return latents.flatten(1).view(packing.noise)",
    ),
    Fault(
        "redraw judged by its latents alone",
        "pipelines/sampling/redraw.py",
        "if equal(returned, target):",
        "if equal(first_of(returned), prepared):",
    ),
    Fault(
        "doubtful redraw taken for certain",
        "pipelines/sampling/redraw.py",
        "return Redraw(form, stream, same and not sampler.draws_globally)",
        "return Redraw(form, stream, True)",
    ),
    Fault(
        "draws before the noise not repeated",
        "pipelines/sampling/sampler.py",
        "streams = self.start.own if self.draws_early else self.random_state",
        "streams = self.random_state",
        "tests/pipelines/sampling/test_redraw.py",
    ),
    Fault(
        "global draws before the noise not repeated",
        "pipelines/sampling/sampler.py",
        "self.start.replayed() if self.draws_globally else contextlib.nullcontext()",
        "contextlib.nullcontext()",
        "tests/pipelines/sampling/test_redraw.py",
    ),
    Fault(
        "pixels around zero taken as they are",
        "pipelines/sampling/pixel_range.py",
        "return centered",
        "return False",
        "tests/pipelines/sampling/test_redraw.py",
    ),
    Fault(
        "modules left frozen",
        "pipelines/sampling/module_state.py",
        "finally:\n        switch(True)",
        "finally:\n        switch(False)",
        "tests/pipelines/composition/test_modules.py",
    ),
    Fault(
        "checkpointing not restored",
        "pipelines/memory/checkpointing.py",
        "            replace_block_settings(module, settings)",
        "            settings.clear()",
    ),
    Fault(
        "rows of the first chunk for every chunk",
        "pipelines/memory/chunks.py",
        "noise[rows], gradient[rows])",
        "noise[rows], gradient[: len(rows)])",
    ),
    Fault(
        "result file with latents that are not finite",
        "pipelines/results/result_file.py",
        'for name in ("noise", "latents", "initial_noise"):',
        'for name in ("noise", "initial_noise"):',
    ),
    Fault(
        "state of the method not restored",
        "pipelines/results/resume.py",
        "vars(begun)[name] = self.restored(",
        "ignored = self.restored(",
    ),
    Fault(
        "half-done result called complete",
        "pipelines/loop.py",
        "        self.complete = self.has_gradient = False\n",
        "        self.complete, self.has_gradient = True, False\n",
        "tests/pipelines/results/test_resume.py",
    ),
    Fault(
        "arguments of a file handed on unseen",
        "src/noiseopt/analysis/sampling.py",
        "if strange := [name for name in recorded if name not in known]:",
        "if strange := [name for name in () if name not in known]:",
        tests="tests/test_security.py",
    ),
    Fault(
        "link in a folder followed",
        "pipelines/results/atomic_write.py",
        "os.replace(part, path)",
        "os.replace(part, path.resolve())",
    ),
    Fault(
        "settings diff without added settings",
        "pipelines/results/settings_diff.py",
        "names = [*known, *(key for key in given if key not in known)]",
        "names = [*known]",
    ),
    Fault(
        "patience one step too long",
        "callbacks/early_stopping.py",
        "self.waited >= self.patience",
        "self.waited > self.patience",
        "tests/callbacks/test_callbacks.py",
    ),
    Fault(
        "sigma of the next step",
        "schedulers/x0_prediction.py",
        "scheduler.sigmas_interpol[index - 1]",
        "scheduler.sigmas_interpol[index]",
    ),
    Fault(
        "pink gain with the wrong sign",
        "schedulers/noise_samplers.py",
        "logs = -self.alpha * f",
        "logs = self.alpha * f",
    ),
    Fault(
        "crop from the corner instead of the center",
        "rewards/contract/transforms.py",
        "images = center_crop(images, self.crop)",
        "images = images[..., : self.crop[0], : self.crop[1]]",
    ),
    Fault(
        "probability of the wrong answer",
        "rewards/vlm/vqa_score.py",
        "return log_probability(logits, self.yes).exp()",
        "return log_probability(logits, self.no).exp()",
    ),
    Fault(
        "kernel of unnormalized features",
        "rewards/sets/cosine_kernel.py",
        "unit_vectors(features.to(device).double())",
        "features.to(device).double()",
    ),
    Fault(
        "Vendi score always of order 1",
        "rewards/sets/vendi.py",
        "kernel_vendi(kernels_of_set(features), self.order,",
        "kernel_vendi(kernels_of_set(features), 1.0,",
    ),
    Fault(
        "replaced method of a layer bypassed",
        "pipelines/memory/lean_layers.py",
        "if not replaced_methods(layer)]",
        "if layer is not None]",
        "tests/pipelines/composition/test_patches.py",
    ),
    Fault(
        "replaced method of a layer class bypassed",
        "pipelines/memory/lean_layers.py",
        "if is_stock(kind)}",
        "if kind is not None}",
        "tests/pipelines/composition/test_patches.py",
    ),
    Fault(
        "patched pipeline optimized as a copy",
        "pipelines/sampling/apart.py",
        "self.in_place = pipe.scheduler, is_patched(pipe)",
        "self.in_place = pipe.scheduler, False",
        "tests/pipelines/composition/test_patches.py",
    ),
    Fault(
        "replaced encode_prompt bypassed",
        "pipelines/hook.py",
        "functools.partial(self.encode_prompt, pipe.encode_prompt)",
        "functools.partial(self.encode_prompt, functools.partial(type(pipe).encode_prompt, pipe))",
        "tests/pipelines/composition/test_patches.py",
    ),
    Fault(
        "callbacks draw inside of the run",
        "pipelines/hook.py",
        "with set_aside(pipe), torch.enable_grad()",
        "with torch.enable_grad()",
        "tests/pipelines/composition/test_sharing.py",
    ),
    Fault(
        "runs of shared modules do not wait",
        "pipelines/sampling/turns.py",
        "return self.thread != other.thread and not self.things.isdisjoint(other.things)",
        "return False",
        "tests/pipelines/composition/test_sharing.py",
    ),
    Fault(
        "steps that end after the budget begin",
        "callbacks/early_stopping.py",
        "if state.elapsed + took + self.closing * self.first > self.seconds:",
        "if state.elapsed > self.seconds:",
        "tests/callbacks/test_callbacks.py",
    ),
    Fault(
        "search keeps the worst noises",
        "pipelines/stages.py",
        "losses.argsort(dim=1, stable=True)[:, :-1]",
        "losses.argsort(dim=1, stable=True, descending=True)[:, :-1]",
    ),
    Fault(
        "next start goes on with the state of the last",
        "pipelines/stages.py",
        "state.inner = self.method.start(self.problem.beginning_at(noise, state.stage))",
        "pass",
    ),
    Fault(
        "projection with the wrong number of sizes above λ",
        "pipelines/white_noise.py",
        "outside.argmin(-1, keepdim=True)",
        "outside.argmax(-1, keepdim=True)",
    ),
    Fault(
        "moments of the noise are left as they drift",
        "pipelines/white_noise.py",
        "    if not beyond.any():",
        "    if True:",
        "tests/pipelines/reno/test_reno.py",
    ),
    Fault(
        "noise is not projected after its step",
        "pipelines/white_noise.py",
        "            return with_gaussian_moments(project(moved))",
        "            return moved",
        "tests/pipelines/reno/test_reno.py",
    ),
    Fault(
        "Never Too Late keeps the mean gradient of an image that reverts",
        "pipelines/never_too_late/method.py",
        "white.mean = white.mean.where(~stays, 0)",
        "pass",
        "tests/pipelines/never_too_late/test_never_too_late.py",
    ),
    Fault(
        "CADS brings back the condition of the first step",
        "callbacks/cads.py",
        "self.clean(name, callback_kwargs[name])",
        "self.conditions.get(name, callback_kwargs[name])",
    ),
    Fault(
        "held-out patience one step too long",
        "callbacks/held_out_reward.py",
        "scores.argmax(0) >= self.patience",
        "scores.argmax(0) > self.patience",
    ),
    Fault(
        "value of the image instead of its views",
        "pipelines/reno/objective.py",
        "mean if self.valued_by_views else output.total",
        "output.total",
        "tests/pipelines/reno/test_stopping.py",
    ),
    Fault(
        "weights of the first prompt for every image",
        "rewards/contract/weight_by_kind.py",
        "self.by_kind[prompt_kind(text)] for text in texts",
        "self.by_kind[prompt_kind(texts[0])] for _ in texts",
    ),
    Fault(
        "guidance away from the reward",
        "pipelines/reward_guidance/guidance.py",
        "float(out.sign().reshape(-1)[0])",
        "-float(out.sign().reshape(-1)[0])",
        "tests/pipelines/reward_guidance/test_reward_guidance.py",
    ),
    Fault(
        "last step guided too",
        "pipelines/reward_guidance/guidance.py",
        "if call >= most or",
        "if call > most or",
        "tests/pipelines/reward_guidance/test_reward_guidance.py",
    ),
)


def selected(names: list[str]) -> Iterator[Fault]:
    """Yield the faults with these names, or all of them. Raises `ValueError` for unknown names."""
    if unknown := sorted(set(names) - {fault.name for fault in FAULTS}):
        raise ValueError(f"Expected names out of {[fault.name for fault in FAULTS]}, but got {unknown}.")
    yield from (fault for fault in FAULTS if not names or fault.name in names)
