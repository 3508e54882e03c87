"""CNO against its formulas written down naively, against closed forms, and inside whole pipeline calls."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from peft import LoraConfig
from problems import generator
from tiny_pipelines import (
    SIZE,
    call_arguments,
    flux_pipeline,
    quiet,
    sd3_pipeline,
    sd_pipeline,
    sdxl_pipeline,
    tiny_pipeline,
)

from noiseopt import (
    CNO,
    CNOFluxPipeline,
    CNOStableDiffusion3Pipeline,
    CNOStableDiffusionPipeline,
    CNOStableDiffusionXLPipeline,
    ReNO,
    optimize_noise,
)
from noiseopt.pipelines.cno.contrastive_loss import ContrastiveLoss, attraction_gamma, pooled_directions

PIPELINES = {
    CNOStableDiffusionPipeline: sd_pipeline,
    CNOStableDiffusionXLPipeline: sdxl_pipeline,
    CNOStableDiffusion3Pipeline: sd3_pipeline,
    CNOFluxPipeline: flux_pipeline,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def ddim(**changes) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, **changes)


def directions(size: int, cells: int = 9, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(size, 4, cells, generator=generator(seed), dtype=torch.float64), dim=1)


def loss_of(**changes) -> ContrastiveLoss:
    return ContrastiveLoss(**{"tau": 0.1, "gamma": "auto", "attraction": True, "repulsion": True, **changes})


def naive_losses(h, reference, tau: float, gamma: float) -> torch.Tensor:
    """The formula cell by cell and image by image, as fractions of exponentials."""
    size, _, cells = h.shape
    losses = torch.zeros(size, dtype=torch.float64)
    for i in range(size):
        for p in range(cells):
            own = math.exp(float(h[i, :, p] @ reference[i, :, p]) / (gamma * tau))
            others = sum(math.exp(float(h[i, :, p] @ h[j, :, p]) / tau) for j in range(size) if j != i)
            losses[i] -= math.log(own / (own + others)) / cells
    return losses


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("gamma", ["auto", 1.0, 0.5])
def test_the_loss_is_the_formula(size, gamma):
    h, reference = directions(size), directions(size, seed=1)
    value = attraction_gamma(size, 0.1) if gamma == "auto" else gamma
    torch.testing.assert_close(
        loss_of(gamma=gamma)(h, reference), naive_losses(h, reference, 0.1, value), rtol=0, atol=1e-6
    )


def test_the_loss_is_a_cross_entropy_whose_diagonal_is_replaced():
    h, reference = directions(5), directions(5, seed=1)
    gamma = attraction_gamma(5, 0.1)
    logits = torch.einsum("icp,jcp->pij", h, h) / 0.1
    own = (h * reference).sum(1).T / (gamma * 0.1)
    logits[:, range(5), range(5)] = own
    expected = F.cross_entropy(logits.reshape(-1, 5), torch.arange(5).repeat(9))
    torch.testing.assert_close(loss_of()(h, reference).mean(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("size", "gamma"), [(2, 1.0), (3, 0.9352), (4, 0.9010), (5, 0.8782), (8, 0.8371), (16, 0.7869)]
)
def test_gamma_in_closed_form(size, gamma):
    assert attraction_gamma(size, 0.1) == pytest.approx(gamma, abs=5e-5)
    assert math.exp(1 / (attraction_gamma(size, 0.1) * 0.1)) == pytest.approx((size - 1) * math.exp(10), rel=1e-9)


def test_without_attraction_or_without_repulsion_half_of_the_formula_is_left():
    h, reference = directions(4), directions(4, seed=1)
    cosines = torch.einsum("icp,jcp->pij", h, h) / 0.1
    cosines[:, range(4), range(4)] = -torch.inf
    torch.testing.assert_close(loss_of(attraction=False)(h, reference), cosines.logsumexp(-1).mean(0))
    own = (h * reference).sum(1).mean(1) / (0.1 * attraction_gamma(4, 0.1))
    torch.testing.assert_close(loss_of(repulsion=False)(h, reference), -own)


def test_at_the_start_nothing_attracts():
    x0 = torch.randn(3, 4, 8, 8, generator=generator(), dtype=torch.float64).requires_grad_()
    h = pooled_directions(x0, 4)
    (gradient,) = torch.autograd.grad(loss_of(repulsion=False)(h, h.detach()).sum(), x0)
    assert gradient.abs().max() < 1e-10
    h = pooled_directions(x0, 4)
    (gradient,) = torch.autograd.grad(loss_of()(h, h.detach()).sum(), x0)
    assert gradient.abs().max() > 1e-4


def test_windows_are_output_sizes_and_never_larger_than_the_latent():
    x0 = torch.randn(2, 4, 8, 12, generator=generator())
    assert pooled_directions(x0, 4).shape == (2, 4, 16)
    assert pooled_directions(x0, 16).shape == (2, 4, 8 * 12)
    torch.testing.assert_close(pooled_directions(x0, 16), F.normalize(x0.flatten(2), dim=1))
    assert pooled_directions(x0[:, None], 4).shape == (2, 4, 16)  # one frame
    assert pooled_directions(x0.bfloat16(), 4).dtype == torch.float32


def find(pipe, method, prompt="a b", count=3, **arguments):
    return optimize_noise(pipe, prompt, method, num_images_per_prompt=count, generator=generator(), **arguments)


def moved(pipe, method, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise before and after."""
    seen = []
    result = find(pipe, method, callbacks=lambda state: seen.append(state.noise), **arguments)
    return seen[0], result.noise


