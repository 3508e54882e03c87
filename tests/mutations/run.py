"""Plant each fault of `faults.py` in a copy of the checkout and report which tests find it.

It prints the table of CONTRIBUTING.md, with the test that found each fault, in up to an hour.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutations.faults import FAULTS, ROOT, Fault, selected

TIERS = {"fast": "not slow", "slow": "slow"}
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::\S[^\n]*?|\S+\.py)(?: - .*)?$", re.MULTILINE)
TIME_LIMIT = 1800.0
OUT_OF_TIME = "(time limit)"
ALONE, SHARED = ("-n", "0"), ("-n", "auto")
# These compare texts of the checkout and would find any change: the faults, and the bundle of the Hub cards.
IGNORED = ("--ignore=tests/mutations", "--ignore=tests/hub_cards")


class Checkout:
    """A copy of the checkout in a temporary folder, in which one fault at a time is planted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.times = itertools.count(int(time.time()))
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)

    def write(self, path: str, text: str) -> None:
        """Write a file with a modification time of its own, so that no stale bytecode is loaded."""
        (self.root / path).write_text(text, encoding="utf-8")
        modified = next(self.times)
        os.utime(self.root / path, (modified, modified))

    def failing_test(self, fault: Fault | None, arguments: Sequence[str]) -> str | None:
        """Run tests up to the first failure and return the test that failed.

        Raises:
            RuntimeError: If pytest ended otherwise, as by a wrong argument.
        """
        original = None if fault is None else (self.root / fault.path).read_text(encoding="utf-8")
        if fault is not None:
            self.write(fault.path, fault.mutated(self.root))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *IGNORED]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(self.root / name) for name in ("src", "tests"))}
        try:
            run = subprocess.run(
                [*command, *arguments],
                cwd=self.root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            if fault is not None and original is not None:
                self.write(fault.path, original)
        if run.returncode in (0, 5):  # passed, or no tests selected
            return None
        if found := FAILED.search(run.stdout):
            return found[1]
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


class Search:
    """The search for a test that finds a fault, nearest tests first."""

    def __init__(self, checkout: Checkout, tiers: Sequence[str]) -> None:
        self.checkout, self.tiers = checkout, tiers
        self.passing: set[str] = set()
        self.deselected: list[str] = []

    def runs(self, fault: Fault) -> Iterator[tuple[str, list[str]]]:
        """Yield the tiers with the arguments of pytest: each tier's nearest tests, then the others."""
        nearest = fault.nearest_tests(self.checkout.root)
        for tier in self.tiers:
            marks = ["-m", TIERS[tier]]
            yield tier, [*ALONE, *marks, *nearest]
            yield tier, [*SHARED, *marks, *(f"--ignore={path}" for path in nearest)]

    def found_by(self, fault: Fault) -> tuple[str, str] | None:
        """Return the tier and the test that find a fault."""
        for tier, arguments in self.runs(fault):
            while test := self.checkout.failing_test(fault, [*arguments, *self.deselected]):
                if self.passes_without_fault(test):
                    return tier, test
                print(f"{test} fails without a fault", file=sys.stderr)
                self.deselected.append(f"--deselect={test}" if "::" in test else f"--ignore={test}")
        return None

    def passes_without_fault(self, test: str) -> bool:
        if test not in {*self.passing, OUT_OF_TIME}:
            if self.checkout.failing_test(None, [*ALONE, "-m", "slow or not slow", test]) is not None:
                return False
            self.passing.add(test)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=("fast", "all"), default="all", help="the tests to run; default: all")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a fault to plant; repeatable")
    parser.add_argument("--list", action="store_true", help="list the faults and the files of their nearest tests")
    options = parser.parse_args()
    faults = list(selected(options.only))
    if options.list:
        for fault in faults:
            print(f"{fault.name}: {fault.path}\n    {' '.join(fault.nearest_tests())}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        search = Search(Checkout(Path(temporary)), list(TIERS) if options.tier == "all" else ["fast"])
        print("| fault | file | tier | found by |\n|---|---|---|---|", flush=True)
        found = []
        for fault in faults:
            begin, result = time.monotonic(), search.found_by(fault)
            tier, test = result or ("—", "not found")
            print(f"| {fault.name} | `{fault.path}` | {tier} | `{test.removeprefix('tests/')}` |", flush=True)
            print(f"{fault.name}: {tier}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
            found += [tier]
    by_fast, by_slow = (found.count(tier) for tier in TIERS)
    print(f"\n{by_fast} of {len(faults)} faults are found by the fast tier, {by_slow} more by the slow one.")
    if "—" in found and len(faults) == len(FAULTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
