"""Damaged and forged result files: each is a valid result or refused by one clear error, soon.

$ python benchmarks/reliability_files.py --count 20000

Every file is made from a valid one and a seed: bits are flipped, bytes replaced, pieces cut, lost, doubled or swapped,
the length of the header changed, values anywhere in the JSON replaced by others (huge, deep, escapes, paths), entries
removed and added, and tensors swapped, reshaped or given another type. A file that loads has to be a valid result,
which is saved and loaded again; any other has to raise a `ValueError` with a printable message of limited length.
`--first SEED --count 1` repeats one file.
"""

import argparse
import collections
import json
import random
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from noiseopt import NoiseResult
from noiseopt.pipelines.results.noise_result import Progress

SLOWEST = 2.0  # seconds for one file
LONGEST = 1200  # characters of a message, beside the path
ESCAPE = "\x1b]0;x\x07\x1b[2J\u202e\ud800"
TEXTS = [
    "",
    "x",
    ESCAPE,
    "../../etc/passwd",
    "file:///etc/passwd",
    "cuda",
    "cpu",
    "float16",
    "list",
    "single",
    "a" * 5000,
]
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(10**18), 0.5, 1e308, float("nan"), float("inf"), True, None]
DEEP = ["@10@", "@500@", "@5000@", "@100000@"]  # so many lists in lists
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "U16", "C64", "X", 3]

RUN = {"dict": {"step": 2, "noise": {"tensor": "0"}, "state": {"object": {"momentum": {"tensor": "1"}}}}}

Change = Callable[[bytes, random.Random], bytes]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="number of files (default: 20000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first file (default: 0)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = check_files(arguments.count, arguments.first, Path(folder))
    print(report.text())
    sys.exit(bool(report.faults))


class Report:
    """The outcome of all files: counts by kind of damage, and the seeds and reasons of the faults."""

    def __init__(self) -> None:
        self.loaded: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.slowest, self.longest = 0.0, 0

    def text(self) -> str:
        kinds = sorted(self.loaded.keys() | self.refused.keys())
        lines = [f"{'damage':<28}{'valid':>8}{'refused':>9}"]
        lines += [f"{kind:<28}{self.loaded[kind]:>8}{self.refused[kind]:>9}" for kind in kinds]
        lines += [f"{'all':<28}{self.loaded.total():>8}{self.refused.total():>9}"]
        lines += [f"slowest file {self.slowest:.3f} s, longest message {self.longest} characters beside the path"]
        return "\n".join([*lines, f"faults: {len(self.faults)}", *self.faults[:20]])


def check_files(count: int, first: int, folder: Path) -> Report:
    """Make and load the files of `count` seeds."""
    report, path = Report(), folder / "damaged.safetensors"
    whole = [file.read_bytes() for file in valid_files(folder)]
    for seed in range(first, first + count):
        dice = random.Random(seed)
        kind = dice.choice(sorted(CHANGES))
        path.write_bytes(CHANGES[kind](dice.choice(whole), dice))
        start = time.perf_counter()
        try:
            found = NoiseResult.load(path)
        except ValueError as error:
            message = str(error).replace(str(path), "")
            report.refused[kind] += 1
            report.longest = max(report.longest, len(message))
            if not message.startswith("Expected a file that ") or not message.isprintable() or len(message) > LONGEST:
                report.faults.append(f"seed {seed}, {kind}: the message {message[:200]!r}")
        except Exception as error:
            report.faults.append(f"seed {seed}, {kind}: {error!r}"[:300])
        else:
            report.loaded[kind] += 1
            report.faults += [f"seed {seed}, {kind}: {fault}" for fault in faults_of(found, folder)]
        seconds = time.perf_counter() - start
        report.slowest = max(report.slowest, seconds)
        if seconds > SLOWEST:
            report.faults.append(f"seed {seed}, {kind}: took {seconds:.1f} s")
    return report


def faults_of(found: NoiseResult, folder: Path) -> Iterator[str]:
    """Yield what is wrong with a loaded result: shapes, values, what it shows, and what it saves."""
    steps, batch = found.losses.shape
    tensors = [found.noise, found.latents, *([] if found.initial_noise is None else [found.initial_noise])]
    if not all(len(each) == batch and each.isfinite().all() for each in tensors):
        yield "noise or latents that are not finite, or of another batch"
    if found.norms.shape != (steps, batch) or any(each.shape != (steps, batch) for each in found.scores.values()):
        yield "rows of another shape"
    if found.band_changes is not None and found.band_changes.shape != (steps, batch, 3):
        yield "bands of another shape"
    if not repr(found).isprintable():
        yield f"a repr that is not printable: {repr(found)[:200]!r}"
    if (found.generator() is None) != (not found.generator_states) or found.best_loss.shape != (batch,):
        yield "generators or losses that cannot be used"
    again = folder / "again.safetensors"
    try:
        found.save(again)
        loaded = NoiseResult.load(again)
    except Exception as error:
        yield f"a result that cannot be saved and loaded: {error!r}"[:300]
        return
    if not torch.equal(loaded.noise, found.noise) or json.dumps(loaded.provenance) != json.dumps(found.provenance):
        yield "another result after saving and loading"