@pytest.mark.parametrize("gradient", ["frozen", "full"], ids=["paper", "released code"])
def test_a_run_follows_the_naive_loop(gradient):
    """One guided U-Net call a step at the first timestep, by hand."""
    pipe = quiet(sd_pipeline(scheduler=ddim()))
    gamma = "auto" if gradient == "frozen" else 1.0
    start, found = moved(pipe, CNO(gradient=gradient, gamma=gamma), **call_arguments("sd"))
    with torch.no_grad():
        text, empty = pipe.encode_prompt("a b", "cpu", 3, True)
    pipe.scheduler.set_timesteps(2)
    t = pipe.scheduler.timesteps[0]
    level = pipe.scheduler.alphas_cumprod[t]
    noise = start.clone().requires_grad_()
    optimizer, reference = torch.optim.Adam([noise], 1e-2), None
    for _ in range(3):
        with torch.set_grad_enabled(gradient == "full"):
            without, given = pipe.unet(torch.cat([noise] * 2), t, torch.cat((empty, text))).sample.chunk(2)
            output = without + 3.0 * (given - without)
        x0 = (noise - (1 - level).sqrt() * output) / level.sqrt()
        h = F.normalize(F.adaptive_avg_pool2d(x0, 16).flatten(2), dim=1)
        reference = h.detach() if reference is None else reference
        value = attraction_gamma(3, 0.1) if gamma == "auto" else gamma
        logits = torch.einsum("icp,jcp->pij", h, h) / 0.1
        own = (h * reference).sum(1).T / (value * 0.1)
        logits = torch.where(torch.eye(3, dtype=torch.bool), own[:, :, None], logits)
        optimizer.zero_grad()
        F.cross_entropy(logits.reshape(-1, 3), torch.arange(3).repeat(h.shape[-1])).backward()
        optimizer.step()
    # Adam divides by the gradient's own size: where that is tiny, rounding decides, so a few entries may differ more
    difference = (found - noise.detach()).abs()
    assert difference.median() < 1e-6 and difference.mean() < 1e-4
    assert (noise.detach() - start).abs().mean() > 0.01


def test_with_stop_gradient_the_edit_is_constant_in_each_window():
    start, found = moved(quiet(sd_pipeline(scheduler=ddim())), CNO(window_size=4), **call_arguments("sd"))
    windows = (found - start).unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)  # 16 x 16 latents, 4 x 4 windows
    assert (windows - windows.mean(-1, keepdim=True)).abs().max() < 1e-6
    assert windows.std() > 0.01


def test_an_edit_is_small():
    pipe = quiet(sd_pipeline(scheduler=ddim()))
    start, found = moved(pipe, CNO(), num_inference_steps=2, guidance_scale=3.0, height=128, width=128)
    assert (found - start).abs().max() <= 3 * 1e-2 * 1.01
    root = math.sqrt(start[0].numel())
    assert found.flatten(1).norm(dim=1).div(start.flatten(1).norm(dim=1)).sub(1).abs().max() < 0.01
    assert found.flatten(1).norm(dim=1).div(root).sub(1).abs().max() < 0.02  # what a Gaussian sample itself is off


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_similarity_falls_and_the_last_noise_is_returned_unevaluated(family):
    pipe, calls, graphs = tiny_pipeline(family), [], []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def look(module, args, kwargs, output):
        calls.append(1)
        graphs.append(output[0].requires_grad)

    handle = denoiser.register_forward_hook(look, with_kwargs=True)
    result = find(pipe, CNO(), **call_arguments(family))
    handle.remove()
    assert len(calls) == 3 * (2 if family == "flux" else 1)  # true guidance is a second pass
    assert not any(graphs)
    similarity = result.scores["similarity"].mean(1)
    assert similarity[0] > similarity[1] > similarity[2]
    assert result.losses.shape == (3, 3)
    assert not torch.allclose(result.noise.flatten(1).norm(dim=1), result.norms[-1] * math.sqrt(4 * 16 * 16))


