"""The figures of an evaluation, drawn without pyplot: no windows, no global state."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ..plots import INK, MARGIN, MUTED, RIGHT, WIDTH, WRONG, Page
from .folder import EvaluationFolder
from .label_places import label_places
from .noise_statistics import gaussian_limits
from .plan import PLAIN, Contender, MethodChoice, ModelChoice, PlainChoice, slug
from .plane import Plane, Spot, plane_of
from .table import COST, LEAST_FOR_INTERVAL, Entry, Metric, Numbers, Results, mean
from .unit import image_path

# of methods; their controls have the light color beside it, and hollow marks of the same shape. The same method from
# another noise sampler has the same color, another shape and another dash.
COLORS = ("#0969da", "#bc4c00", "#116329", "#8250df", "#a40e26", "#57606a")
LIGHT = ("#54aeff", "#fb8f44", "#4ac26b", "#c297ff", "#ff8182", "#afb8c1")
MARKERS = ("o", "D", "^", "v", "P", "X")
DASHES = ((), (6, 3), (2, 2), (8, 2, 2, 2))  # on and off in points, by noise sampler
RING = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.0}
GROUND = "#d0d7de"
FACET = 1.9  # inches, the width of a small plot
NAMED = 4  # contenders, at most, whose titles stand beside their points
ROWS, IMAGES = 8, 3  # of a grid: prompts, and images per prompt and method


def draw_figures(results: Results, folder: EvaluationFolder) -> None:
    """Write all figures to the folder of the evaluation."""
    judged = [metric for metric in results.metrics if metric.group == "judge"]
    shown = judged or [metric for metric in results.metrics if metric.group == "rewards"]
    draw_estimates(results, shown, folder.path / ("accuracy.png" if judged else "rewards.png"))
    draw_reward_vs_seconds(results, folder.path / "reward_vs_seconds.png")
    draw_spectrum(results, folder.path / "spectrum.png")
    if any(plane_of(results, model.name) for model in results.plan.models):
        draw_planes(results, folder.path / "plane.png")
    for model in results.plan.models:
        draw_grid(results, folder, model, folder.path / f"grid_{grid_name(results, model)}.png")


def grid_name(results: Results, model: ModelChoice) -> str:
    """Return the last component of a model's name if it is unique."""
    ends = [short(other.name) for other in results.plan.models]
    return slug(short(model.name) if ends.count(short(model.name)) == 1 else model.name)


def own(method: MethodChoice) -> str:
    """Return what a method is without its noise sampler."""
    return f"{method.name}:{method.own_settings}"


def place_of(results: Results, contender: Contender) -> int | None:
    """Return the number of a contender's method, whatever its noise sampler, or `None` for plain sampling."""
    methods = [own(method) for method in results.plan.methods if not isinstance(method, PlainChoice)]
    if contender.method is None or isinstance(contender.method, PlainChoice):
        return None
    return list(dict.fromkeys(methods)).index(own(contender.method))


def sampler_of(results: Results, contender: Contender) -> int:
    """Return the number of a contender's noise sampler, 0 for that of the model's call."""
    methods = [None, *results.plan.methods]
    samplers = [repr(method and method.settings.get("noise_sampler")) for method in methods]
    return list(dict.fromkeys(samplers)).index(samplers[methods.index(contender.method)])


def color(results: Results, contender: Contender) -> str:
    """Return the color of a contender, black for plain sampling."""
    place, shades = place_of(results, contender), LIGHT if contender.control else COLORS
    return INK if place is None else shades[place % len(shades)]


def mark(results: Results, contender: Contender) -> dict[str, Any]:
    """Return the style of a contender's points: a shape per method and noise sampler, hollow for its control."""
    ink, place, sampler = color(results, contender), place_of(results, contender), sampler_of(results, contender)
    shape = "s" if place is None and sampler == 0 else MARKERS[((place or 0) + sampler) % len(MARKERS)]
    face = "white" if contender.control else ink
    return {"marker": shape, "color": ink, "markerfacecolor": face, "markersize": 6.5, "markeredgewidth": 1.6}


def lines(results: Results) -> list[tuple[Contender, dict[str, Any]]]:
    """Return the contenders with the styles of their lines, the widest first, so that equal lines show each other."""
    contenders = results.plan.contenders
    step = min(1.3, 15 / len(contenders))
    widths = [1.4 + step * (len(contenders) - 1 - place) for place in range(len(contenders))]
    caps = {"solid_capstyle": "butt", "dash_capstyle": "butt"}
    return [
        (contender, {"color": color(results, contender), "linewidth": width, "linestyle": dash(number, width), **caps})
        for contender, width in zip(contenders, widths, strict=True)
        for number in [sampler_of(results, contender)]
    ]


