"""The table of `noiseopt rewards`: every name, what it measures, and the facts of its class.

Written down so that listing them imports neither torch nor transformers; `tests/test_scoring.py` compares it with the
classes.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One name.

    Attributes:
        name: The name that users pass.
        measures: The meaning of a higher value, or of features.
        kind: "reward" (of an image), "preset" (several rewards with weights), "embedded reward" (of the images of
            embedded models), "set reward" (the diversity of the images of a prompt), or "features" (for set rewards).
        checkpoint: The Hub id that the name loads; `None` without weights, or where a folder must be given.
        weights_file: The file with the weights, if it is not in transformers' format.
        license: The license of the checkpoint.
        range: Lowest and highest value, if bounded.
        differentiable: Whether it has a gradient.
        requires_prompt: Whether it reads a prompt.
        parameters: The number of parameters.
        package: The optional package that provides the weights, of the extra of the same name.
    """

    name: str
    measures: str
    kind: str = "reward"
    checkpoint: str | None = None
    weights_file: str | None = None
    license: str | None = None
    range: tuple[float, float] | None = None
    differentiable: bool = True
    requires_prompt: bool = False
    parameters: int = 0
    package: str | None = None

    @property
    def gibibytes(self) -> float:
        """The size of the weights in bfloat16, in GiB; twice as much in float32."""
        return self.parameters * 2 / GIB

    def cells(self) -> list[str]:
        """Format the row for the printed table."""
        low, high = self.range or (0.0, 0.0)
        source = self.checkpoint or (f"file {self.weights_file}" if self.weights_file else None)
        return [
            self.name,
            self.kind,
            self.measures,
            f"{low:g} … {high:g}" if self.range else "open",
            "yes" if self.differentiable else "no",
            "yes" if self.requires_prompt else "no",
            f"{self.gibibytes:.2f}" if self.parameters else "–",
            source or (f"package {self.package}" if self.package else "–"),
            self.license or "–",
        ]


