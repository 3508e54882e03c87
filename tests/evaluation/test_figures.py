"""The figures: every contender can be told from the others, without color too, and text is text."""

import itertools

import pytest
from evaluations import results, set_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from noiseopt.evaluation import figures
from noiseopt.evaluation.folder import EvaluationFolder
from noiseopt.evaluation.plane import plane_of
from noiseopt.evaluation.unit import image_path
from noiseopt.plots import MARGIN, Page

METHODS = ("reno", "reno:steps=5", "cno", "best_of_n:steps=2", "noise_diffusion", "pcn")


@pytest.fixture
def page(monkeypatch) -> list[Page]:
    """The pages that are saved."""
    saved, save = [], Page.save
    monkeypatch.setattr(Page, "save", lambda page, path: (saved.append(page), save(page, path)))
    return saved


def texts(page: Page) -> list[str]:
    return [text.get_text() for text in page.figure.findobj(Text) if text.get_text()]


def panels(page: Page) -> list[Axes]:
    return [axes for axes in page.figure.axes if axes.axison]


def check_inside(page: Page) -> None:
    """Everything that is drawn is inside the page."""
    box = page.figure.get_tightbbox(FigureCanvasAgg(page.figure).get_renderer())  # in inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.width and box.y1 <= page.height


def test_contenders_differ_in_color_and_points_in_shape_too():
    found = results(2, *METHODS)
    contenders = found.plan.contenders
    marks = [figures.mark(found, contender) for contender in contenders]
    assert len({mark["color"] for mark in marks}) == len(contenders) == 12
    assert len({(mark["marker"], mark["markerfacecolor"] == "white") for mark in marks}) == len(contenders)
    assert [style["color"] for _, style in figures.lines(found)] == [mark["color"] for mark in marks]


def test_lines_on_top_of_each_other_are_all_seen(page, tmp_path):
    """All spectra are equal here."""
    figures.draw_spectrum(results(5, *METHODS), tmp_path / "spectrum.png")
    (axes,) = panels(page[0])
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths, reverse=True) and all(a - b > 1 for a, b in itertools.pairwise(widths))


@pytest.mark.parametrize("draw", [figures.draw_spectrum, figures.draw_reward_vs_seconds])
@pytest.mark.parametrize("names", [("turbo",), ("turbo", "sdxl"), ("turbo", "sdxl", "sd3")])
def test_panels_leave_no_hole_and_legends_show_what_the_plot_has(draw, names, page, tmp_path):
    draw(results(5, "reno", "cno:gradient=full,gamma=1.0,steps=12", names=names), tmp_path / "a.png")
    axes = panels(page[0])
    assert len(axes) == len(names)
    rights = {round(each.get_position().y0, 3): each.get_position().x1 * page[0].width for each in axes}
    assert all(right == pytest.approx(page[0].width - MARGIN, abs=0.01) for right in rights.values())
    shown = {(line.get_marker(), line.get_color()) for line in axes[0].lines if len(line.get_xdata()) != 2}
    (legend,) = (each.get_legend() for each in page[0].figure.axes if each.get_legend())
    assert {(line.get_marker(), line.get_color()) for line in legend.get_lines()} == shown
    check_inside(page[0])


SAMPLED = ("plain:noise_sampler=pink", "reno", "reno:noise_sampler=pink", "cno", "cno:noise_sampler=pink")


def test_a_method_from_another_noise_has_its_color_and_another_shape_and_dash():
    found = results(2, *SAMPLED)
    styles = {contender.key: figures.mark(found, contender) for contender in found.plan.contenders}
    for name in ("plain", "reno", "best-of-N for cno"):
        white, pink = styles[name], styles[f"{name}:noise_sampler=pink"]
        assert white["color"] == pink["color"] and white["marker"] != pink["marker"]
    looks = {(style["marker"], style["color"], style["markerfacecolor"]) for style in styles.values()}
    assert len(looks) == len(styles) == 10
    dashes = {contender.key: style["linestyle"] for contender, style in figures.lines(found)}
    assert dashes["reno"] == "-" and dashes["reno:noise_sampler=pink"] != "-"


@pytest.mark.parametrize("names", [("turbo",), ("turbo", "sdxl")])
@pytest.mark.parametrize("methods", [("reno",), SAMPLED])
def test_the_plane_labels_each_contender_and_draws_the_front(methods, names, page, tmp_path):
    found = set_of(results(6, *methods, names=names), mss=lambda gain, index: 0.2 + 0.3 * gain + 0.02 * index)
    figures.draw_planes(found, tmp_path / "plane.png")
    for axes in panels(page[0]):
        labels = [text.get_text() for text in axes.texts]
        assert len(labels) == len(set(labels)) == len(found.plan.contenders)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        front = next(line for line in axes.lines if line.get_color() == figures.MUTED)
        ringed = [line for line in axes.lines if line.get_markersize() == figures.RING["markersize"]]
        spots = plane_of(found, names[0]).spots
        expected = {(spot.diversity.value, 100 * spot.quality.value) for spot in spots if spot.on_front}
        assert set(zip(*front.get_data(), strict=True)) == expected and len(expected) > 1
        assert {point for line in ringed for point in zip(*line.get_data(), strict=True)} == expected
        assert list(front.get_data()[0]) == sorted(front.get_data()[0])
    check_inside(page[0])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_panels_do_not_overlap(count):
    places = Page(10.0).panels(count, top=1.0, height=2.0, gap=0.5)
    for (left, top, width), (other, below, _) in itertools.pairwise(places):
        assert (below == top and left + width + 0.5 <= other) or below == top + 2.0
    assert all(left >= 0.5 and left + width <= 10.0 - MARGIN + 1e-9 for left, _, width in places)


def test_text_is_text_and_verdicts_are_signs(page, tmp_path):
    """Dollar signs would start a formula."""
    words = "a $5 sign_of $\\frac $x^{2"
    found = results(6, "reno", category=words, text=words, names=("org/model",))
    folder = EvaluationFolder(tmp_path, found.plan, "cpu")
    for contender in found.plan.contenders:
        for index in range(6):
            cell = found.plan.cell(found.plan.models[0], contender, index, found.best_of)
            path = folder.unit_path(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            for image in range(2):
                Image.new("RGB", (8, 8)).save(image_path(path, image))
    figures.draw_figures(found, folder)
    estimates, _, _, grid = page
    assert any(words in text for text in texts(estimates))
    assert " ".join(next(text for text in texts(grid) if "$5" in text).split()) == words
    assert (texts(grid).count("✓"), texts(grid).count("✗")) == (2 * 5 * 2, 6 * 2 + 2 * 2)
    for each in page:
        check_inside(each)