def dash(sampler: int, width: float) -> Any:
    """Return the dashes of a noise sampler for a line of a width, as long on wide lines as on narrow ones."""
    lengths = DASHES[sampler % len(DASHES)]
    return (0, tuple(length / width for length in lengths)) if lengths else "-"


def labels(results: Results, model: str, width: int) -> list[str]:
    """Return the contenders' titles, wrapped between settings."""
    titles = (results.title(model, contender).replace(",", ", ") for contender in results.plan.contenders)
    return ["\n".join(textwrap.wrap(title, width, break_on_hyphens=False)) for title in titles]


def quiet_axes(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GROUND)


def draw_estimates(results: Results, metrics: Sequence[Metric], path: Path) -> None:
    """Plot each metric of each contender with its interval: a column per metric, a row per model."""
    left, head, foot = 2.15, 0.62, 0.38
    lines = max(title.count("\n") + 1 for model in results.plan.models for title in labels(results, model.name, 30))
    height = max(0.36, 0.14 * lines + 0.08) * len(results.plan.contenders)
    block = head + height + foot
    page = Page(0.35 + block * len(results.plan.models), left + (FACET + 0.25) * len(metrics) + MARGIN)
    title = f"Means with 95% bootstrap intervals over prompts, from {LEAST_FOR_INTERVAL} prompts on."
    page.text(MARGIN, 0.12, title, size=9, color=MUTED)
    for row, model in enumerate(results.plan.models):
        top = 0.35 + row * block
        page.text(MARGIN, top + 0.15, short(model.name), size=11, weight="bold")
        for column, metric in enumerate(metrics):
            axes = page.axes(left + column * (FACET + 0.25), top + head, FACET, height)
            draw_column(axes, results, model, metric, with_labels=column == 0)
    page.save(path)


