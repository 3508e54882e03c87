"""Rows and columns of the README's compatibility tables; each cell is one test."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A row: a pipeline class, the models it runs, and the scheduler of its tiny pipeline."""

    pipeline: str
    models: str
    scheduler: str


class Column(NamedTuple):
    """A registered method, its gradient mode, and its heading."""

    method: str
    gradient: str
    heading: str


class Scheduler(NamedTuple):
    """A row of the second table: a scheduler class and its settings."""

    name: str
    settings: Mapping[str, Any] = {}


WITH_UNET = {
    "sd": Family("StableDiffusionPipeline", "SD 1.5, SD-Turbo", "EulerDiscreteScheduler"),
    "sdxl": Family("StableDiffusionXLPipeline", "SDXL, SDXL-Turbo", "EulerAncestralDiscreteScheduler"),
    "lightning_sdxl": Family("StableDiffusionXLPipeline", "SDXL-Lightning", "EulerDiscreteScheduler"),
    "hyper_sdxl": Family("StableDiffusionXLPipeline", "Hyper-SDXL, one step", "LCMScheduler"),
    "tcd_sdxl": Family("StableDiffusionXLPipeline", "Hyper-SDXL", "TCDScheduler"),
    "controlnet_sdxl": Family("StableDiffusionXLControlNetPipeline", "SDXL", "EulerAncestralDiscreteScheduler"),
    "img2img_sdxl": Family("StableDiffusionXLImg2ImgPipeline", "SDXL", "EulerDiscreteScheduler"),
    "lcm": Family("LatentConsistencyModelPipeline", "LCM", "LCMScheduler"),
}
WITH_TRANSFORMER = {
    "sd3": Family("StableDiffusion3Pipeline", "SD 3, 3.5", "FlowMatchEulerDiscreteScheduler"),
    "flux": Family("FluxPipeline", "FLUX.1 with true guidance", "FlowMatchEulerDiscreteScheduler"),
    "flux_distilled": Family("FluxPipeline", "FLUX.1 [schnell], [dev]", "FlowMatchEulerDiscreteScheduler"),
    "img2img_flux": Family("FluxImg2ImgPipeline", "FLUX.1", "FlowMatchEulerDiscreteScheduler"),
    "flux2_klein": Family("Flux2KleinPipeline", "FLUX.2 [klein]", "FlowMatchEulerDiscreteScheduler"),
    "qwen_image": Family("QwenImagePipeline", "Qwen-Image", "FlowMatchEulerDiscreteScheduler"),
    "z_image": Family("ZImagePipeline", "Z-Image", "FlowMatchEulerDiscreteScheduler"),
    "lumina2": Family("Lumina2Pipeline", "Lumina 2", "FlowMatchEulerDiscreteScheduler"),
    "pixart_sigma": Family("PixArtSigmaPipeline", "PixArt-Σ", "DPMSolverMultistepScheduler"),
    "sana": Family("SanaPipeline", "Sana", "DPMSolverMultistepScheduler"),
    "sana_sprint": Family("SanaSprintPipeline", "Sana-Sprint", "SCMScheduler"),
}
FAMILIES = {**WITH_UNET, **WITH_TRANSFORMER}
FLOW = "FlowMatchEulerDiscreteScheduler"
OTHERS = {
    "flux2": Family("Flux2Pipeline", "FLUX.2 [dev]", FLOW),
    "krea2": Family("Krea2Pipeline", "Krea 2", FLOW),
    "chroma": Family("ChromaPipeline", "Chroma", FLOW),
    "hunyuan_image": Family("HunyuanImagePipeline", "HunyuanImage 2.1", FLOW),
    "longcat": Family("LongCatImagePipeline", "LongCat-Image", FLOW),
    "glm_image": Family("GlmImagePipeline", "GLM-Image", FLOW),
    "hidream": Family("HiDreamImagePipeline", "HiDream-I1", FLOW),
    "bria_fibo": Family("BriaFiboPipeline", "Bria Fibo", FLOW),
    "kandinsky5": Family("Kandinsky5T2IPipeline", "Kandinsky 5", FLOW),
    "prx": Family("PRXPipeline", "PRX", FLOW),
    "bria": Family("BriaPipeline", "Bria 3.2", FLOW),
    "ovis": Family("OvisImagePipeline", "Ovis-Image", FLOW),
    "aura_flow": Family("AuraFlowPipeline", "AuraFlow", FLOW),
    "cogview4": Family("CogView4Pipeline", "CogView4", FLOW),
}
"""Families that `builders.py` builds by their class."""
VIDEOS = {
    "wan": Family("WanPipeline", "Wan 2.1", "UniPCMultistepScheduler"),
    "wan22": Family("WanPipeline", "Wan 2.2, two transformers", "UniPCMultistepScheduler"),
    "cogvideox": Family("CogVideoXPipeline", "CogVideoX-2B", "CogVideoXDDIMScheduler"),
    "cogvideox_dpm": Family("CogVideoXPipeline", "CogVideoX-5B", "CogVideoXDPMScheduler"),
    "ltx": Family("LTXPipeline", "LTX-Video 0.9", "FlowMatchEulerDiscreteScheduler"),
    "ltx_timed": Family("LTXPipeline", "LTX-Video from 0.9.1 on", "FlowMatchEulerDiscreteScheduler"),
    "hunyuan_video": Family("HunyuanVideoPipeline", "HunyuanVideo", "FlowMatchEulerDiscreteScheduler"),
}
EVERY_FAMILY = {**FAMILIES, **OTHERS, **VIDEOS}
MODULAR = {
    "sdxl": Family("StableDiffusionXLModularPipeline", "SDXL", "EulerAncestralDiscreteScheduler"),
    "turbo_sdxl": Family("StableDiffusionXLModularPipeline", "SDXL-Turbo", "EulerAncestralDiscreteScheduler"),
    "sd3": Family("StableDiffusion3ModularPipeline", "SD 3, 3.5", FLOW),
    "flux": Family("FluxModularPipeline", "FLUX.1", FLOW),
    "flux_kontext": Family("FluxKontextModularPipeline", "FLUX.1 Kontext, without an image", FLOW),
    "flux2": Family("Flux2ModularPipeline", "FLUX.2 [dev]", FLOW),
    "flux2_klein": Family("Flux2KleinModularPipeline", "FLUX.2 [klein]", FLOW),
    "flux2_klein_base": Family("Flux2KleinBaseModularPipeline", "FLUX.2 [klein] base", FLOW),
    "flux3": Family("Flux3ModularPipeline", "FLUX.3", FLOW),
    "flux3_distilled": Family("Flux3DistilledModularPipeline", "FLUX.3, step-distilled", FLOW),
    "z_image": Family("ZImageModularPipeline", "Z-Image", FLOW),
    "qwen_image": Family("QwenImageModularPipeline", "Qwen-Image", FLOW),
    "qwen_image21": Family("QwenImage21ModularPipeline", "Qwen-Image-2.1", FLOW),
    "qwen_image21_turbo": Family("QwenImage21TurboModularPipeline", "Qwen-Image-2.1 Turbo", FLOW),
    "krea2": Family("Krea2ModularPipeline", "Krea 2", FLOW),
    "krea2_turbo": Family("Krea2TurboModularPipeline", "Krea 2 Turbo", FLOW),
    "anima": Family("AnimaModularPipeline", "Anima", FLOW),
    "ernie_image": Family("ErnieImageModularPipeline", "ERNIE-Image", FLOW),
}
"""Rows of the table of modular pipelines, from text to image."""

