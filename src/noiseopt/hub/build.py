"""The folders in `hub_cards/`, one for each Hub repository: what belongs there, writing it, and what is out of date.

A folder holds a generated `README.md` and, for a pipeline, a self-contained `pipeline.py` and a picture, which is drawn
by `noiseopt hub pictures`. The weights of a trained model stay where they are until they are pushed with its card.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

from ..shapes_world.embedded import NAMESPACE
from .before_after import PICTURE, BeforeAfter
from .bundle import bundle
from .cards import CARDS, Card, readme
from .models import ModelCard, recorded

ROOT = Path(__file__).resolve().parents[3]
HUB_CARDS = ROOT / "hub_cards"
GENERATED = ("README.md", "pipeline.py")

AnyCard = Card | ModelCard


def all_cards() -> list[AnyCard]:
    """The pipelines, and the trained models that are recorded."""
    return [*CARDS, *recorded()]


def generated(card: AnyCard, namespace: str = NAMESPACE) -> dict[str, str]:
    """The texts of a repository: file name -> text. Raises `Refused` for a pipeline that cannot be bundled."""
    if isinstance(card, ModelCard):
        return card.files(namespace)
    source = code_of_card(card, ROOT)
    return {"README.md": readme(card, namespace, source, shown_by(card)), "pipeline.py": source}


def code_of_card(card: Card, root: Path) -> str:
    """The self-contained `pipeline.py` of a card, from the folders under `root`."""
    registering = root / "rewards" if card.method.takes_rewards else None
    return bundle(root / card.module, root, registering=registering)


def code_of_pipeline(cls: type) -> str:
    """The self-contained `pipeline.py` of a pipeline class of this package, in a checkout or as it is installed."""
    entry = Path(inspect.getfile(cls)).resolve()
    root = entry.parents[1]
    (card,) = (card for card in CARDS if root / card.module == entry)
    return code_of_card(card, root)


def picture_path(card: Card) -> Path:
    """Where the picture of a card is, or is to be."""
    return HUB_CARDS / card.name / PICTURE


def shown_by(card: Card) -> BeforeAfter | None:
    """What the picture of a card shows; `None` without one, or if it is of another method or model than the card's."""
    found = BeforeAfter.read(picture_path(card))
    return found if found and (found.method, found.model) == (card.method.registered, card.shown_on) else None


def contents(card: AnyCard, namespace: str = NAMESPACE) -> dict[str, bytes | Path]:
    """All files of a repository: name -> bytes, or the file that has them."""
    files: dict[str, bytes | Path] = {name: text.encode() for name, text in generated(card, namespace).items()}
    if isinstance(card, ModelCard):
        return files | card.uploads()
    return files | ({PICTURE: picture_path(card)} if shown_by(card) else {})


def write(cards: Iterable[AnyCard]) -> None:
    """Write the texts of cards into their folders."""
    for card in cards:
        folder = HUB_CARDS / card.name
        folder.mkdir(exist_ok=True)
        for name, text in generated(card).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def drifted() -> list[str]:
    """The files that are missing, differ from what `write` would write, or belong to no card."""
    wanted = {f"{card.name}/{name}": text for card in all_cards() for name, text in generated(card).items()}
    paths = (path for name in GENERATED for path in HUB_CARDS.glob(f"*/{name}"))
    found = {path.relative_to(HUB_CARDS).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    texts = {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}
    return sorted(texts | undrawn())


def undrawn() -> set[str]:
    """The pictures that are missing, show something else than their card is about, or belong to no card."""
    strays = {path.parent.name for path in HUB_CARDS.glob(f"*/{PICTURE}")} - {card.name for card in CARDS}
    return {f"{name}/{PICTURE}" for name in strays | {card.name for card in CARDS if not shown_by(card)}}
