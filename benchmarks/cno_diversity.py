"""CNO against plain sampling: diversity of the images of a prompt, and their correctness.

python benchmarks/cno_diversity.py --prompts held-out --limit 80 --output cno.json --plot cno.png
python benchmarks/cno_diversity.py --ablation --limit 40 --output ablation.json --plot ablation.png

CNO has the paper's settings, but for those in which the recipe of the demo differs. Held out are the judge and the
features; CNO uses none. Run a command again with the same `--output` to resume.
"""

import functools
from typing import Any

from sets import COST, DIVERSITY, QUALITY, Bench, Report, Row, parser_of, run

from noiseopt import CNO
from noiseopt.recipes import RECIPES

OURS = RECIPES["cno"].settings
RELEASED = {"gradient": "full", "gamma": 1.0}
ABLATION: dict[str, dict[str, Any]] = {
    "no attraction": {"attraction": False},
    "no repulsion": {"repulsion": False},
    "full gradient": {"gradient": "full"},
    "γ = 0.5": {"gamma": 0.5},
    "γ = 1": {"gamma": 1.0},
    "τ = 0.03": {"tau": 0.03},
    "τ = 0.3": {"tau": 0.3},
    "w = 1": {"window_size": 1},
    "w = 4": {"window_size": 4},
    "w = 8": {"window_size": 8},
    "w = 16": {"window_size": 16},
    "w = 32": {"window_size": 32},
    "1 step": {"steps": 1},
    "6 steps": {"steps": 6},
    "12 steps": {"steps": 12},
    "learning rate 0.01": {"learning_rate": 0.01},
    "learning rate 0.02": {"learning_rate": 0.02},
    "learning rate 0.05": {"learning_rate": 0.05},
    "learning rate 0.1": {"learning_rate": 0.1},
}
SIZES = (2, 8)  # set sizes besides `--images`
TITLES = {
    "MSS": "held-out similarity:\nMSS of DINOv2",
    "Vendi": "effective number\nof images",
    "positions": "spread of positions,\npixels",
    "right": "share right\nby the judge",
}


def cno(changes: dict[str, Any], bench: Bench | None = None) -> CNO:
    return CNO(**{**OURS, **changes})


def rows(ablation: bool) -> list[Row]:
    """Return plain sampling, CNO of the paper and of its code.

    With `ablation` there is also CNO with each choice changed, compared with CNO; the paper's settings, where ours are
    others; and sets of other sizes.
    """
    found = [Row("plain"), Row("CNO", functools.partial(cno, {}))]
    found += [Row("CNO, released code", functools.partial(cno, RELEASED))]
    if ablation:
        changed = {name: changes for name, changes in ABLATION.items() if cno(changes) != cno({})}
        found += [Row(name, functools.partial(cno, changes), against="CNO") for name, changes in changed.items()]
        if OURS:
            found.append(Row("the paper's settings", lambda bench: CNO(), against="CNO"))
        for size in SIZES:
            plain = f"plain, B = {size}"
            found += [Row(plain, images=size, against=plain)]
            found += [Row(f"CNO, B = {size}", functools.partial(cno, {}), images=size, against=plain)]
    return found


def main(arguments: list[str] | None = None) -> Report:
    parser = parser_of("CNO against plain sampling.", "guided", images=5, limit=40)
    parser.add_argument("--ablation", action="store_true", help="also change each choice of CNO")
    options = parser.parse_args(arguments)
    found = run(options, rows(options.ablation), "cno")
    print(found.table(DIVERSITY), found.table([*QUALITY, *COST]), sep="\n\n")
    for row in found.rows[1:3]:
        print(f"\n{row.name}: {found.share(row, 'MSS')}, {found.share(row, 'Vendi')}, right {found.cell(row, 'right')}")
    print("", *(f"{row.name}, {found.by_ground(row, options.images)}" for row in found.rows[:3]), sep="\n")
    if options.plot:
        found.plot(TITLES, options.plot)
    return found


if __name__ == "__main__":
    main()