def draw_column(axes: Axes, results: Results, model: ModelChoice, metric: Metric, with_labels: bool) -> None:
    scale = 100 if metric.percent else 1
    entries = [results.entry(model.name, contender, metric) for contender in results.plan.contenders]
    for place, (contender, entry) in enumerate(zip(results.plan.contenders, entries, strict=True)):
        draw_point(axes, entry, place, scale, mark(results, contender))
    quiet_axes(axes)
    axes.grid(axis="x", color=GROUND, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set(ylim=(len(entries) - 0.4, -0.6), yticks=range(len(entries)))
    axes.set_yticklabels(labels(results, model.name, 30) if with_labels else [""] * len(entries), color=INK)
    if metric.percent:
        axes.set(xlim=(-4, 104), xticks=(0, 25, 50, 75, 100))
    count = max(entry.prompts for entry in entries)
    name = short(metric.name.removeprefix("right: ")) + ", %" * metric.percent + "*" * metric.optimized
    axes.set_title(f"{name}\nn = {count}", size=9, color=INK, loc="left")


def draw_point(axes: Axes, entry: Entry, place: int, scale: float, style: dict[str, Any]) -> None:
    estimate = entry.estimate
    if math.isnan(estimate.value):
        return
    axes.plot([scale * estimate.low, scale * estimate.high], [place, place], color=style["color"], linewidth=1.6)
    axes.plot(scale * estimate.value, place, **style)


def draw_panels(
    results: Results, path: Path, title: str, draw: Callable[[Axes, ModelChoice], None], legend: Sequence[Line2D]
) -> None:
    """Draw a panel per model above a legend of the contenders."""
    head, height, foot = 0.5, 2.6, 0.6
    models = results.plan.models
    width = 6.4 if len(models) == 1 else WIDTH
    words = textwrap.wrap(title, int(13 * width))
    top, below = 0.2 + 0.18 * len(words), 0.22 * len(legend) + 0.15
    page = Page(top + -(-len(models) // 2) * (head + height + foot) + below, width)
    for number, line in enumerate(words):
        page.text(MARGIN, 0.12 + 0.18 * number, line, size=9, color=MUTED)
    places = page.panels(len(models), top, head + height + foot, gap=0.75)
    for model, (left, upper, across) in zip(models, places, strict=True):
        page.text(left, upper + head - 0.27, short(model.name), size=11, weight="bold")
        axes = page.axes(left, upper + head, across, height)
        draw(axes, model)
        quiet_axes(axes)
    axes = page.axes(0, page.height - below, page.width, below)
    axes.set_axis_off()
    axes.legend(handles=legend, loc="upper left", fontsize=8, frameon=False, borderaxespad=0.6, handlelength=2.6)
    page.save(path)


def names(results: Results) -> list[str]:
    """Return the contenders' titles for a legend of all models."""
    single = results.plan.models[0].name if len(results.plan.models) == 1 else ""
    return [results.title(single, contender) for contender in results.plan.contenders]


def draw_reward_vs_seconds(results: Results, path: Path) -> None:
    """Plot the first optimized reward against the seconds per image."""
    metric = next(metric for metric in results.metrics if metric.optimized and metric.group == "rewards")

    def draw(axes: Axes, model: ModelChoice) -> None:
        for contender in results.plan.contenders:
            seconds = mean([COST["seconds per image"](unit) for unit in results.units[model.name, contender.key]])
            estimate, style = results.entry(model.name, contender, metric).estimate, mark(results, contender)
            axes.plot([seconds, seconds], [estimate.low, estimate.high], color=style["color"], linewidth=1.6)
            axes.plot(seconds, estimate.value, **style)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("seconds per image", size=8, color=MUTED)
        axes.set_ylabel(short(metric.name), size=8, color=MUTED)
        axes.margins(x=0.15)

    pairs = zip(results.plan.contenders, names(results), strict=True)
    legend = [Line2D([], [], linestyle="", label=name, **mark(results, contender)) for contender, name in pairs]
    draw_panels(results, path, f"Optimized reward {short(metric.name)} against time per image.", draw, legend)


def draw_planes(results: Results, path: Path) -> None:
    """Plot quality against diversity, each contender with its title, or its number in the legend, and the front."""
    contenders, titles = results.plan.contenders, names(results)
    few = len(contenders) <= NAMED
    numbers = titles if few else [str(number) for number in range(1, len(contenders) + 1)]
    labels = {contender.key: number for contender, number in zip(contenders, numbers, strict=True)}

    def draw(axes: Axes, model: ModelChoice) -> None:
        plane = plane_of(results, model.name)
        if plane is not None:
            draw_plane(axes, results, plane, labels)

    shown = titles if few else [f"{number}  {title}" for number, title in zip(numbers, titles, strict=True)]
    legend = [
        Line2D([], [], linestyle="", label=text, **mark(results, contender))
        for contender, text in zip(contenders, shown, strict=True)
    ]
    front = "Pareto front: none is better in one mean without being worse in the other"
    legend.append(Line2D([], [], color=MUTED, linewidth=1.0, label=front, **RING))
    title = f"Quality against diversity, means with 95% bootstrap intervals from {LEAST_FOR_INTERVAL} prompts on."
    draw_panels(results, path, title, draw, legend)


def draw_plane(axes: Axes, results: Results, plane: Plane, labels: Mapping[str, str]) -> None:
    """Draw the points of one model with their labels, and the line through those on the front."""
    scale = 100 if plane.quality.percent else 1
    points = [(spot.diversity.value, scale * spot.quality.value) for spot in plane.spots]
    front = sorted(point for point, spot in zip(points, plane.spots, strict=True) if spot.on_front)
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.0, zorder=1)
    for spot in plane.spots:
        draw_spot(axes, spot, scale, mark(results, spot.contender))
    axes.margins(0.12)
    axes.autoscale_view()  # now, because labels are placed by it
    axes.grid(color=GROUND, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"diversity, {plane.diversity}", size=8, color=MUTED)
    axes.set_ylabel(short(plane.quality.title), size=8, color=MUTED)
    label_points(axes, points, [labels[spot.contender.key] for spot in plane.spots])


def draw_spot(axes: Axes, spot: Spot, scale: float, style: dict[str, Any]) -> None:
    x, y, ink = spot.diversity, spot.quality, style["color"]
    axes.plot([x.low, x.high], [scale * y.value] * 2, color=ink, linewidth=1.2, alpha=0.4)
    axes.plot([x.value] * 2, [scale * y.low, scale * y.high], color=ink, linewidth=1.2, alpha=0.4)
    axes.plot(x.value, scale * y.value, linestyle="", **style)
    if spot.on_front:
        axes.plot(x.value, scale * y.value, linestyle="", color=MUTED, **RING)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write a text beside each point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn = [
        axes.text(*point, text, size=8, ha="center", va="center") for text, point in zip(texts, points, strict=True)
    ]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in drawn)]
    centers = axes.transData.transform(points).tolist()
    places = label_places(centers, sizes, axes.get_window_extent().extents, gap=8 * figure.dpi / 72)
    limits = axes.axis()
    for text, place, point in zip(drawn, places, points, strict=True):
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        x, y = axes.transData.inverted().transform(place)
        text.set_position((x, y))
        axes.plot([point[0], x], [point[1], y], color=MUTED, linewidth=0.5, zorder=0)
    axes.axis(limits)


