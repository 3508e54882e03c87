"""x0 of every scheduler against the noise level that the model is told, and against what the scheduler reports."""

import copy
import functools
import math

import diffusers
import diffusers.schedulers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from noiseopt.schedulers import predict_x0

# what schedulers do with numpy, and the algorithm types that they keep for older configs
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_type:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning:torchsde"),
]

SIZE = (2, 3, 6, 6)
STEPS = 6
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TIMED = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
FLOW = {**BETAS, "use_flow_sigmas": True, "flow_shift": 3.0}
OLD = {**BETAS, "final_sigmas_type": "sigma_min"}
CIRCLE = ("epsilon", "sample", "v_prediction")
LINE = ("epsilon", "sample", "flow_prediction")
SIGNS = ("epsilon", "v_prediction")


# The level x = a·x0 + b·ε of a call, from what the model is told about it and never from the table of the scheduler.


def alpha_bar_level(scheduler, index, timestep):
    """Trained with ᾱ = Π(1−β): float64, by the timestep."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[int(timestep)]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def snr_shifted_level(scheduler, index, timestep):
    """CogVideoX, https://arxiv.org/abs/2408.06072, divides the signal-to-noise ratio ᾱ/(1−ᾱ) by 3."""
    ratio = (alpha_bar_level(scheduler, index, timestep)[0] ** -2 - 1) * 3
    return (1 / (1 + ratio)).sqrt(), (ratio / (1 + ratio)).sqrt()


def cosine_level(scheduler, index, timestep):
    """Nichol & Dhariwal's cosine schedule in the discrete form of unCLIP, https://arxiv.org/abs/2102.09672."""
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    alpha_bar = math.prod(1 - min(1 - f[t + 1] / f[t], 0.999) for t in range(int(timestep) + 1))
    return torch.tensor(alpha_bar**0.5).double(), torch.tensor((1 - alpha_bar) ** 0.5).double()


def wuerstchen_level(scheduler, index, timestep):
    angle = [(t + 0.008) / 1.008 * math.pi / 2 for t in (float(timestep), 0.0)]
    alpha_bar = torch.tensor(math.cos(angle[0]) ** 2 / math.cos(angle[1]) ** 2).double().clamp(1e-4, 0.9999)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def input_scale_level(scheduler, index, timestep):
    """The model sees x/√(1+σ²)."""
    scale = copy.copy(scheduler).scale_model_input(torch.ones((), dtype=torch.float64), timestep)
    return torch.ones((), dtype=torch.float64), (scale.double() ** -2 - 1).sqrt()