def valid_files(folder: Path) -> list[Path]:
    """Write the results that the files are made from: one of two images with all entries, one of a single image."""
    dice = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice)

    found = []
    for batch, several, extras in ((2, True, True), (1, False, False)):
        noise = normal(batch, 4, 8, 8)
        streams = [("cpu", torch.Generator().manual_seed(seed).get_state()) for seed in range(batch)]
        result = NoiseResult(
            noise=noise,
            latents=noise.bfloat16() if extras else noise,
            scores={"red": normal(3, batch), "hpsv2.1": normal(3, batch)},
            losses=normal(3, batch),
            norms=normal(3, batch).abs(),
            best_step=torch.tensor([2, 0][:batch]),
            provenance=provenance(batch, several),
            generator_states=streams if several else [],  # zeros are no state, but a valid noise
            reports={"held out red": {"best": [0.5, 1.0]}} if extras else {},
            initial_noise=normal(batch, 4, 8, 8) if extras else None,
            band_changes=normal(3, batch, 3) if extras else None,
            progress=None if extras else Progress({"run": RUN, "reports": {}}, {"0": noise, "1": normal(1)}),
        )
        found.append(folder / f"valid{batch}.safetensors")
        result.save(found[-1])
    return found


def provenance(batch: int, several: bool) -> dict[str, Any]:
    """Return the provenance of a run."""
    return {
        "method": "ReNO",
        "settings": {"steps": 3, "learning_rate": 5.0, "rewards": "red", "decoder": None},
        "objective": {"red": 1.0},
        "prompts": ["a red circle", "two blue stars"][:batch],
        "reward_prompts": ["a red circle", "two blue stars"][:batch],
        "seeds": [1, 2][:batch],
        "generators": "list" if several else "single",
        "model": "stabilityai/sdxl-turbo",
        "revision": None,
        "scheduler": {"class": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "trained_betas": None},
        "adapters": {"unet": {"pixel": {"weight": 0.7, "sha256": "0a"}}},
        "pipeline": "StableDiffusionPipeline",
        "dtype": "float32",
        "arguments": {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 64, "width": 64},
        "unrecorded": [],
        "decoder": {"class": "AutoencoderTiny", "name": "madebyollin/taesd"},
        "stopped": None,
        "steps": 3,
        "complete": batch == 2,
        "call": {"prompt": "a red circle", "method": {"name": "ReNO", "steps": 3}, "arguments": {"height": 64}},
        "versions": {"torch": "2.13.0"},
    }


def place(whole: bytes, dice: random.Random) -> int:
    """Return a position in a file; every other one in its header."""
    return dice.randrange(8 + int.from_bytes(whole[:8], "little") if dice.random() < 0.5 else len(whole))


def flip(whole: bytes, dice: random.Random) -> bytes:
    found = bytearray(whole)
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        found[place(whole, dice)] ^= 1 << dice.randrange(8)
    return bytes(found)


def replace(whole: bytes, dice: random.Random) -> bytes:
    start = place(whole, dice)
    piece = dice.choice([bytes, dice.randbytes, lambda size: b"\xff" * size])(dice.choice([1, 4, 100]))
    return (whole[:start] + piece + whole[start + len(piece) :])[: len(whole)]


def truncate(whole: bytes, dice: random.Random) -> bytes:
    return whole[: dice.choice([place(whole, dice), len(whole) - dice.randrange(1, 9)])]


def lose(whole: bytes, dice: random.Random) -> bytes:
    start = place(whole, dice)
    return whole[:start] + whole[start + dice.choice([1, 8, 1000]) :]


def double(whole: bytes, dice: random.Random) -> bytes:
    start = place(whole, dice)
    return whole[: start + dice.choice([1, 8, 1000])] + whole[start:]


def exchange(whole: bytes, dice: random.Random) -> bytes:
    first, second = sorted(place(whole, dice) for _ in range(2))
    size = min(dice.choice([1, 16, 500]), second - first, len(whole) - second)
    a, b = whole[first : first + size], whole[second : second + size]
    return whole[:first] + b + whole[first + size : second] + a + whole[second + size :]


def length(whole: bytes, dice: random.Random) -> bytes:
    """Change the length of the header."""
    true = int.from_bytes(whole[:8], "little")
    wrong = dice.choice(
        [0, 1, true - 1, true + 1, 2 * true, len(whole), 2**31, 2**40, 2**64 - 1, dice.randrange(2**64)]
    )
    return struct.pack("<Q", wrong) + whole[8:]


