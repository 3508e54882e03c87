"""Run diffusers' own fast tests of a pipeline, with our classes in place of the stock one and nothing optimized.

python tests/diffusers_fast_tests.py DIFFUSERS [--ours CLASS]

DIFFUSERS is a checkout of the repository, whose tests need `pip install parameterized requests-mock`. Prints the tests
that pass for the stock class and fail for ours, and exits with 1 if there are any. Tokenizers of `hf-internal-testing`,
which the tests would download, are tiny ones of ours in both runs; so tests of recorded pixels fail in both.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLOW = "not Slow and not Nightly and not Integration and not IPAdapter and not compile"
RUNS = (
    ("stable_diffusion_xl/test_stable_diffusion_xl.py", "StableDiffusionXLPipeline", "CNOStableDiffusionXLPipeline"),
    ("stable_diffusion_xl/test_stable_diffusion_xl.py", "StableDiffusionXLPipeline", "ReNOTurboPipeline"),
    ("stable_diffusion/test_stable_diffusion.py", "StableDiffusionPipeline", "NoiseDiffusionStableDiffusionPipeline"),
    ("stable_diffusion_2/test_stable_diffusion.py", "StableDiffusionPipeline", "NeverTooLateStableDiffusionPipeline"),
    (
        "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
        "StableDiffusion3Pipeline",
        "CNOStableDiffusion3Pipeline",
    ),
    ("flux/test_pipeline_flux.py", "FluxPipeline", "NeverTooLateFluxPipeline"),
)


def outcomes(checkout: Path, file: str, stock: str, ours: str | None) -> dict[str, str]:
    """Return the outcome of each test: "PASSED", "FAILED", "ERROR" or "SKIPPED"."""
    paths = os.pathsep.join([str(HERE), *sys.path])
    own = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "NOISEOPT_STOCK": stock, "NOISEOPT_OURS": ours or stock}
    command = [sys.executable, "-m", "pytest", "-p", "diffusers_swap", "-q", "-rA", "--tb=no", "-k", SLOW, file]
    run = subprocess.run(command, cwd=checkout, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S+?::(\S+)", run.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(
            f"Expected tests in {file} of {checkout}, but pytest said:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        )
    return {name: outcome for outcome, name in found}


def compare(checkout: Path, file: str, stock: str, ours: str) -> list[str]:
    """Print how a file fares with both classes, and return the tests that only fail with ours."""
    theirs, mine = (outcomes(checkout, f"tests/pipelines/{file}", stock, cls) for cls in (None, ours))
    worse = sorted(name for name, outcome in theirs.items() if outcome == "PASSED" and mine.get(name) != "PASSED")
    passed = [list(each.values()).count("PASSED") for each in (theirs, mine)]
    print(
        f"{ours}: {passed[1]} of {len(mine)} pass, {stock}: {passed[0]} of {len(theirs)}; {len(worse)} worse",
        flush=True,
    )
    for name in worse:
        print(f"  {name}")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description="Run diffusers' fast tests with our classes.")
    parser.add_argument("checkout", type=Path, metavar="DIFFUSERS", help="checkout of the diffusers repository")
    parser.add_argument("--ours", metavar="CLASS", help="only this class of ours")
    options = parser.parse_args()
    runs = [run for run in RUNS if options.ours in (None, run[2])]
    worse = [name for run in runs for name in compare(options.checkout.resolve(), *run)]
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