def draw_spectrum(results: Results, path: Path) -> None:
    """Plot the mean power of the noise by spatial frequency, and the range of Gaussian noise."""

    def draw(axes: Axes, model: ModelChoice) -> None:
        error = [2 * each for each in spectrum_error(results.units[model.name, PLAIN.key])]
        low, high = ([1 + sign * each for each in error] for sign in (-1, 1))
        axes.fill_between(range(len(error)), low, high, color=GROUND, alpha=0.5, linewidth=0)
        for contender, style in lines(results):
            axes.plot(mean_spectrum(results.units[model.name, contender.key]), **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("frequency, cycles across the noise", size=8, color=MUTED)
        axes.set_ylabel("power", size=8, color=MUTED)

    title = (
        "Power of the noise by frequency. Gaussian noise is in the gray band 95% of the time. Narrow lines lie over "
        "wide ones."
    )
    legend = [
        Line2D([], [], label=name, **style) for name, (_, style) in zip(names(results), lines(results), strict=True)
    ]
    draw_panels(results, path, title, draw, legend)


def mean_spectrum(units: Sequence[Numbers]) -> list[float]:
    """Return the mean power by frequency of the noises of the units (one prompt by one method, see `unit.py`)."""
    return [mean(band) for band in zip(*(unit["noise"]["spectrum"] for unit in units), strict=True)]


def spectrum_error(units: Sequence[Numbers]) -> list[float]:
    """Return the standard error that each value of `mean_spectrum` has for Gaussian noise."""
    images, *shape = units[0]["noise shape"]
    shape = [math.prod(shape[:-2]), *shape[-2:]]
    return list(gaussian_limits((images * len(units), *shape)).standard_error.spectrum)


def shown_prompts(results: Results, count: int = ROWS) -> list[int]:
    """Choose the first prompts of each category in turn, regardless of their results."""
    units = results.units[results.plan.models[0].name, PLAIN.key]
    turn: dict[str, int] = {}
    order = []
    for unit in units:
        turn[unit["category"]] = turn.get(unit["category"], 0) + 1
        order.append((turn[unit["category"]], unit["index"]))
    return sorted(index for _, index in sorted(order)[:count])


def draw_grid(results: Results, folder: EvaluationFolder, model: ModelChoice, path: Path) -> None:
    """Draw images side by side: a row per prompt, a group of columns per contender."""
    contenders, prompts = results.plan.contenders, shown_prompts(results)
    images, text, gap = min(IMAGES, results.plan.seeds), 1.55, 0.18
    side = min(1.15, max(0.6, ((WIDTH - text) / len(contenders) - gap) / images))
    group = images * side + gap
    titles = labels(results, model.name, max(10, int(group * 12)))
    head = 0.55 + 0.16 * max(title.count("\n") + 1 for title in titles)
    page = Page(head + len(prompts) * (side + 0.1) + 0.05, max(5.0, MARGIN + text + len(contenders) * group))
    legend = "✓ right, ✗ wrong according to the judge. " * results.judged(model.name)
    page.text(MARGIN, 0.12, f"{short(model.name)}. {legend}Same position: same initial noise.", size=9, color=MUTED)
    for column, title in enumerate(titles):
        page.text(MARGIN + text + column * group, head - 0.08, title, size=9, va="bottom")
    for row, index in enumerate(prompts):
        top = head + row * (side + 0.1)
        prompt = textwrap.shorten(results.plan.prompts.prompts[index].text, int(80 * side), placeholder=" …")
        page.text(MARGIN, top + side / 2, "\n".join(textwrap.wrap(prompt, 20)), size=8.5, va="center")
        for column, contender in enumerate(contenders):
            unit = results.units[model.name, contender.key][index]
            file = folder.unit_path(results.plan.cell(model, contender, index, results.best_of))
            for image in range(images):
                left = MARGIN + text + column * group + image * side
                right = unit["judge"]["right"][image] if unit["judge"] else None
                draw_image(page, left, top, side - 0.04, image_path(file, image), right)
    page.save(path)


def draw_image(page: Page, left: float, top: float, side: float, file: Path, right: bool | None) -> None:
    """Draw an image, and if there is a verdict of the judge, a mark in its corner and a frame in the color of it."""
    axes = page.axes(left, top, side, side)
    with Image.open(file) as picture:
        axes.imshow(picture.convert("RGB"), interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    ink = GROUND if right is None else RIGHT if right else WRONG
    for spine in axes.spines.values():
        spine.set(color=ink, linewidth=0.5 if right is None else 2, linestyle="--" if right is False else "-")
    if right is not None:
        box = {"facecolor": ink, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
        corner = {"transform": axes.transAxes, "ha": "left", "va": "bottom", "size": 6.5, "color": "white"}
        axes.text(0.035, 0.045, "✓" if right else "✗", bbox=box, weight="bold", **corner)


def short(name: str) -> str:
    """Return the last component of a Hub id or path."""
    return name.rstrip("/").rpartition("/")[2] or name
