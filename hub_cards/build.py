"""Write the Hub repositories: one folder per card, with a generated `README.md` and for a pipeline a self-contained
`pipeline.py`. The weights of a trained model stay where they are until they are pushed with its card.

    python hub_cards/build.py                                    write all folders
    python hub_cards/build.py --check                            exit 1 and name the files that are out of date
    python hub_cards/build.py --push reno-turbo --namespace me   upload one card to your own account

Standard library only; pushing needs huggingface_hub and a login (`hf auth login`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bundle import Refused, bundle
from cards import CARDS, NAMESPACE, Card, readme
from models import ModelCard, recorded

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_CARDS = Path(__file__).resolve().parent
ROOT = HUB_CARDS.parent


def all_cards() -> list[Card | ModelCard]:
    """The pipelines, and the trained models that are recorded."""
    return [*CARDS, *recorded()]


def files(card: Card | ModelCard, namespace: str = NAMESPACE) -> dict[str, str]:
    """What is generated for the repository of a card: file name -> text."""
    if isinstance(card, ModelCard):
        return card.files(namespace)
    registering = ROOT / "rewards" if card.method.takes_rewards else None
    source = bundle(ROOT / card.module, ROOT, registering=registering)
    return {"README.md": readme(card, namespace, source), "pipeline.py": source}


def write() -> None:
    """Write the folders of all cards."""
    for card in all_cards():
        folder = HUB_CARDS / card.name
        folder.mkdir(exist_ok=True)
        for name, text in files(card).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def drifted() -> list[str]:
    """The files that are missing, differ from what `write` would write, or belong to no card."""
    wanted = {f"{card.name}/{name}": text for card in all_cards() for name, text in files(card).items()}
    paths = (path for name in ("README.md", "pipeline.py") for path in HUB_CARDS.glob(f"*/{name}"))
    found = {path.relative_to(HUB_CARDS).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def push(card: Card | ModelCard, namespace: str, api: HfApi | None = None) -> str:
    """Upload a card, generated afresh for that account, to `namespace/<card name>`, with the weights of a model.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    repository = api.create_repo(f"{namespace}/{card.name}", exist_ok=True)
    operations = [CommitOperationAdd(name, text.encode()) for name, text in files(card, namespace).items()]
    if isinstance(card, ModelCard):
        operations += [CommitOperationAdd(name, path) for name, path in card.uploads().items()]
    api.create_commit(repository.repo_id, operations, commit_message=f"Update {card.title}")
    return str(repository)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    try:
        if options.push:
            print(push(options.push, options.namespace))
        elif options.check:
            return report(drifted())
        else:
            write()
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cards = {card.name: card for card in all_cards()}
    parser = argparse.ArgumentParser(description="Write, check or push the Hub repositories of pipelines and models.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--push", metavar="NAME", choices=sorted(cards), help=f"upload one of {', '.join(cards)}")
    parser.add_argument("--namespace", metavar="USER", help="the Hub account or organisation to push to")
    options = parser.parse_args(arguments)
    if bool(options.push) != bool(options.namespace):
        parser.error("--push and --namespace go together")
    options.push = cards.get(options.push)
    return options


def report(wrong: list[str]) -> int:
    for name in wrong:
        print(f"hub_cards/{name} is out of date: run `python hub_cards/build.py`", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