def test_full_gradient_passes_the_denoiser():
    graphs = []
    pipe = tiny_pipeline("sd")
    handle = pipe.unet.conv_out.register_forward_hook(lambda *arguments: graphs.append(arguments[-1].requires_grad))
    find(pipe, CNO(gradient="full", steps=2), **call_arguments("sd"))
    handle.remove()
    assert graphs == [True, True]


def test_prompts_in_one_call_are_groups_of_their_own():
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    generators = [generator(seed) for seed in range(5)]
    both = optimize_noise(pipe, ["a", "b", "a", "b", "b"], CNO(), generator=generators, **arguments)
    for prompt, rows in (("a", [0, 2]), ("b", [1, 3, 4])):
        streams = [generator(seed) for seed in rows]
        alone = optimize_noise(pipe, [prompt] * len(rows), CNO(), generator=streams, **arguments)
        torch.testing.assert_close(both.losses[:, rows], alone.losses, rtol=1e-4, atol=1e-5)
        difference = (both.noise[rows] - alone.noise).abs()
        assert difference.median() < 1e-5 and difference.mean() < 2e-3


def test_embeddings_are_grouped_by_their_values():
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    with torch.no_grad():
        embeds = pipe.encode_prompt(["a", "b"], "cpu", 1, False)[0]
    negative = torch.zeros_like(embeds)
    by_text = optimize_noise(pipe, ["a", "b"], CNO(), num_images_per_prompt=2, generator=generator(), **arguments)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_images_per_prompt": 2, **arguments}
    found = optimize_noise(pipe, None, CNO(), generator=generator(), **call)
    assert found.losses.shape == by_text.losses.shape
    same = {**call, "prompt_embeds": embeds[:1].repeat(2, 1, 1), "num_images_per_prompt": 1}
    assert optimize_noise(pipe, None, CNO(), generator=generator(), **same).losses.shape == (3, 2)
    with pytest.raises(ValueError, match="at least 2 images of each prompt"):
        optimize_noise(pipe, None, CNO(), **{**call, "num_images_per_prompt": 1})


def call_of(cls) -> dict:
    family = {CNOStableDiffusionPipeline: "sd", CNOStableDiffusionXLPipeline: "sdxl", CNOFluxPipeline: "flux"}
    return {**call_arguments(family.get(cls, "sd3")), "num_images_per_prompt": 3, "output_type": "pt"}


@pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
def test_pipelines_move_the_noise_and_leave_everything_else_to_the_stock_class(cls):
    stock = quiet(PIPELINES[cls]())
    ours = quiet(cls(**stock.components))
    call = call_of(cls)
    plain = stock("a b", generator=generator(), **call).images
    assert torch.equal(ours("a b", generator=generator(), steps=0, **call).images, plain)
    steps = []

    def watch(pipe, step, timestep, values):
        steps.append(step)
        return values

    output = ours("a b", generator=generator(), callback_on_step_end=watch, **call)
    assert steps == [0, 1]  # only the final run
    assert not torch.equal(output.images, plain)
    again = stock("a b", latents=output.noise_result.latents, generator=output.noise_result.generator(), **call)
    assert torch.equal(again.images, output.images)
    assert torch.equal(ours("a b", generator=generator(), steps=0, **call).images, plain)


def test_list_generators_latents_and_negative_prompts_compose():
    pipe, arguments = tiny_pipeline("sd"), call_arguments("sd")
    streams = [generator(seed) for seed in range(2)]
    first = find(pipe, CNO(), count=2, **arguments)
    listed = optimize_noise(pipe, "a b", CNO(), num_images_per_prompt=2, generator=streams, **arguments)
    drawn = torch.cat([torch.randn(1, 4, 16, 16, generator=generator(seed)) for seed in range(2)])
    given = optimize_noise(pipe, "a b", CNO(), num_images_per_prompt=2, latents=drawn, **arguments)
    torch.testing.assert_close(listed.losses, given.losses, rtol=1e-5, atol=1e-6)
    other = find(pipe, CNO(), count=2, negative_prompt="c", **arguments)
    assert not torch.equal(first.losses[0], other.losses[0])


