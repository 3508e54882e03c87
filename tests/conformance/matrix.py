"""What is claimed to work with what: the rows and columns of the README's tables, each cell of which is one test."""

from typing import NamedTuple


class Family(NamedTuple):
    """A row: the pipeline class, which models it draws, and the scheduler that its tiny pipeline has."""

    pipeline: str
    models: str
    scheduler: str


class Column(NamedTuple):
    """A method as it is registered, the route of its gradient, and its heading."""

    method: str
    route: str
    heading: str


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
    "flux2_klein": Family("Flux2KleinPipeline", "FLUX.2 [klein]", "FlowMatchEulerDiscreteScheduler"),
    "qwen_image": Family("QwenImagePipeline", "Qwen-Image", "FlowMatchEulerDiscreteScheduler"),
    "z_image": Family("ZImagePipeline", "Z-Image", "FlowMatchEulerDiscreteScheduler"),
    "lumina2": Family("Lumina2Pipeline", "Lumina 2", "FlowMatchEulerDiscreteScheduler"),
    "pixart_sigma": Family("PixArtSigmaPipeline", "PixArt-Σ", "DPMSolverMultistepScheduler"),
    "sana": Family("SanaPipeline", "Sana", "DPMSolverMultistepScheduler"),
    "sana_sprint": Family("SanaSprintPipeline", "Sana-Sprint", "SCMScheduler"),
}
FAMILIES = {**WITH_UNET, **WITH_TRANSFORMER}
COLUMNS = {
    "reno-full": Column("reno", "full", "ReNO"),
    "reno-frozen": Column("reno", "frozen", "ReNO"),
    "reno-preview": Column("reno", "preview", "ReNO"),
    "cno-frozen": Column("cno", "frozen", "CNO"),
    "cno-full": Column("cno", "full", "CNO"),
    "noise_diffusion-frozen": Column("noise_diffusion", "frozen", "Noise Diffusion"),
    "never_too_late-full": Column("never_too_late", "full", "Never Too Late"),
    "noise_pgd-frozen": Column("noise_pgd", "frozen", "PGD"),
    "mean_variance-frozen": Column("mean_variance", "frozen", "mean/ variance"),
    "best_of_n-none": Column("best_of_n", "none", "best of N"),
    "best_of_n-preview": Column("best_of_n", "preview", "best of N"),
    "zero_order_search-none": Column("zero_order_search", "none", "zero- order"),
    "pcn-none": Column("pcn", "none", "pCN"),
    "group_selection-none": Column("group_selection", "none", "group selection"),
    "group_selection-preview": Column("group_selection", "preview", "group selection"),
}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "sde_dpm": 'DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")',
    "dpm_sde": "DPMSolverSDEScheduler(noise_sampler_seed=0)",
    "dpm_sde_unseeded": "DPMSolverSDEScheduler()",
    "unipc": "UniPCMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "flow_euler_stochastic": "FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)",
    "flow_heun": "FlowMatchHeunDiscreteScheduler",
    "zero_snr": 'DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), v-prediction',
    "video": "CogVideoXDDIMScheduler",
}
ROUTES = {"full": "full", "frozen": "frozen", "x0": "frozen, x0", "none": "none"}

OTHER_STREAM = "draws noise that comes from no generator, so no two evaluations would see the same: refused by name"
NO_DEPENDENCE = (
    "the first x0 estimate does not depend on the noise where the terminal SNR is zero and the output of the denoiser "
    "is held constant: refused by name, use `CNO(stop_gradient=False)`"
)
NO_ESTIMATE = "has no x0 estimate: refused by name"
REFUSED = {
    **{("dpm_sde_unseeded", route): OTHER_STREAM for route in ("full", "frozen", "none")},
    **{("flow_euler_stochastic", route): OTHER_STREAM for route in ("full", "frozen", "none")},
    ("zero_snr", "x0"): NO_DEPENDENCE,
    ("video", "x0"): NO_ESTIMATE,
}
"""Scheduler and route to the reason why they are refused."""