def karras_level(scheduler, index, timestep):
    """Karras et al., equation 5, with ρ = 7 between the smallest and the largest σ of the training."""
    (a0, b0), (a1, b1) = (alpha_bar_level(scheduler, 0, t) for t in (0, 999))
    small, large = (b0 / a0) ** (1 / 7), (b1 / a1) ** (1 / 7)
    sigma = (large + index / (STEPS - 1) * (small - large)) ** 7
    return (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()


def shifted_level(scheduler, index, timestep):
    """σ = 3u / (1 + 2u) for equal steps of u; UniPC starts 1e-6 below 1 and does not go to 0."""
    u = (1 - 1 / 1000) * (1 - index / STEPS)
    u += (type(scheduler).__name__ == "UniPCMultistepScheduler") / 1000
    sigma = torch.tensor(min(3 * u / (1 + 2 * u), 1 - 1e-6)).double()
    return 1 - sigma, sigma


def line_level(scheduler, index, timestep):
    sigma = timestep.double() / 1000
    return 1 - sigma, sigma


def reversed_line_level(scheduler, index, timestep):
    """With `invert_sigmas` time counts the signal."""
    return tuple(reversed(line_level(scheduler, index, timestep)))


def angle_level(scheduler, index, timestep):
    return timestep.double().cos(), timestep.double().sin()


def turn_level(scheduler, index, timestep):
    return angle_level(scheduler, index, timestep * math.pi / 2)


def exploding(sigma_of_time):
    return lambda scheduler, index, timestep: (
        torch.ones((), dtype=torch.float64),
        sigma_of_time(timestep.double()),
    )


edm_level = exploding(lambda t: (4 * t).exp())
tangent_level = exploding(lambda t: (t * math.pi / 2).tan())
consistency_level = exploding(lambda t: (t / 250).exp())


# What a model puts out that estimates x0 from x at the level (a, b).


def noise_of(x, x0, a, b):
    return (x - a * x0) / b


def standard_output(scheduler, kind, x, x0, a, b):
    noise, r = noise_of(x, x0, a, b), (a**2 + b**2).sqrt()
    return {
        "epsilon": noise,
        "sample": x0,
        "original_sample": x0,
        "v_prediction": (a * noise - b * x0) / r,
        "flow_prediction": noise - x0,
    }[kind]


def flow_output(scheduler, kind, x, x0, a, b):
    return standard_output(scheduler, "flow_prediction", x, x0, a, b)


def reversed_flow_output(scheduler, kind, x, x0, a, b):
    return -flow_output(scheduler, kind, x, x0, a, b)


def velocity_output(scheduler, kind, x, x0, a, b):
    return standard_output(scheduler, "v_prediction", x, x0, a, b)


def edm_output(scheduler, kind, x, x0, a, b):
    """Karras et al., table 1; the v of Cosine-DPM has the other sign."""
    d = scheduler.config.sigma_data
    total = b**2 + d**2
    return (x0 - d**2 / total * x) / (b * d / total.sqrt()) * (-1 if kind == "v_prediction" else 1)


def consistency_output(scheduler, kind, x, x0, a, b):
    """Song et al., https://arxiv.org/abs/2303.01469, appendix C: the identity at σ = 0.002."""
    skip = 0.25 / ((b - 0.002) ** 2 + 0.25)
    out = 0.5 * (b - 0.002) / (b**2 + 0.25).sqrt()
    return (x0 - skip * x) / out


# class, settings, prediction types, level, output
TABLE = {
    "DDIM": ("DDIMScheduler", TIMED, CIRCLE, alpha_bar_level),
    "DDIMParallel": ("DDIMParallelScheduler", TIMED, CIRCLE, alpha_bar_level),
    "DDPM": ("DDPMScheduler", TIMED, CIRCLE, alpha_bar_level),
    "DDPMParallel": ("DDPMParallelScheduler", TIMED, CIRCLE, alpha_bar_level),
    "LCM": ("LCMScheduler", TIMED, CIRCLE, alpha_bar_level),
    "TCD": ("TCDScheduler", TIMED, CIRCLE, alpha_bar_level),
    "CogVideoX DDIM": ("CogVideoXDDIMScheduler", {**TIMED, "snr_shift_scale": 1.0}, CIRCLE, alpha_bar_level),
    "CogVideoX DDIM shifted": ("CogVideoXDDIMScheduler", {**TIMED, "snr_shift_scale": 3.0}, CIRCLE, snr_shifted_level),
    "CogVideoX DPM": ("CogVideoXDPMScheduler", {**TIMED, "snr_shift_scale": 3.0}, CIRCLE, snr_shifted_level),
    "PNDM": ("PNDMScheduler", BETAS, SIGNS, alpha_bar_level),
    "PNDM PLMS": ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}, SIGNS, alpha_bar_level),
    "UnCLIP": ("UnCLIPScheduler", {"clip_sample": False}, CIRCLE[:2], cosine_level),
    "Würstchen": ("DDPMWuerstchenScheduler", {}, (None,), wuerstchen_level),
    "Euler": ("EulerDiscreteScheduler", BETAS, (*CIRCLE, "original_sample"), input_scale_level),
    "Euler Karras": ("EulerDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, SIGNS, input_scale_level),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS, SIGNS, input_scale_level),
    "Heun": ("HeunDiscreteScheduler", BETAS, CIRCLE, input_scale_level),
    "Heun Karras": ("HeunDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, SIGNS, input_scale_level),
    "LMS": ("LMSDiscreteScheduler", BETAS, CIRCLE, input_scale_level),
    "KDPM2": ("KDPM2DiscreteScheduler", BETAS, SIGNS, input_scale_level),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", BETAS, SIGNS, input_scale_level),
    "DPM SDE": ("DPMSolverSDEScheduler", {**BETAS, "noise_sampler_seed": 0}, SIGNS, input_scale_level),
    "DPM++": ("DPMSolverMultistepScheduler", BETAS, CIRCLE, alpha_bar_level),
    "DPM++ Karras": ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}, CIRCLE, karras_level),
    "DPM++ flow": ("DPMSolverMultistepScheduler", FLOW, LINE, shifted_level),
    "DPM++ SDE": (
        "DPMSolverMultistepScheduler",
        {**BETAS, "algorithm_type": "sde-dpmsolver++"},
        CIRCLE,
        alpha_bar_level,
    ),
    "DPM": ("DPMSolverMultistepScheduler", {**OLD, "algorithm_type": "dpmsolver"}, CIRCLE, alpha_bar_level),
    "DPM SDE-solver": (
        "DPMSolverMultistepScheduler",
        {**OLD, "algorithm_type": "sde-dpmsolver"},
        CIRCLE,
        alpha_bar_level,
    ),
    "DPM++ single": ("DPMSolverSinglestepScheduler", BETAS, CIRCLE, alpha_bar_level),
    "DPM++ single flow": ("DPMSolverSinglestepScheduler", FLOW, LINE, shifted_level),
    "DPM single": ("DPMSolverSinglestepScheduler", {**OLD, "algorithm_type": "dpmsolver"}, CIRCLE, alpha_bar_level),
    "DEIS": ("DEISMultistepScheduler", BETAS, CIRCLE, alpha_bar_level),
    "DEIS flow": ("DEISMultistepScheduler", FLOW, LINE, shifted_level),
    "SA": ("SASolverScheduler", BETAS, CIRCLE, alpha_bar_level),
    "SA flow": ("SASolverScheduler", FLOW, LINE, shifted_level),
    "SA noise": ("SASolverScheduler", {**BETAS, "algorithm_type": "noise_prediction"}, CIRCLE, alpha_bar_level),
    "UniPC": ("UniPCMultistepScheduler", BETAS, CIRCLE, alpha_bar_level),
    "UniPC Karras": ("UniPCMultistepScheduler", {**BETAS, "use_karras_sigmas": True}, CIRCLE, karras_level),
    "UniPC flow": ("UniPCMultistepScheduler", FLOW, LINE[1:], shifted_level),
    "UniPC noise": ("UniPCMultistepScheduler", {**OLD, "predict_x0": False}, CIRCLE, alpha_bar_level),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, (None,), line_level, flow_output),
    "flow Euler inverted": (
        "FlowMatchEulerDiscreteScheduler",
        {"invert_sigmas": True},
        (None,),
        reversed_line_level,
        reversed_flow_output,
    ),
    "flow Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, (None,), line_level, flow_output),
    "flow LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}, (None,), line_level, flow_output),
    "flow map": ("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, (None,), line_level, flow_output),
    "SCM": ("SCMScheduler", {}, (None,), angle_level, velocity_output),
    "IPNDM": ("IPNDMScheduler", {}, (None,), turn_level, velocity_output),
    "EDM Euler": ("EDMEulerScheduler", {}, SIGNS, edm_level, edm_output),
    "EDM DPM++": ("EDMDPMSolverMultistepScheduler", {}, SIGNS, edm_level, edm_output),
    "Cosine DPM++": ("CosineDPMSolverMultistepScheduler", {}, SIGNS, tangent_level, edm_output),
    "consistency": (
        "CMStochasticIterativeScheduler",
        {"clip_denoised": False},
        (None,),
        consistency_level,
        consistency_output,
    ),
}
CASES = [pytest.param(name, kind, id=f"{name} {kind or ''}".strip()) for name, row in TABLE.items() for kind in row[2]]