def test_lora_adapters_are_part_of_what_is_optimized():
    pipe, arguments = quiet(sd_pipeline()), call_arguments("sd")
    before = find(pipe, CNO(), **arguments)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    after = find(pipe, CNO(), **arguments)
    assert not torch.equal(before.losses[0], after.losses[0])
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "`tau` to be a number in"),
        ({"tau": math.inf}, "`tau` to be a number in"),
        ({"gamma": 0.0}, r"`gamma` to be a number in \(0, inf\) or 'auto'"),
        ({"gamma": "paper"}, r"`gamma` to be a number in \(0, inf\) or 'auto'"),
        ({"window_size": 0}, "`window_size` to be an integer in"),
        ({"window_size": 2.5}, "`window_size` to be an integer in"),
        ({"learning_rate": -1.0}, "`learning_rate` to be a number in"),
        ({"steps": 0}, "`steps` to be an integer in"),
        ({"attraction": False, "repulsion": False}, "`attraction` or `repulsion`"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, message, monkeypatch):
    pipe = tiny_pipeline("sd")
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    with pytest.raises(ValueError, match=message):
        find(pipe, CNO(**settings), **call_arguments("sd"))


def test_one_image_of_a_prompt_has_nothing_to_differ_from(monkeypatch):
    pipe = tiny_pipeline("sd")
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    for prompt, count in (("a", 1), (["a", "b"], 1), (["a", "a", "b"], 1)):
        with pytest.raises(ValueError, match=r"at least 2 images of each prompt .* `num_images_per_prompt=5`"):
            find(pipe, CNO(), prompt, count, **call_arguments("sd"))
    with pytest.raises(ValueError, match="at least 2 images of each prompt"):
        CNOStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False)("a", **SIZE)


def test_what_does_not_depend_on_the_noise_is_refused_with_the_remedy():
    known = quiet(sd_pipeline(scheduler=ddim(prediction_type="sample")))
    with pytest.raises(ValueError, match='predicts x0 itself.*`gradient="full"`'):
        find(known, CNO(), **call_arguments("sd"))
    find(known, CNO(gradient="full", steps=1), **call_arguments("sd"))
    silent = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pure = quiet(sd_pipeline(scheduler=silent))
    with pytest.raises(ValueError, match='zero terminal SNR.*`gradient="full"`'):
        find(pure, CNO(), **call_arguments("sd"))
    find(pure, CNO(gradient="full", steps=1), **call_arguments("sd"))


class WithoutDenoiser(StableDiffusionPipeline):
    """Takes a step without asking the U-Net."""

    @torch.no_grad()
    def __call__(self, prompt, num_images_per_prompt=1, generator=None, latents=None, **_):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape = (num_images_per_prompt, 4, 64, 64, torch.float32, torch.device("cpu"), generator, latents)
        latents = self.prepare_latents(*shape)
        self.scheduler.set_timesteps(2)
        return (self.scheduler.step(latents, self.scheduler.timesteps[0], latents, return_dict=False)[0],)


def test_a_step_without_a_denoiser_is_refused():
    pipe = quiet(sd_pipeline(WithoutDenoiser, ddim()))
    with pytest.raises(TypeError, match="calls its denoiser .* WithoutDenoiser does not"):
        find(pipe, CNO())


def test_settings_by_argument_and_by_dict():
    pipe = quiet(CNOStableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False))
    call = {**call_of(CNOStableDiffusionPipeline), "generator": generator()}
    result = pipe("a", gamma=0.5, gradient="full", method_kwargs={"window_size": 4}, **call).noise_result
    settings = result.provenance["settings"]
    assert (settings["gamma"], settings["window_size"], settings["gradient"]) == (0.5, 4, "full")
    assert result.provenance["objective"]["gamma"] == 0.5
    with pytest.raises(ValueError, match=r"\['gamma'\] as arguments and in `method_kwargs` too"):
        pipe("a", gamma=0.5, method_kwargs={"gamma": 1.0}, **call)
    with pytest.raises(ValueError, match=r"`method` or \['gamma'\], but got both"):
        pipe("a", gamma=0.5, method=ReNO(rewards="red"), **call)


def test_a_callback_ends_the_run_with_the_noise_it_saw():
    seen = []

    def stop(state):
        seen.append(state.noise)
        return len(seen) < 2

    pipe = quiet(sd_pipeline(scheduler=EulerDiscreteScheduler(steps_offset=1)))
    result = find(pipe, CNO(), callbacks=stop, **call_arguments("sd"))
    assert torch.equal(result.noise, seen[-1]) and len(seen) == 2


@pytest.mark.parametrize(("size", "tau"), [(1, 0.1), (0, 0.1), (3, 0.0), (3, -0.1), (3, math.inf), (3, math.nan)])
def test_gamma_has_no_value_for_one_image_or_no_temperature(size, tau):
    with pytest.raises(ValueError, match="Expected (at least 2 images to contrast|a temperature above 0), but got"):
        attraction_gamma(size, tau)
