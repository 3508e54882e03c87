"""The table of presets: the method and settings for each model and goal, why, and what is known of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Goal = Literal["diverse", "faithful", "best"]
Length = Literal["one", "few", "many"]
FEW_STEPS = 16  # the most denoising steps of a few-step model
NOT_MEASURED = "not measured on this model"


@dataclasses.dataclass(frozen=True)
class EmbeddedReward:
    """A stand-in for the reward of the shapes world with this name, whose folder is beside that of the pipeline."""

    name: str

    def __repr__(self) -> str:
        return f"shapes_world.path({self.name!r})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetModel:
    """A model, or several of one kind, and how it is recognized.

    Attributes:
        title: The name that is printed.
        pipelines: The names of its pipeline classes; empty for any.
        checkpoints: Parts of the names of its checkpoints, of small letters and digits alone.
        hints: Settings in the configuration of the pipeline or its denoiser that tell it from others of its class.
        call: The recommended arguments of the pipeline's call.
        by_name_only: Whether only the name of a checkpoint tells it.
    """

    title: str
    pipelines: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    hints: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_name_only: bool = False

    @property
    def length(self) -> Length:
        """The length of the chain of denoising steps."""
        return length_of(self.call["num_inference_steps"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """A method for a goal.

    Attributes:
        method: A name of `list_methods()`.
        settings: Its settings, those of memory and speed included; others keep their defaults.
        noise_sampler: The distribution of the noise; `None` for that of the pipeline.
        call: The recommended arguments of the pipeline's call.
        reason: The reason for this method.
        measured: The measured effect on this model, or an empty string.
        published: The effect on this model that a paper reports, or an empty string.
    """

    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    noise_sampler: str | None = None
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str
    measured: str = ""
    published: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(Advice):
    """A method for a goal on a model.

    Attributes:
        goal: "diverse": the images of a prompt differ; "faithful": each shows its prompt; "best": each has a high
            reward for the seconds that it takes.
        model: The model.
    """

    goal: Goal
    model: PresetModel

    @property
    def evidence(self) -> str:
        """The measured effect, or that there is none, and what is published."""
        return self.measured or NOT_MEASURED + f"; published: {self.published}" * bool(self.published)


def length_of(steps: int) -> Length:
    return "one" if steps == 1 else "few" if steps <= FEW_STEPS else "many"


def advised(model: PresetModel, **advice: Advice) -> list[Preset]:
    """Return the presets of a model, one for each goal."""

    def preset(goal: Any, found: Advice) -> Preset:
        return Preset(goal=goal, model=model, **{**vars(found), "call": {**model.call, **found.call}})

    return [preset(goal, found) for goal, found in advice.items()]


def steps_and_guidance(steps: int, guidance: float | None = None, name: str = "guidance_scale") -> dict[str, Any]:
    return {"num_inference_steps": steps, **({} if guidance is None else {name: guidance})}


CNO_OF_PAPER = Advice(
    method="cno",
    settings={"steps": 3, "window_size": 16, "learning_rate": 0.01},
    reason="three more calls of the denoiser, no backward pass, and the settings of CNO's paper",
)
CNO_OF_FEW_STEPS = Advice(
    method="cno",
    settings={"steps": 3, "window_size": 16, "learning_rate": 0.04},
    reason="the first x0 estimate of a distilled model is near its image; the rate is that of the embedded models, "
    "where the paper's hardly moved the sets",
)
PRUNED_GROUP = Advice(
    method="group_selection",
    settings={"steps": 16, "rewards": {"clipscore": 0.01}, "weight": 1.5, "preview": True, "keep": 2},
    reason="chooses the set among 16 noises an image by one call each, without a gradient, and is worth no less than "
    "plain sampling by its own measure; the weight is that of its paper",
)
SAMPLED_GROUP = dataclasses.replace(
    PRUNED_GROUP,
    settings={"steps": 16, "rewards": {"clipscore": 0.01}, "weight": 1.5},
    reason="chooses the set among 16 noises an image, each a single call, without a gradient; the weight is that of "
    "its paper",
)
SETS_OF_TURBO = Advice(
    method="never_too_late",
    settings={
        "steps": 150,
        "diversity": {"dpp": 150.0},
        "rewards": {"hpsv2.1": 3.0},
        "learning_rate": 6.0,
        "max_grad_norm": 0.1,
        "chunk_size": "auto",
    },
    noise_sampler="pink",
    reason="a single step is cheap to differentiate; the settings of It's Never Too Late for SDXL-Turbo",
)
SETS_OF_FLOW = Advice(
    method="never_too_late",
    settings={
        "steps": 80,
        "diversity": {"dpp": 5.0},
        "rewards": {"hpsv2.1": 5.0},
        "guard": {"hpsv2.1": 0.05},
        "warm_up": 20,
        "learning_rate": 2.0,
        "max_grad_norm": 0.15,
        "chunk_size": 1,
    },
    noise_sampler="pink",
    call={"num_inference_steps": 1, "height": 512, "width": 512},
    reason="the settings of It's Never Too Late for FLUX.1-schnell, which optimize a single step, one image at a time",
)
RENO_OF_PAPER = Advice(
    method="reno",
    settings={"rewards": "reno", "steps": 50, "chunk_size": "auto"},
    reason="the four rewards and the 50 evaluations of ReNO's paper; the gradient of a single step is cheap",
)
RENO_OF_ONE_STEP = dataclasses.replace(
    RENO_OF_PAPER, reason="a single step is cheap to differentiate; rewards and evaluations are those of ReNO's paper"
)
JUDGED = Advice(
    method="best_of_n",
    settings={"rewards": "vqascore", "steps": 16},
    reason="a vision-language model chooses among 16 seeds, without a gradient: on a FLUX flow map best-of-N beat ReNO "
    "at equal calls",
)
JUDGED_MANY_STEPS = dataclasses.replace(
    JUDGED,
    settings={"rewards": "vqascore", "steps": 8},
    reason="a vision-language model chooses among 8 seeds: one more costs less than a gradient through a long chain",
)
JUDGED_ROUNDS = Advice(
    method="noise_diffusion",
    settings={"rewards": "vqascore", "steps": 21, "threshold": 0.95},
    reason="a vision-language model chooses the noise, by a gradient through decoder and judge alone; fewer rounds "
    "than in the paper, and none after a score of .95",
)
ONE_STEP_BEST = Advice(
    method="best_of_n",
    settings={"rewards": "hpsv2.1", "steps": 50},
    reason="no backward pass; the best of 50 seeds is 2.2 standard deviations above the mean reward",
)
FEW_STEPS_BEST = Advice(
    method="best_of_n",
    settings={"rewards": "hpsv2.1", "steps": 16},
    reason="no backward pass; the best of 16 seeds is 1.8 standard deviations above the mean reward, of 100 only 2.5",
)
MANY_STEPS_BEST = Advice(
    method="best_of_n",
    settings={"rewards": "hpsv2.1", "steps": 8},
    reason="no backward pass; the best of 8 seeds is 1.4 standard deviations above the mean reward",
)


def embedded_model(name: str, pipeline: str, call: dict[str, Any]) -> PresetModel:
    return PresetModel(
        title=f"shapes-{name}",
        pipelines=(pipeline,),
        checkpoints=tuple(letters(f"{place}{name}") for place in ("shapes_world/weights/", "shapes-")),
        call=call,
        by_name_only=True,
    )


def letters(text: str) -> str:
    """Return the letters and digits of a text, in lower case."""
    return "".join(each for each in text.lower() if each.isalnum())


# Measured figures are of the files behind the README, "Does it work?", which has the commands.
CLIP_OF_SHAPES, VQA_OF_SHAPES = EmbeddedReward("clip"), EmbeddedReward("vqa")
SHAPES_SETS = Advice(
    method="never_too_late",
    settings={
        "steps": 36,
        "search": 26,
        "geometry": "white",
        "diversity": {"pairwise": ("tiny_image", 26.0)},
        "rewards": CLIP_OF_SHAPES,
        "guard": {"clipscore": {"threshold": 11.0}},  # what the embedded reward calls itself
    },
    reason="a search finds a good set, and ten steps on white noise make it differ",
)
SHAPES_CNO = Advice(
    method="cno",
    settings={"steps": 3, "window_size": 8, "learning_rate": 0.04},
    reason="three more calls of the denoiser; at the paper's rate the sets hardly change",
)
SHAPES_SEEDS = Advice(
    method="best_of_n",
    settings={"rewards": CLIP_OF_SHAPES, "steps": 50},
    reason="the reward tells right from wrong, and most prompts have a right image among a few seeds",
)
SHAPES_JUDGED = Advice(
    method="best_of_n",
    settings={"rewards": VQA_OF_SHAPES, "steps": 21},
    reason="no gradient; Noise Diffusion gains nothing over it here",
)
SHAPES_FEW_SEEDS = dataclasses.replace(SHAPES_SEEDS, settings={"rewards": CLIP_OF_SHAPES, "steps": 16})
SHAPES_MEASURED = "on 32 held-out prompts 100% of images right instead of 34%, reward 14.4 instead of 7.8, in .7 s each"
EMBEDDED_PRESETS = [
    *advised(
        embedded_model("turbo", "StableDiffusionPipeline", steps_and_guidance(1, 0.0)),
        diverse=dataclasses.replace(
            SHAPES_SETS, measured="on 40 held-out prompts MSS .71 → .38 and right 41% → 88%, against plain sampling"
        ),
        faithful=dataclasses.replace(SHAPES_SEEDS, measured=SHAPES_MEASURED),
        best=dataclasses.replace(SHAPES_SEEDS, measured=SHAPES_MEASURED),
    ),
    *advised(
        embedded_model("guided", "StableDiffusionPipeline", steps_and_guidance(20, 5.0)),
        diverse=dataclasses.replace(
            SHAPES_CNO, measured="on 165 held-out prompts MSS .70 → .49 and right 45% → 41%, against plain sampling"
        ),
        faithful=dataclasses.replace(
            SHAPES_JUDGED, measured="on 64 held-out prompts right 42% → 94% at 10 sampling steps, Noise Diffusion 92%"
        ),
        best=SHAPES_FEW_SEEDS,
    ),
    *advised(
        embedded_model("sdxl-turbo", "StableDiffusionXLPipeline", steps_and_guidance(1, 0.0)),
        diverse=SHAPES_SETS,
        faithful=SHAPES_SEEDS,
        best=SHAPES_SEEDS,
    ),
    *advised(
        embedded_model("sdxl", "StableDiffusionXLPipeline", steps_and_guidance(20, 5.0)),
        diverse=SHAPES_CNO,
        faithful=SHAPES_JUDGED,
        best=SHAPES_FEW_SEEDS,
    ),
    *advised(
        embedded_model("sd3", "StableDiffusion3Pipeline", steps_and_guidance(20, 3.0) | {"max_sequence_length": 16}),
        diverse=SHAPES_CNO,
        faithful=SHAPES_JUDGED,
        best=SHAPES_FEW_SEEDS,
    ),
]

HYPERNOISE = "in the table of HyperNoise's paper"
STABLE_DIFFUSION_PRESETS = [
    *advised(
        PresetModel(
            title="Stable Diffusion 1.5",
            pipelines=("StableDiffusionPipeline",),
            checkpoints=("stablediffusionv1", "stablediffusion15", "sd15", "sdv15"),
            call=steps_and_guidance(50, 7.5),
        ),
        diverse=dataclasses.replace(
            CNO_OF_PAPER,
            call={"guidance_scale": 6.0},
            published="MSS .166 → .132 and Vendi 4.69 → 4.79 of 5, CNO's paper",
        ),
        faithful=dataclasses.replace(
            JUDGED_ROUNDS,
            published="VQA score .70 → .98 of its own judge in 50 rounds on Stable Diffusion, Noise Diffusion's paper",
        ),
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="Stable Diffusion 2.1",
            pipelines=("StableDiffusionPipeline",),
            checkpoints=("stablediffusion2", "stablediffusionv2", "sd21"),
            call=steps_and_guidance(50, 7.5),
        ),
        diverse=CNO_OF_PAPER,
        faithful=JUDGED_ROUNDS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="SD-Turbo",
            pipelines=("StableDiffusionPipeline",),
            checkpoints=("sdturbo",),
            call=steps_and_guidance(1, 0.0),
        ),
        diverse=SETS_OF_TURBO,
        faithful=dataclasses.replace(
            RENO_OF_PAPER, published=f"GenEval .49 → .63 in 20 s, best-of-N .60 in 10 s, {HYPERNOISE}"
        ),
        best=dataclasses.replace(
            ONE_STEP_BEST, published=f"GenEval .49 → .60 in 10 s by other rewards, ReNO .63 in 20 s, {HYPERNOISE}"
        ),
    ),
    *advised(
        PresetModel(
            title="SDXL",
            pipelines=("StableDiffusionXLPipeline",),
            checkpoints=("stablediffusionxl", "sdxlbase"),
            call=steps_and_guidance(50, 5.0),
        ),
        diverse=dataclasses.replace(
            CNO_OF_PAPER, call={"guidance_scale": 6.0}, published="MSS .217 → .162, CNO's paper"
        ),
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="SDXL of few steps (Lightning, Hyper-SD, LCM)",
            pipelines=("StableDiffusionXLPipeline",),
            checkpoints=("sdxllightning", "hypersd", "lcmsdxl"),
            call=steps_and_guidance(4, 0.0),
        ),
        diverse=CNO_OF_FEW_STEPS,
        faithful=JUDGED,
        best=FEW_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="SDXL-Turbo",
            pipelines=("StableDiffusionXLPipeline",),
            checkpoints=("sdxlturbo",),
            call=steps_and_guidance(1, 0.0),
        ),
        diverse=dataclasses.replace(
            SETS_OF_TURBO, published="DreamSim .26 → .47 and HPSv2 .284 → .288, It's Never Too Late"
        ),
        faithful=dataclasses.replace(RENO_OF_PAPER, published="GenEval .54 → .65, ReNO's paper"),
        best=ONE_STEP_BEST,
    ),
    *advised(
        PresetModel(
            title="Stable Diffusion 3",
            pipelines=("StableDiffusion3Pipeline",),
            checkpoints=("stablediffusion3medium", "sd3medium"),
            call=steps_and_guidance(28, 7.0),
        ),
        diverse=dataclasses.replace(CNO_OF_PAPER, published="Vendi 4.22 → 4.26 of 5, CNO's paper"),
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="Stable Diffusion 3.5",
            pipelines=("StableDiffusion3Pipeline",),
            checkpoints=("stablediffusion35", "sd35"),
            call=steps_and_guidance(40, 4.5),
        ),
        diverse=CNO_OF_PAPER,
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="Stable Diffusion 3.5 Large Turbo",
            pipelines=("StableDiffusion3Pipeline",),
            checkpoints=("stablediffusion35largeturbo", "sd35largeturbo"),
            call=steps_and_guidance(4, 0.0),
        ),
        diverse=PRUNED_GROUP,
        faithful=JUDGED,
        best=FEW_STEPS_BEST,
    ),
]
FLUX_PRESETS = [
    *advised(
        PresetModel(
            title="FLUX.1 [dev]",
            pipelines=("FluxPipeline",),
            checkpoints=("flux1dev", "flux1krea"),
            hints={"guidance_embeds": True},
            call=steps_and_guidance(28, 3.5),
        ),
        diverse=CNO_OF_PAPER,
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="FLUX.1 [schnell]",
            pipelines=("FluxPipeline",),
            checkpoints=("flux1schnell",),
            hints={"guidance_embeds": False},
            call=steps_and_guidance(4, 0.0),
        ),
        diverse=dataclasses.replace(
            SETS_OF_FLOW, published="DreamSim .31 → .50 and HPSv2 .304 → .279, It's Never Too Late"
        ),
        faithful=JUDGED,
        best=FEW_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="FLUX.2 [dev]",
            pipelines=("Flux2Pipeline",),
            checkpoints=("flux2dev",),
            call=steps_and_guidance(50, 4.0),
        ),
        diverse=CNO_OF_PAPER,
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="FLUX.2 [klein]",
            pipelines=("Flux2KleinPipeline", "Flux2KleinKVPipeline"),
            checkpoints=("flux2klein",),
            hints={"is_distilled": True},
            call=steps_and_guidance(4, 1.0),
        ),
        diverse=PRUNED_GROUP,
        faithful=JUDGED,
        best=FEW_STEPS_BEST,
    ),
    *advised(
        PresetModel(
            title="FLUX.2 [klein] of one step (RDM)",
            pipelines=("Flux2KleinPipeline",),
            checkpoints=("flux2klein1step",),
            call=steps_and_guidance(1, 1.0) | {"height": 512, "width": 512},
        ),
        diverse=dataclasses.replace(
            SETS_OF_FLOW,
            settings={
                "steps": 70,
                "diversity": {"dpp_patch": 15.0},
                "rewards": {"hpsv2.1": 5.0, "clipscore": 0.01},
                "guard": {"hpsv2.1": 0.05},
                "learning_rate": 3.0,
                "max_grad_norm": 0.15,
                "chunk_size": 1,
            },
            noise_sampler=None,
            reason="a single step is cheap to differentiate; objective and rate are those of It's Never Too Late for "
            "FLUX.2 [klein], image by image and at four steps there",
        ),
        faithful=dataclasses.replace(RENO_OF_ONE_STEP, settings={**RENO_OF_ONE_STEP.settings, "chunk_size": 1}),
        best=ONE_STEP_BEST,
    ),
    *advised(
        PresetModel(
            title="FLUX.2 [klein] base",
            pipelines=("Flux2KleinPipeline",),
            checkpoints=("flux2kleinbase",),
            hints={"is_distilled": False},
            call=steps_and_guidance(50, 4.0),
        ),
        diverse=CNO_OF_PAPER,
        faithful=JUDGED_MANY_STEPS,
        best=MANY_STEPS_BEST,
    ),
]


def few_steps(model: PresetModel, **changed: Advice) -> list[Preset]:
    """Return the presets of a distilled model of few steps."""
    return advised(model, **{"diverse": CNO_OF_FEW_STEPS, "faithful": JUDGED, "best": FEW_STEPS_BEST, **changed})


def many_steps(model: PresetModel) -> list[Preset]:
    """Return the presets of a model of many steps."""
    return advised(model, diverse=CNO_OF_PAPER, faithful=JUDGED_MANY_STEPS, best=MANY_STEPS_BEST)


def model_of(title: str, pipeline: str, checkpoints: str, call: dict[str, Any], **hints: Any) -> PresetModel:
    """Return a model of one pipeline class that is recognized by parts of its checkpoint's name, or by hints."""
    return PresetModel(
        title=title, pipelines=(pipeline,), checkpoints=tuple(checkpoints.split()), call=call, hints=hints
    )