def scheduler_class(name):
    cls = getattr(diffusers.schedulers, name)
    if hasattr(cls, "_backends"):
        pytest.skip(f"{name} needs {' and '.join(cls._backends)}")
    return cls


def make(name, kind=None, **changes):
    """A scheduler after `set_timesteps`. It is built once for all kinds: some take seconds for their tables."""
    scheduler = copy.deepcopy(built(name, *changes.items()))
    if kind is not None:
        scheduler.register_to_config(prediction_type=kind)
    return scheduler


@functools.cache
def built(name, *changes):
    class_name, settings = TABLE[name][:2]
    scheduler = scheduler_class(class_name)(**{**settings, **dict(changes)})
    more = {"intermediate_timesteps": None} if class_name == "SCMScheduler" else {}
    scheduler.set_timesteps(STEPS, **more)
    return scheduler


def calls(scheduler):
    """(index, timestep) of the model calls; two schedulers list where they end as well."""
    ends = type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
    return list(enumerate(scheduler.timesteps[:-1] if ends else scheduler.timesteps))


def randn(seed, size=SIZE):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(scheduler, output, timestep, sample, seed=0):
    torch.manual_seed(seed)
    if type(scheduler).__name__ == "CogVideoXDPMScheduler":  # with the last x0, and the timestep before
        previous, x0 = scheduler.step(output, None, timestep, None, sample)
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)
    wuerstchen = type(scheduler).__name__ == "DDPMWuerstchenScheduler"
    return scheduler.step(output, timestep.expand(len(sample)) if wuerstchen else timestep, sample)


