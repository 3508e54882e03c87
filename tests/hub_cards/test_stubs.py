"""The stub files of the pipeline classes say what their calls take."""

import ast
import importlib.metadata
import inspect
import shutil
import subprocess
import sys
import textwrap

import pytest

from noiseopt.hub import stubs
from noiseopt.hub.cards import CARDS

CLASSES = [card.cls for card in CARDS]


def declared(cls):
    """The function in a stub file."""
    (found,) = (node for node in ast.parse(stubs.stub_path(cls).read_text()).body if isinstance(node, ast.ClassDef))
    assert found.name == cls.__name__ and [ast.unparse(base) for base in found.bases] == [
        base.__name__ for base in cls.__bases__
    ]
    (call,) = found.body
    assert isinstance(call, ast.FunctionDef) and call.name == "__call__"
    return call


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_parameters_are_those_of_the_call(cls):
    if importlib.metadata.version("diffusers") not in stubs.stub_path(cls).read_text().partition("\n")[0]:
        pytest.skip("of another version of diffusers")
    parameters = inspect.signature(cls.__call__).parameters.values()
    ours = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    stock = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    arguments = declared(cls).args
    assert [argument.arg for argument in arguments.args] == stock
    assert [argument.arg for argument in arguments.kwonlyargs] == ours
    assert arguments.vararg is arguments.kwarg is None and {"method", "steps", "callbacks"} <= set(ours)
    assert not stubs.drifted_stubs([cls])


def test_a_drifted_stub_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stubs, "stub_path", lambda cls: tmp_path / f"{cls.__name__}.pyi")
    missing = [tmp_path / f"{cls.__name__}.pyi" for cls in CLASSES]
    assert stubs.drifted_stubs(CLASSES) == missing
    stubs.write_stubs(CLASSES)
    assert stubs.drifted_stubs(CLASSES) == []
    missing[0].write_text(missing[0].read_text() + "\n")
    assert stubs.drifted_stubs(CLASSES) == missing[:1]
    newer = missing[0].read_text().replace(importlib.metadata.version("diffusers"), "99.0")
    missing[0].write_text(newer)
    assert stubs.drifted_stubs(CLASSES) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="pyright runs on Node.js")
def test_a_type_checker_sees_stock_parameters(root, tmp_path):
    """A misspelled argument and a wrong type are reported; a right call is not."""
    program = """
        import torch
        from noiseopt.pipelines import CNOFluxPipeline, ReNOTurboPipeline


        def watch(state) -> None: ...


        def watch_step(pipe, step: int, timestep: int, tensors: dict) -> dict:
            return tensors


        pipe = ReNOTurboPipeline.from_pretrained("stabilityai/sdxl-turbo")
        assert isinstance(pipe, ReNOTurboPipeline)
        output = pipe(
            ["a red cat", "a blue dog"],
            rewards={"clipscore": 1.0},
            steps=3,
            method_kwargs={"learning_rate": 1.0},
            callbacks=watch,
            noise_sampler="pink",
            num_inference_steps=1,
            guidance_scale=0,
            negative_prompt=None,
            generator=torch.Generator(),
            latents=torch.zeros(1),
            callback_on_step_end=watch_step,
        )
        print(output.images[0])
        pipe("a red cat", num_inference_step=1)
        pipe("a red cat", optimization_steps=1)
        pipe("a red cat", steps="many")


        def flux(pipe: CNOFluxPipeline) -> None:
            pipe("a red cat", num_images_per_prompt=2, latents=torch.zeros(1), max_sequence_length=77)
            pipe("a red cat", true_cfg=1.0)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program).lstrip("\n"))
    settings = f'{{"extraPaths": ["{root / "src"}"], "reportMissingModuleSource": false}}'
    (tmp_path / "pyrightconfig.json").write_text(settings)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [line.partition("program.py:")[2] for line in run.stdout.splitlines() if " error: " in line]
    found = [(int(line.partition(":")[0]), line.partition("error: ")[2].split('"')[1]) for line in errors]
    lines = (tmp_path / "program.py").read_text().splitlines()
    at = {
        word: next(i for i, line in enumerate(lines, 1) if word in line)
        for word in ("num_inference_step=", "optim", "many", "true_cfg=")
    }
    assert [line for line, _ in found] == sorted(at.values()), run.stdout
    assert [word for _, word in found][:2] == ["num_inference_step", "optimization_steps"], run.stdout
