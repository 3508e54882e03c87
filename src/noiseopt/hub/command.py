"""The command `noiseopt hub`: its arguments and its output."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..arguments import examples, require_plots

if TYPE_CHECKING:
    from .build import AnyCard

CardT = TypeVar("CardT", bound="AnyCard")

EPILOG = """\
examples:
  noiseopt hub build
  noiseopt hub push reno-turbo --namespace me --dry-run
  noiseopt hub push --all --namespace me --tag v0.1.0
"""


def add_hub(commands) -> None:
    """Add the parser of the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "hub",
        help="write, illustrate, check or push the Hub repositories of pipelines and models (in a checkout)",
        description="The Hub repositories of pipelines and embedded models, one folder each in hub_cards/. Works in "
        "a checkout of the repository, whose sources it reads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="write the texts and code of all cards, and the stub files of the pipeline classes",
        epilog=examples("noiseopt hub build"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.set_defaults(run=lambda arguments: run_build())
    check = actions.add_parser(
        "check",
        help="exit with 1 and name the files that are out of date",
        epilog=examples("noiseopt hub check"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(run=lambda arguments: run_check())
    add_pictures(actions)
    add_push(actions)


def add_pictures(actions) -> None:
    parser = actions.add_parser(
        "pictures",
        help="generate the picture of a pipeline with an embedded model, and its README.md anew",
        description="Generate the pictures of pipelines: the prompts and seeds of `noiseopt demo`, before and after. "
        "Each takes about a minute on two cores.",
        epilog=examples("noiseopt hub pictures reno-turbo"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cards", nargs="*", metavar="CARD", help="names of folders in hub_cards/ (default: all pipelines)"
    )
    parser.set_defaults(run=lambda arguments: run_pictures(arguments, parser))


def add_push(actions) -> None:
    parser = actions.add_parser(
        "push",
        help="upload cards to your account on the Hub",
        description="Upload cards, generated anew for that account, with pictures and weights; download them again "
        "and compare. Unchanged files make no commit. Needs a login: `hf auth login`.",
        epilog=examples(
            "noiseopt hub push reno-turbo --namespace me --dry-run",
            "noiseopt hub push --all --namespace me --tag v0.1.0",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cards", nargs="*", metavar="CARD", help="names of folders in hub_cards/")
    parser.add_argument("--all", action="store_true", help="all cards")
    parser.add_argument("--namespace", required=True, metavar="USER", help="the account or organization to push to")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--tag", metavar="NAME", help="name the commits, for custom_revision= of diffusers (v0.1.0)")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and upload nothing")
    parser.set_defaults(run=lambda arguments: run_push(arguments, parser))


def run_build() -> None:
    """Run `noiseopt hub build`."""
    require_checkout()
    from .build import all_cards, write

    with refusals():
        write(all_cards())


def run_check() -> None:
    """Run `noiseopt hub check`."""
    require_checkout()
    from .build import all_cards, drifted, drifted_stub_files

    with refusals():
        wrong = [f"hub_cards/{name} is out of date: {cure(name)}" for name in drifted()]
    wrong += [f"{name} is out of date: run `noiseopt hub build`" for name in drifted_stub_files()]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        raise SystemExit(1)
    print(f"all {len(all_cards())} cards are up to date")


def cure(name: str) -> str:
    """Return the remedy for a file that is out of date."""
    from .before_after import PICTURE
    from .build import all_cards

    card, _, file = name.partition("/")
    if card not in {card.name for card in all_cards()}:
        return "it belongs to no card, delete it"
    return f"run `noiseopt hub pictures {card}`" if file == PICTURE else "run `noiseopt hub build`"


def run_pictures(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt hub pictures`."""
    require_checkout()
    from .build import write
    from .cards import CARDS

    cards = chosen(arguments.cards, CARDS, parser) or CARDS
    require_plots("noiseopt hub pictures")
    from ..quiet import quiet_libraries

    with quiet_libraries():  # on import transformers suggests packages to install
        from .pictures import draw_pictures
    for path in draw_pictures(cards):
        print(f"wrote {path.parent.name}/{path.name}: {path.stat().st_size / 1000:.0f} kB")
    with refusals():
        write(cards)


def run_push(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run `noiseopt hub push`. A wrong request is refused before anything is uploaded."""
    require_checkout()
    from .build import all_cards
    from .push import PushFailed, push

    if bool(arguments.cards) == arguments.all:
        parser.error("Expected either names of cards or --all.")
    cards = chosen(arguments.cards, all_cards(), parser) or all_cards()
    with refusals(PushFailed):
        for card in cards:
            if arguments.dry_run:
                print(listing(card, arguments.namespace))
                continue
            pushed = push(card, arguments.namespace, private=arguments.private, tag=arguments.tag)
            print(f"{'pushed' if pushed.changed else 'unchanged'} {pushed.url} at {pushed.commit[:7]}")


def chosen(names: Sequence[str], cards: Iterable[CardT], parser: argparse.ArgumentParser) -> list[CardT]:
    """Return the cards of these names, each once."""
    known = {card.name: card for card in cards}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"Expected a card out of {', '.join(known)}, but got {unknown[0]!r}.")
    return [known[name] for name in dict.fromkeys(names)]


def listing(card: "AnyCard", namespace: str) -> str:
    """Return the files that a push would upload, and their sizes."""
    from .build import contents

    files = sorted(contents(card, namespace).items())
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files}
    lines = [f"{size:>12,}  {name}" for name, size in sizes.items()]
    return "\n".join([f"{namespace}/{card.name}: {sum(sizes.values()):,} bytes", *lines])


@contextlib.contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with the message and status 1, without a traceback, for `Refused` and errors of the given kinds."""
    from .bundle import Refused

    try:
        yield
    except (Refused, *kinds) as refusal:
        raise SystemExit(str(refusal)) from None


def require_checkout() -> None:
    """Exit with 1 in an installed package, which has no `hub_cards/`."""
    from .build import HUB_CARDS

    if not HUB_CARDS.is_dir():
        raise SystemExit(
            f"Expected a checkout of the repository, with its folder hub_cards/, but noiseopt is installed in "
            f"{Path(__file__).parents[1]}. Clone it and run `pip install -e .` there."
        )