def walk(scheduler, row, kind, denoiser):
    """Sample with the exact output of `denoiser`; yield its x0, ours and what `step` says, call by call."""
    level, output_of = row[3], row[4] if len(row) > 4 else standard_output
    kind = "epsilon" if kind is None else kind
    x = None
    for index, timestep in calls(scheduler):
        a, b = level(scheduler, index, timestep)
        x = a * denoiser.start + b * randn(2) if x is None else x
        x0 = denoiser(x, a, b)
        output = output_of(scheduler, kind, x, x0, a, b)
        ours = predict_x0(scheduler, output, timestep, x)
        scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else None
        said = step(scheduler, output, timestep, x, seed=index)
        yield x0, ours, said
        x = said.prev_sample.double()


class Oracle:
    """A denoiser that knows the picture."""

    start = randn(1)

    def __call__(self, x, a, b):
        return self.start


class Gaussian:
    """The posterior mean for data N(μ, s²): μ + a·s² / (a²·s² + b²)·(x − a·μ)."""

    mu, s = 0.3, 0.7
    start = mu + s * randn(1)

    def __call__(self, x, a, b):
        return self.mu + a * self.s**2 / (a**2 * self.s**2 + b**2) * (x - a * self.mu)


@pytest.mark.parametrize("denoiser", [Oracle(), Gaussian()], ids=["oracle", "Gaussian"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_x0_of_a_closed_form_denoiser_at_every_step(name, kind, denoiser):
    seen = 0
    for x0, ours, said in walk(make(name, kind), TABLE[name], kind, denoiser):
        torch.testing.assert_close(ours, x0, rtol=0, atol=2e-3)
        reported = said.get("pred_original_sample", said.get("denoised"))
        if reported is not None:
            torch.testing.assert_close(ours, reported.double(), rtol=1e-4, atol=1e-4)
        seen += 1
    assert seen >= STEPS


@pytest.mark.parametrize(
    "name", ["DPM++", "DPM++ SDE", "DPM++ single", "DPM++ flow", "UniPC", "EDM DPM++", "Cosine DPM++"]
)
def test_equals_the_x0_that_a_silent_solver_goes_on_with(name):
    scheduler = make(name, "sample" if name == "DPM++ flow" else "epsilon")
    for index, timestep in calls(scheduler):
        output, sample = randn(index), randn(10 + index)
        ours = predict_x0(scheduler, output, timestep, sample)
        step(scheduler, output, timestep, sample)
        torch.testing.assert_close(ours, scheduler.model_outputs[-1], rtol=1e-4, atol=1e-4)


def test_a_consistency_model_in_one_step_ends_in_its_x0():
    scheduler = make("consistency", clip_denoised=True)
    scheduler.set_timesteps(1)
    output, sample, timestep = randn(0), 80 * randn(1), scheduler.timesteps[0]
    ours = predict_x0(scheduler, output, timestep, sample)
    scheduler.scale_model_input(sample, timestep)
    torch.testing.assert_close(ours, step(scheduler, output, timestep, sample).prev_sample, rtol=1e-5, atol=1e-5)
    assert ours.abs().max() <= 1


@pytest.mark.parametrize("name", TABLE)
def test_the_scheduler_goes_on_as_without_us(name):
    runs = []
    for ask in (False, True):
        scheduler = make(name, TABLE[name][2][0])
        sample = randn(0)
        for index, timestep in calls(scheduler):
            output = randn(1 + index)
            if ask:
                predict_x0(scheduler, output, timestep, sample)
            scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
            sample = step(scheduler, output, timestep, sample, seed=index).prev_sample
        runs.append(sample)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0, equal_nan=True)


def slopes(x0, *inputs):
    """The scalars c of dx0/dinput = c·identity."""
    weights = randn(5)
    gradients = torch.autograd.grad((weights * x0).sum(), inputs)
    for gradient in gradients:
        torch.testing.assert_close(gradient / weights, (gradient / weights).mean().expand(SIZE), rtol=1e-9, atol=1e-9)
    return [(gradient / weights).mean() for gradient in gradients]


ANALYTIC_SLOPES = {
    "epsilon": lambda a, b: (1 / a, -b / a),
    "v_prediction": lambda a, b: (a / (a**2 + b**2), -b / (a**2 + b**2).sqrt()),
    "flow_prediction": lambda a, b: (torch.ones(()).double(), -b),
}
PREDICTING = [
    (name, kind) for name, row in TABLE.items() for kind in row[2] if kind in ANALYTIC_SLOPES and len(row) == 4
]
PREDICTING += [("flow Euler", "flow_prediction"), ("flow Heun", "flow_prediction"), ("flow LCM", "flow_prediction")]
PREDICTING += [("SCM", "v_prediction"), ("IPNDM", "v_prediction")]


@pytest.mark.parametrize(("name", "kind"), PREDICTING)
def test_gradients_are_the_analytic_slopes(name, kind):
    scheduler = make(name, kind if kind in TABLE[name][2] else None)
    timestep = scheduler.timesteps[0]
    level = TABLE[name][3](scheduler, 0, timestep)
    output, sample = (randn(seed).requires_grad_() for seed in (0, 1))
    found = slopes(predict_x0(scheduler, output, timestep, sample), sample, output)
    for slope, expected in zip(found, ANALYTIC_SLOPES[kind](*level), strict=True):
        torch.testing.assert_close(slope, expected, rtol=2e-4, atol=1e-6)


CLIP = {"clip_sample": True, "clip_sample_range": 0.8}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
BOUNDED = [
    *[(name, CLIP) for name in ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM", "UnCLIP", "Heun")],
    *[(name, {**CLIP, **THRESHOLD}) for name in ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM")],
    *[(name, THRESHOLD) for name in ("DPM++", "DPM", "DPM++ single", "SA", "DEIS", "UniPC", "EDM DPM++")],
]


def x0_of_step(scheduler, said, sample, level):
    """The x0 inside a `step`: reported, kept by the solver, or in the ε that it keeps."""
    reported = said.get("pred_original_sample", said.get("denoised"))
    if reported is not None:
        return reported.double()
    goes_on_with = scheduler.model_outputs[-1]
    a, b = level
    noise = type(scheduler).__name__.startswith("DEIS") or scheduler.config.get("algorithm_type") == "dpmsolver"
    return (sample - b * goes_on_with) / a if noise else goes_on_with


@pytest.mark.parametrize(("name", "bound"), BOUNDED)
def test_bounds_have_the_value_of_the_scheduler_and_the_gradient_of_the_unbounded(name, bound):
    timestep = make(name).timesteps[2]
    level = TABLE[name][3](begun(make(name), 2), 2, timestep)
    output, sample = (randn(seed).requires_grad_() for seed in (0, 1))
    free, bounded = begun(make(name), 2), begun(make(name, **bound), 2)
    x0 = predict_x0(bounded, output, timestep, sample)
    unbounded = predict_x0(free, output, timestep, sample)
    said = step(bounded, output.detach(), timestep, sample.detach())
    torch.testing.assert_close(x0, x0_of_step(bounded, said, sample, level), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(x0, unbounded, atol=0.1)
    assert slopes(x0, sample, output) == slopes(unbounded, sample, output)


def begun(scheduler, index):
    """As an image-to-image pipeline begins."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return scheduler


@pytest.mark.parametrize("name", ["PNDM", "TCD", "Euler", "KDPM2", "UniPC noise"])
def test_a_bound_counts_only_where_the_scheduler_reads_it(name):
    """`from_config` keeps `clip_sample` and `thresholding` of a DDIM scheduler in the config of any other."""
    scheduler = make(name, "epsilon")
    timestep, sample, output = scheduler.timesteps[0], randn(0), randn(1)
    plain = predict_x0(copy.deepcopy(scheduler), output, timestep, sample)
    scheduler.register_to_config(
        **CLIP, **THRESHOLD, use_flow_sigmas=name != "UniPC noise", algorithm_type="dpmsolver++"
    )
    if name == "UniPC noise":
        scheduler.register_to_config(use_flow_sigmas=False)
    torch.testing.assert_close(predict_x0(scheduler, output, timestep, sample), plain, rtol=0, atol=0)


def test_from_config_leaves_the_settings_that_the_tests_above_speak_of():
    ddim = diffusers.DDIMScheduler(clip_sample=True)
    assert diffusers.EulerDiscreteScheduler.from_config(ddim.config).config.clip_sample


@pytest.mark.parametrize(
    "name", ["Euler", "Heun", "KDPM2", "DPM++", "UniPC", "flow Euler", "flow Heun", "IPNDM", "EDM Euler"]
)
def test_begin_index_decides_where_a_pipeline_begins(name):
    scheduler, reference = make(name), make(name)
    output, sample = randn(0), randn(1)
    ours = predict_x0(begun(scheduler, 3), output, scheduler.timesteps[0], sample)
    torch.testing.assert_close(ours, predict_x0(reference, output, reference.timesteps[3], sample), rtol=0, atol=0)
    assert scheduler.step_index == 3


@pytest.mark.parametrize("name", ["DDPM", "DDPMParallel", "UnCLIP"])
def test_a_learned_variance_is_no_part_of_the_prediction(name):
    scheduler = make(name, variance_type="learned_range")
    timestep, sample, output = scheduler.timesteps[2], randn(0), randn(1, (2, 6, 6, 6))
    ours = predict_x0(scheduler, output, timestep, sample)
    reported = step(scheduler, output, timestep, sample).pred_original_sample
    torch.testing.assert_close(ours, reported, rtol=1e-5, atol=1e-5)


def test_the_multistep_solver_learns_a_variance_too():
    scheduler = make("DPM++", variance_type="learned")
    timestep, sample, output = scheduler.timesteps[0], randn(0), randn(1, (2, 6, 6, 6))
    ours = predict_x0(scheduler, output, timestep, sample)
    torch.testing.assert_close(ours, scheduler.convert_model_output(output, sample=sample), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DDIM", "flow map"])
def test_images_of_a_batch_may_be_at_their_own_timesteps(name):
    scheduler = make(name)
    output, sample, timesteps = randn(0), randn(1), scheduler.timesteps[[1, 4]]
    both = predict_x0(scheduler, output, timesteps, sample)
    for i, timestep in enumerate(timesteps):
        one = predict_x0(scheduler, output[i : i + 1], timestep, sample[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], one, rtol=0, atol=0)


def test_sana_sprint_expands_the_timestep_and_divides_by_sigma_data_later():
    scheduler = begun(make("SCM"), 0)
    timestep, sample, output = scheduler.timesteps[0].expand(2), 0.5 * randn(0), 0.5 * randn(1)
    ours = predict_x0(scheduler, output, timestep, sample)
    torch.testing.assert_close(
        ours, step(scheduler, output, timestep, sample).pred_original_sample, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++", "flow Euler"])
def test_half_precision_is_estimated_in_float32(name):
    scheduler = make(name)
    output, sample = (randn(seed).bfloat16() for seed in (0, 1))
    ours = predict_x0(scheduler, output, scheduler.timesteps[0], sample)
    exact = predict_x0(scheduler, output.double(), scheduler.timesteps[0], sample.double())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-4)


def test_v_prediction_has_an_x0_at_zero_snr_and_epsilon_is_refused():
    scheduler = make("DDIM", "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    output = randn(0)
    torch.testing.assert_close(predict_x0(scheduler, output, scheduler.timesteps[0], randn(1)), -output)
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="some signal in the sample of DDIMScheduler .*zero SNR"):
        predict_x0(scheduler, output, scheduler.timesteps[0], randn(1))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("DDIM", "flow_prediction"),
        ("DPM++", "flow_prediction"),
        ("UniPC flow", "v_prediction"),
        ("Euler", "score"),
        ("SCM", "epsilon"),
        ("EDM Euler", "sample"),
    ],
)
def test_a_prediction_without_meaning_at_the_level_of_the_scheduler_is_refused(name, kind):
    scheduler = make(name, kind)
    with pytest.raises(ValueError, match=f"Expected `prediction_type` of {TABLE[name][0]} .* but got '{kind}'"):
        predict_x0(scheduler, randn(0), scheduler.timesteps[0], randn(1))


def test_an_output_of_another_shape_is_refused():
    scheduler = make("Euler")
    with pytest.raises(ValueError, match=r"shape \(2, 3, 6, 6\) of the sample, but got \(2, 6, 6, 6\)"):
        predict_x0(scheduler, randn(0, (2, 6, 6, 6)), scheduler.timesteps[0], randn(1))


@pytest.mark.parametrize("timestep", [1000.0, 333.0], ids=["on the schedule", "beside it"])
def test_a_flow_map_to_the_end_is_the_step_of_its_scheduler(timestep):
    scheduler, velocity, sample = make("flow map"), randn(0), randn(1)
    ours = predict_x0(scheduler, velocity, timestep, sample)
    torch.testing.assert_close(ours, scheduler.step(velocity, timestep, sample, r_timestep=0.0).prev_sample)


def test_the_flow_map_of_gaussian_data_has_its_end_as_x0():
    """For data N(μ, s²) the flow keeps (x − (1−σ)·μ)/√((1−σ)²·s² + σ²), so that x0 = μ + s·(that)."""
    scheduler, mu, s, x = make("flow map"), 0.3, 0.7, randn(1)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        end = mu + s * (x - (1 - sigma) * mu) / ((1 - sigma) ** 2 * s**2 + sigma**2).sqrt()
        torch.testing.assert_close(predict_x0(scheduler, (x - end) / sigma, timestep, x), end)


EXPORTED = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
RECOVERED = {row[0] for row in TABLE.values()}


def test_every_scheduler_that_is_recovered_above_is_one_of_diffusers():
    assert set(EXPORTED) >= RECOVERED and len(EXPORTED) > 40


@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in RECOVERED])
def test_every_other_scheduler_of_diffusers_is_refused_by_name_and_reason(name):
    cls = getattr(diffusers.schedulers, name)
    with pytest.raises(TypeError, match=f"but got {name}, which (?!is not one of them).*FlowMatchEuler") as caught:
        predict_x0(cls.__new__(cls), randn(0), 0, randn(1))
    assert "DDIMScheduler.from_config" in str(caught.value)


def test_a_subclass_counts_as_its_base_also_if_the_base_is_a_copy():
    copied = type("EulerDiscreteScheduler", (diffusers.SchedulerMixin, diffusers.ConfigMixin), {})
    vars_of = {k: v for k, v in vars(diffusers.EulerDiscreteScheduler).items() if k not in ("__dict__", "__weakref__")}
    copied = type("EulerDiscreteScheduler", copied.__bases__, vars_of)
    scheduler = type("MyScheduler", (copied,), {})(**BETAS)
    scheduler.set_timesteps(STEPS)
    assert not isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    output, sample, timestep = randn(0), randn(1), scheduler.timesteps[0]
    expected = predict_x0(make("Euler"), output, timestep, sample)
    torch.testing.assert_close(predict_x0(scheduler, output, timestep, sample), expected)


def test_an_unknown_scheduler_and_a_subclass_of_a_refused_one_are_refused():
    for base, reason in (
        (diffusers.SchedulerMixin, "is not one of them"),
        (diffusers.DDIMInverseScheduler, "runs from"),
    ):
        scheduler = type("MyScheduler", (base,), {"sigmas": torch.ones(3), "alphas_cumprod": torch.ones(3)})
        with pytest.raises(TypeError, match=f"MyScheduler, which {reason}"):
            predict_x0(scheduler.__new__(scheduler), randn(0), 0, randn(1))