COLUMNS = {
    "reno-full": Column("reno", "full", "ReNO"),
    "reno-frozen": Column("reno", "frozen", "ReNO"),
    "reno-preview": Column("reno", "preview", "ReNO"),
    "cno-frozen": Column("cno", "frozen", "CNO"),
    "cno-full": Column("cno", "full", "CNO"),
    "noise_diffusion-frozen": Column("noise_diffusion", "frozen", "Noise Diffusion"),
    "never_too_late-full": Column("never_too_late", "full", "Never Too Late"),
    "noise_pgd-frozen": Column("noise_pgd", "frozen", "PGD"),
    "mean_variance-frozen": Column("mean_variance", "frozen", "mean, variance"),
    "best_of_n-none": Column("best_of_n", "none", "best of N"),
    "best_of_n-preview": Column("best_of_n", "preview", "best of N"),
    "zero_order_search-none": Column("zero_order_search", "none", "zero-order"),
    "pcn-none": Column("pcn", "none", "pCN"),
    "group_selection-none": Column("group_selection", "none", "group selection"),
    "group_selection-preview": Column("group_selection", "preview", "group selection"),
}

TOOLS = {"embedding_noise": "embedding noise", "diversity_boost": "DiversityBoost"}
"""Headings of the tools that change denoising steps; `tests/pipelines/seed_variance` has the tests of their cells.

Of modular pipelines `tests/pipelines/test_modular.py` has them; those have no embedding noise.
"""