TRUE_GUIDANCE, DISTILLED_GUIDANCE = "true_cfg_scale", "distilled_guidance_scale"
MODERN_PRESETS = [
    *few_steps(model_of("Z-Image-Turbo", "ZImagePipeline", "zimageturbo", steps_and_guidance(9, 0.0))),
    *many_steps(model_of("Z-Image", "ZImagePipeline", "zimage", steps_and_guidance(50, 4.0))),
    *many_steps(model_of("Qwen-Image", "QwenImagePipeline", "qwenimage", steps_and_guidance(50, 4.0, TRUE_GUIDANCE))),
    *few_steps(
        model_of(
            "Qwen-Image-Lightning",
            "QwenImagePipeline",
            "qwenimagelightning qwenimage2512lightning",
            steps_and_guidance(8, 1.0, TRUE_GUIDANCE),
        )
    ),
    *few_steps(model_of("Krea 2 Turbo", "Krea2Pipeline", "krea2turbo", steps_and_guidance(8, 0.0), is_distilled=True)),
    *many_steps(model_of("Krea 2", "Krea2Pipeline", "krea2", steps_and_guidance(28, 4.5), is_distilled=False)),
    *few_steps(
        model_of("Sana-Sprint", "SanaSprintPipeline", "sanasprint", steps_and_guidance(2, 4.5)),
        diverse=PRUNED_GROUP,
        faithful=Advice(
            method="best_of_n",
            settings={"rewards": "reno", "steps": 50},
            reason="no backward pass, for almost the same as ReNO in half of the time",
            published=f"GenEval .70 → .79 in 15 s, ReNO .81 in 30 s, {HYPERNOISE}",
        ),
    ),
    *many_steps(model_of("Sana", "SanaPipeline", "sana", steps_and_guidance(20, 4.5))),
    *advised(
        PresetModel(
            title="PixArt-α DMD",
            pipelines=("PixArtAlphaPipeline",),
            checkpoints=("pixartalphadmd",),
            call=steps_and_guidance(1, 0.0) | {"timesteps": [400], "height": 512, "width": 512},
        ),
        diverse=SETS_OF_TURBO,
        faithful=dataclasses.replace(RENO_OF_PAPER, published="GenEval .45 → .59, ReNO's paper"),
        best=ONE_STEP_BEST,
    ),
    *many_steps(model_of("PixArt-α", "PixArtAlphaPipeline", "pixart", steps_and_guidance(20, 4.5))),
    *many_steps(model_of("PixArt-Σ", "PixArtSigmaPipeline", "pixartsigma", steps_and_guidance(20, 4.5))),
    *few_steps(model_of("HiDream-I1 Fast", "HiDreamImagePipeline", "i1fast", steps_and_guidance(16, 0.0))),
    *many_steps(model_of("HiDream-I1 Dev", "HiDreamImagePipeline", "i1dev", steps_and_guidance(28, 0.0))),
    *many_steps(model_of("HiDream-I1 Full", "HiDreamImagePipeline", "i1full", steps_and_guidance(50, 5.0))),
    *few_steps(
        model_of(
            "HunyuanImage 2.1 Distilled",
            "HunyuanImagePipeline",
            "hunyuanimage21distilled",
            steps_and_guidance(8, 3.25, DISTILLED_GUIDANCE),
            guidance_embeds=True,
        )
    ),
    *many_steps(
        model_of(
            "HunyuanImage 2.1", "HunyuanImagePipeline", "hunyuanimage21", steps_and_guidance(50), guidance_embeds=False
        )
    ),
    *few_steps(model_of("PRX distilled", "PRXPipeline", "sftdistilled", steps_and_guidance(8, 1.0))),
    *many_steps(model_of("PRX", "PRXPipeline", "prx", steps_and_guidance(28, 5.0))),
    *many_steps(model_of("Chroma", "ChromaPipeline", "chroma", steps_and_guidance(35, 5.0))),
    *many_steps(model_of("Lumina 2", "Lumina2Pipeline", "lumina", steps_and_guidance(50, 4.0))),
]
FALLBACKS = {
    "one": advised(
        PresetModel(title="any model of one step", call=steps_and_guidance(1)),
        diverse=SAMPLED_GROUP,
        faithful=RENO_OF_ONE_STEP,
        best=ONE_STEP_BEST,
    ),
    "few": few_steps(
        PresetModel(title=f"any model of 2 to {FEW_STEPS} steps", call=steps_and_guidance(4)), diverse=PRUNED_GROUP
    ),
    "many": many_steps(PresetModel(title="any model of more steps", call=steps_and_guidance(50))),
}
MODEL_PRESETS = [*EMBEDDED_PRESETS, *STABLE_DIFFUSION_PRESETS, *FLUX_PRESETS, *MODERN_PRESETS]
