"""The tables: intervals and emphasis only where there are enough prompts, and lines that fit a terminal."""

import io

import pytest
from evaluations import results
from rich.console import Console

from noiseopt.evaluation.table import cost_csv, cost_markdown, markdown, table_csv
from noiseopt.evaluation.terminal import print_results

LONG = "never_too_late:diversity={'dpp': ('clip', 50.0)},warm_up=3,steps=12,learning_rate=0.5"


def line(text: str, *words: str) -> list[str]:
    """Return the cells of the first row of Markdown with these words."""
    row = next(row for row in text.split("\n") if row.startswith("| ") and all(word in row for word in words))
    return row.strip("| ").split(" | ")


@pytest.mark.parametrize(
    ("count", "interval", "bold"), [(4, False, False), (5, True, False), (9, True, False), (10, True, True)]
)
def test_few_prompts_have_no_interval_and_no_emphasis(count, interval, bold):
    text = markdown(results(count))
    right = line(text, "plain")[2]
    assert right == ("0.0 [0.0, 0.0]" if interval else "0.0 [–]")
    gain = line(text, "reno − plain")[3]
    assert gain == "+1 [+1, +1]".join(["**"] * 2 if bold else [""] * 2) if interval else gain == "+1 [–]"
    rows = [row.split(",") for row in table_csv(results(count).entries()).split("\n")[1:-1]]
    assert all(bool(low and high) == interval for *_, low, high, n in rows if int(n) == count)


def test_a_reward_is_said_to_be_exploited_only_with_enough_prompts():
    assert results(9).warnings() == []
    (warning,) = results(11).warnings()
    assert warning.startswith("reno on turbo raises red, which it optimizes, and lowers blue")


def test_every_table_has_its_number_of_prompts():
    """The first prompt has no score of "blue" (NaN), so it does not count there."""
    text = markdown(results(12))
    heads = [row for row in text.split("\n") if row.startswith(("| model | method", "| model | difference"))]
    assert len(heads) == 5 and all("(n = 12)" in head for head in heads)
    assert all("blue (n = 11)" in head for head in heads if "blue" in head)
    assert "failures repaired, % (n = 12)" in heads[0] and "right ones kept, % (n = 0)" in heads[0]
    assert "| n |" in cost_markdown(results(12)) and ",n," in cost_csv(results(12))
    assert "made: 12 prompts, 2 images each. 1 entry without a prompt left out." in text


def test_text_is_no_markup():
    text = markdown(results(5, "reno:noise_sampler={'name': 'pink', 'alpha': 0.3}", category="<b>*x*</b>|$y$"))
    assert r"right: &lt;b&gt;\*x\*&lt;/b&gt;\|\$y\$, %" in text and "<b>" not in text
    width = {row.replace(r"\|", "").count("|") for row in text.split("\n\n")[3].split("\n")}
    assert len(width) == 1


@pytest.mark.parametrize("width", [80, 100])
def test_what_is_printed_fits_the_terminal(width):
    out = io.StringIO()
    found = results(12, LONG, names=("turbo", "sdxl-turbo"), category="a category of many words")
    print_results(found, Console(file=out, width=width, force_terminal=False))
    lines = out.getvalue().split("\n")
    assert max(map(len, lines)) <= width and "\033" not in out.getvalue()
    text = " ".join(out.getvalue().split())
    for entry in [*found.entries(), *found.differences()]:
        if entry.metric.group != "noise":
            value, interval = entry.parts("+" if "−" in entry.method else "")
            assert " ".join([value, interval, str(entry.prompts)]).replace("  ", " ") in text


def test_only_evident_differences_are_bold():
    def bold(count: int) -> list[str]:
        out = io.StringIO()
        print_results(results(count), Console(file=out, width=80, force_terminal=True, color_system="standard"))
        return [row for row in out.getvalue().split("\n") if "\033[1m" in row and "turbo" not in row]

    assert bold(9) == []
    assert len(bold(10)) == 3  # right and red from plain, red from best-of-N; 9 prompts have a score of "blue"
    assert len(bold(11)) == 5