def in_fast_tier(family: str, column: str, families: Mapping[str, Family] = EVERY_FAMILY) -> bool:
    """Return True for three columns of each standard family and three families of each column, as in a Latin square.

    Further, modular and video families have one column each.
    """
    period = 5 if families is EVERY_FAMILY and family in FAMILIES else len(COLUMNS)
    return (list(families).index(family) - list(COLUMNS).index(column)) % period == 0


SCHEDULERS = {
    "ddim": Scheduler("DDIMScheduler"),
    "ddpm": Scheduler("DDPMScheduler"),
    "pndm": Scheduler("PNDMScheduler"),
    "euler": Scheduler("EulerDiscreteScheduler"),
    "euler_ancestral": Scheduler("EulerAncestralDiscreteScheduler"),
    "heun": Scheduler("HeunDiscreteScheduler"),
    "lcm": Scheduler("LCMScheduler"),
    "tcd": Scheduler("TCDScheduler"),
    "dpm": Scheduler("DPMSolverMultistepScheduler"),
    "sde_dpm": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Scheduler("UniPCMultistepScheduler"),
    "flow_euler": Scheduler("FlowMatchEulerDiscreteScheduler"),
    "flow_heun": Scheduler("FlowMatchHeunDiscreteScheduler"),
    "flow_euler_stochastic": Scheduler("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "zero_snr": Scheduler(
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "video": Scheduler("CogVideoXDDIMScheduler"),
}
GRADIENTS = ("full", "frozen", "x0", "none")


def scheduler_in_fast_tier(scheduler: str, gradient: str) -> bool:
    """Return True for what is refused, and for two gradient modes of each scheduler in turn."""
    index = list(SCHEDULERS).index(scheduler) + GRADIENTS.index(gradient)
    return index % 2 == 0 or (scheduler, gradient) in REFUSED


OTHER_STREAM = (
    "the pipeline passes it no generator, so that no two evaluations would see the same noise: refused by name"
)
NO_DEPENDENCE = (
    "with zero terminal SNR and a frozen denoiser, the first x0 estimate does not depend on the noise: refused by "
    "name; `CNO(gradient='full')` works"
)
NOISE_REPLACED = (
    "with zero terminal SNR, the first step of this stochastic solver replaces the noise, which acts through the "
    "denoiser only: refused by name; `gradient='full'` works where the method has it"
)
REWARDED_FROZEN = ("reno", "noise_diffusion", "noise_pgd", "mean_variance")
REFUSED = {
    **{("flow_euler_stochastic", gradient): OTHER_STREAM for gradient in ("full", "frozen", "none")},
    ("zero_snr", "x0"): NO_DEPENDENCE,
}
"""Reasons of refusals by scheduler and gradient mode."""
REFUSED_VIDEOS = {
    **{(family, "cno-frozen"): NO_DEPENDENCE for family in ("cogvideox", "cogvideox_dpm")},
    **{("cogvideox_dpm", f"{each}-frozen"): NOISE_REPLACED for each in REWARDED_FROZEN},
}
"""Reasons of refusals by video pipeline and column."""
REASONS = list(dict.fromkeys([*REFUSED.values(), *REFUSED_VIDEOS.values()]))