def parts(whole: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return the index of the tensors, the header of noiseopt, and the data."""
    end = 8 + int.from_bytes(whole[:8], "little")
    index = json.loads(whole[8:end])
    return index, json.loads(index["__metadata__"]["noiseopt"]), whole[end:]


def joined(index: dict[str, Any], header: Any, data: bytes) -> bytes:
    """Return a file of these parts, with lists in lists in the place of `DEEP`."""
    inner = re.sub(r'"@(\d+)@"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(header))
    found = {**index, "__metadata__": {**index["__metadata__"], "noiseopt": inner}}
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + data


def evil(dice: random.Random) -> Any:
    """Return a value that a file should not have, or should have elsewhere."""
    return dice.choice([*TEXTS, *NUMBERS, [], {}, [[]], {"class": "os.system"}, ["x"] * 3, dice.choice(DEEP)])


def edit(value: Any, dice: random.Random) -> Any:
    """Replace, remove or add one value somewhere in nested dictionaries and lists."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.15:
        return evil(dice)
    found: Any = value.copy()
    key = dice.choice(list(found) if isinstance(found, dict) else list(range(len(found))))
    action = dice.random()
    if action < 0.1:
        del found[key]
    elif action < 0.2 and isinstance(found, dict):
        found[dice.choice(TEXTS)] = evil(dice)
    elif action < 0.2 and isinstance(found, list):
        found.append(evil(dice))
    else:
        found[key] = edit(found[key], dice)
    return found


def edit_header(whole: bytes, dice: random.Random) -> bytes:
    index, header, data = parts(whole)
    for _ in range(dice.choice([1, 1, 2, 5])):
        header = edit(header, dice)
    return joined(index, header, data)


def edit_provenance(whole: bytes, dice: random.Random) -> bytes:
    index, header, data = parts(whole)
    for _ in range(dice.choice([1, 1, 3])):
        key = dice.choice(list(header["provenance"]))
        header["provenance"][key] = edit(header["provenance"][key], dice)
    return joined(index, header, data)


def edit_index(whole: bytes, dice: random.Random) -> bytes:
    """Change type, shape or place of a tensor, or any value of the index."""
    index, header, data = parts(whole)
    name = dice.choice([each for each in index if each != "__metadata__"])
    kind = dice.randrange(4)
    if kind == 0:
        index[name]["dtype"] = dice.choice(DTYPES)
    elif kind == 1:
        index[name]["shape"] = dice.choice(
            [index[name]["shape"][::-1], [*index[name]["shape"], 1], [1] * 900, [2**40], [0]]
        )
    elif kind == 2:
        index[name]["data_offsets"] = dice.choice(
            [[0, 0], [0, 2**62], [8, 4], [-1, 3], index[name]["data_offsets"][:1]]
        )
    else:
        index[name] = edit(index[name], dice)
    return joined(index, header, data)


def swap_tensors(whole: bytes, dice: random.Random) -> bytes:
    """Give two tensors each other's name."""
    index, header, data = parts(whole)
    first, second = dice.sample([name for name in index if name != "__metadata__"], 2)
    index[first], index[second] = index[second], index[first]
    return joined(index, header, data)


def rename_tensor(whole: bytes, dice: random.Random) -> bytes:
    index, header, data = parts(whole)
    name = dice.choice([each for each in index if each != "__metadata__"])
    index[dice.choice(["scores.x", f"scores.{ESCAPE}", "noise", "images", *TEXTS])] = index.pop(name)
    return joined(index, header, data)


def random_numbers(whole: bytes, dice: random.Random) -> bytes:
    """Replace the data, whose sizes stay right."""
    index, header, data = parts(whole)
    return joined(index, header, dice.choice([bytes(len(data)), dice.randbytes(len(data)), b"\xff" * len(data)]))


def foreign(whole: bytes, dice: random.Random) -> bytes:
    """Return a file of another kind."""
    kinds = [
        b"",
        b"PK\x03\x04" + whole,
        b"\x80\x04" + whole,
        b"GIF89a" + whole,
        whole[8:],
        b"{}",
        whole + whole,
        bytes(100),
    ]
    return dice.choice([*kinds, dice.randbytes(dice.randrange(2000)), struct.pack("<Q", 2) + b"[]"])


CHANGES: dict[str, Change] = {
    "bits flipped": flip,
    "bytes replaced": replace,
    "cut": truncate,
    "piece lost": lose,
    "piece doubled": double,
    "pieces swapped": exchange,
    "length of the header": length,
    "value of the header": edit_header,
    "value of the provenance": edit_provenance,
    "entry of a tensor": edit_index,
    "tensors swapped": swap_tensors,
    "tensor renamed": rename_tensor,
    "other numbers": random_numbers,
    "foreign": foreign,
}

if __name__ == "__main__":
    main()