HEAD = ("name", "kind", "measures", "range", "gradient", "prompt", "GiB in bfloat16", "checkpoint", "license")
ROWS = (
    Row(
        "aesthetic",
        "how much people like it, without a prompt: LAION v2",
        checkpoint="ttj/sac-logos-ava1-l14-linearMSE",
        weights_file="sac+logos+ava1-l14-linearMSE.pth",
        license="apache-2.0",
        parameters=304_894_177,
    ),
    Row(
        "aesthetic_v1",
        "how much people like it, without a prompt: LAION v1",
        weights_file="sa_0_4_vit_l_14_linear.pth",
        license="mit",
        parameters=303_966_977,
    ),
    Row(
        "blip_itc",
        "image and prompt agree: cosine, BLIP",
        checkpoint="Salesforce/blip-itm-base-coco",
        license="bsd-3-clause",
        range=(-1.0, 1.0),
        requires_prompt=True,
        parameters=223_744_258,
    ),
    Row(
        "blip_itm",
        "image and prompt agree: probability, BLIP",
        checkpoint="Salesforce/blip-itm-base-coco",
        license="bsd-3-clause",
        range=(0.0, 1.0),
        requires_prompt=True,
        parameters=223_744_258,
    ),
    Row(
        "blip_vqa",
        "probability that BLIP answers yes to the prompt",
        checkpoint="Salesforce/blip-vqa-base",
        license="bsd-3-clause",
        range=(0.0, 1.0),
        requires_prompt=True,
        parameters=361_230_140,
    ),
    Row("blue", "blue dominates", range=(-2.0, 1.0)),
    Row("brightness", "how bright the image is", range=(0.0, 1.0)),
    Row(
        "clip_flant5",
        "probability of yes to the prompt: VQAScore's model",
        checkpoint="zhiqiulin/clip-flant5-xl",
        license="apache-2.0",
        range=(0.0, 1.0),
        requires_prompt=True,
        parameters=3_159_560_192,
    ),
    Row(
        "clipscore",
        "image and prompt agree: 100 × cosine, CLIP-H",
        checkpoint="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        license="mit",
        range=(-100.0, 100.0),
        requires_prompt=True,
        parameters=986_109_441,
    ),
    Row("complexity", "share of the area that is not plain", range=(0.0, 1.0)),
    Row("green", "green dominates", range=(-2.0, 1.0)),
    Row(
        "hpsv2.0",
        "human preference for the prompt: HPSv2",
        checkpoint="xswu/HPSv2",
        weights_file="HPS_v2_compressed.pt",
        license="apache-2.0",
        range=(-1.0, 1.0),
        requires_prompt=True,
        parameters=986_109_441,
    ),
    Row(
        "hpsv2.1",
        "human preference for the prompt: HPSv2.1",
        checkpoint="xswu/HPSv2",
        weights_file="HPS_v2.1_compressed.pt",
        license="apache-2.0",
        range=(-1.0, 1.0),
        requires_prompt=True,
        parameters=986_109_441,
    ),
    Row(
        "imagereward",
        "human preference for the prompt: ImageReward",
        checkpoint="THUDM/ImageReward",
        weights_file="ImageReward.pt",
        license="apache-2.0",
        requires_prompt=True,
        parameters=446_206_689,
    ),
    Row("jpeg_compressibility", "small as a JPEG file: minus kilobytes", differentiable=False),
    Row("jpeg_incompressibility", "large as a JPEG file: kilobytes", differentiable=False),
    Row(
        "pickscore",
        "human preference for the prompt: PickScore",
        checkpoint="yuvalkirstain/PickScore_v1",
        license="unstated (code: mit)",
        range=(-100.0, 100.0),
        requires_prompt=True,
        parameters=986_109_441,
    ),
    Row("red", "red dominates", range=(-2.0, 1.0)),
    Row("sharpness", "share of high frequencies", range=(0.0, 1.0)),
    Row(
        "siglip",
        "image and prompt agree: logit, SigLIP",
        checkpoint="google/siglip-so400m-patch14-384",
        license="apache-2.0",
        requires_prompt=True,
        parameters=877_960_498,
    ),
    Row(
        "siglip2",
        "image and prompt agree: logit, SigLIP 2",
        checkpoint="google/siglip2-so400m-patch14-384",
        license="apache-2.0",
        requires_prompt=True,
        parameters=1_136_008_498,
    ),
    Row(
        "vqascore",
        "probability that Qwen2-VL answers yes to the prompt",
        checkpoint="Qwen/Qwen2-VL-2B-Instruct",
        license="apache-2.0",
        range=(0.0, 1.0),
        requires_prompt=True,
        parameters=2_208_985_600,
    ),
    Row(
        "auto",
        "5.9 × hpsv2.1 + 0.783 × imagereward + 1.34 × clip_flant5; more or less by the kind of prompt",
        "preset",
        requires_prompt=True,
    ),
    Row("reno", "5 × hpsv2.1 + imagereward + 0.01 × clipscore + 0.05 × pickscore", "preset", requires_prompt=True),
    Row("clip", "image and prompt agree: a CLIP of the shapes world", "embedded reward", requires_prompt=True),
    Row(
        "vqa",
        "probability of yes to the prompt: a LLaVA of the shapes world",
        "embedded reward",
        range=(0.0, 1.0),
        requires_prompt=True,
    ),
    Row("dpp", "volume that the images span (determinant)", "set reward", range=(0.0, 1.0)),
    Row("dpp_patch", "the same at each place of the images", "set reward", range=(0.0, 1.0)),
    Row("pairwise", "mean distance of all pairs", "set reward"),
    Row("vendi", "effective number of different images", "set reward"),
    Row("vendi_2", "the same of order 2: smooth, faster", "set reward"),
    Row("vendi_inf", "the same of order ∞: only what all images share", "set reward"),
    Row(
        "clip",
        "subject and style, CLIP-L",
        "features",
        checkpoint="openai/clip-vit-large-patch14",
        license="unstated (code: mit)",
        parameters=303_966_208,
    ),
    Row("color_histogram", "colors", "features"),
    Row(
        "dinov2",
        "content, DINOv2",
        "features",
        checkpoint="facebook/dinov2-base",
        license="apache-2.0",
        parameters=86_580_480,
    ),
    Row(
        "dinov2_patch",
        "content and layout, patches of DINOv2",
        "features",
        checkpoint="facebook/dinov2-base",
        license="apache-2.0",
        parameters=86_580_480,
    ),
    Row("dreamsim", "what people find similar: DreamSim", "features", license="mit", package="dreamsim"),
    Row("dreamsim_dino", "the same from one of its three models", "features", license="mit", package="dreamsim"),
    Row(
        "lpips",
        "what people find similar, close up: LPIPS, VGG",
        "features",
        license="bsd-2-clause (layers; torchvision's trunk: bsd-3-clause)",
        parameters=14_716_160,
        package="lpips",
    ),
    Row(
        "lpips_alex",
        "the same, AlexNet",
        "features",
        license="bsd-2-clause (layers; torchvision's trunk: bsd-3-clause)",
        parameters=2_470_848,
        package="lpips",
    ),
    Row(
        "pe_spatial",
        "layout, patches of PE-Spatial",
        "features",
        license="apache-2.0",
        parameters=86_433_792,
        package="timm",
    ),
    Row(
        "sscd",
        "copies of an image: SSCD",
        "features",
        weights_file="sscd_disc_mixup.torchvision.pt",
        license="mit",
        parameters=24_557_120,
    ),
    Row("tiny_image", "colors and layout: 32 × 32 pixels", "features"),
)
