"""The source of a pipeline class, saved beside its weights: what is saved loads with this code and without it."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ...private_names import treat_as

DYNAMIC_MODULES = "diffusers_modules."  # the package of what diffusers loads by `custom_pipeline`
LOCAL_MODULES = DYNAMIC_MODULES + "local"  # the package that all pipelines from local folders share


class SavedWithCode:
    """Makes `save_pretrained` and `push_to_hub` write the source of the pipeline, and name its stock class.

    `DiffusionPipeline.from_pretrained(folder)`, the stock class and `AutoPipelineForText2Image` then load the stock
    pipeline. `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)` loads what
    was saved, and so does the class itself, which needs no trust because it runs none of that code.
    `AutoPipelineForText2Image.from_pipe(pipe)` takes it for a pipeline of the stock class.
    """

    _code: dict[str, str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Read the source of a class that diffusers loads from a file, before another pipeline replaces the file."""
        super().__init_subclass__(**kwargs)
        if (stock := stock_class(cls)) is not None:
            treat_as(cls, stock)
        module = cls.__module__
        if module.startswith(DYNAMIC_MODULES) and all(base.__module__ != module for base in cls.__mro__[1:]):
            own, *others = dynamic_files(module)
            cls._code = {"pipeline.py": own.read_text(encoding="utf-8")}
            cls._code |= {file.name: file.read_text(encoding="utf-8") for file in others}
            if module.rpartition(".")[0] == LOCAL_MODULES:
                make_way(module, cls._code["pipeline.py"])

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Run the stock method. Raises `ValueError` for a repository name from which diffusers could not load."""
        if kwargs.get("push_to_hub"):
            check_repository(type(self), kwargs.get("repo_id") or Path(save_directory).name)
        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Run the stock method. Raises `ValueError` for a repository name from which diffusers could not load."""
        check_repository(type(self), repo_id)
        return super().push_to_hub(repo_id, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Run the stock method, which `save_pretrained` and `push_to_hub` call, and write the source too."""
        if has_code(type(self)):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            for name, source in code_of(type(self)).items():
                (folder / name).write_text(source, encoding="utf-8", newline="\n")
        super().save_config(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_json_string(self) -> str:
        """Return the stock configuration, with the stock class as the class."""
        text: str = super().to_json_string()  # pyright: ignore[reportAttributeAccessIssue]
        named = json.loads(text) | {"_class_name": (stock_class(type(self)) or type(self)).__name__}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"


def stock_class(cls: type) -> type[DiffusionPipeline] | None:
    """Return the first pipeline class among the bases of a class that knows nothing of this code, or `None`."""
    pipelines = (base for base in cls.__mro__ if issubclass(base, DiffusionPipeline) and base is not DiffusionPipeline)
    return next((base for base in pipelines if not issubclass(base, SavedWithCode)), None)


def check_repository(cls: type, repository: str) -> None:
    """Raise `ValueError` for a dot in a repository's name: diffusers makes it a module name with siblings to import."""
    if has_code(cls) and "." in repository:
        raise ValueError(
            f"Expected a repository name without a dot, but got {repository!r}: diffusers cannot load code of several "
            "files from there. Choose another name."
        )


def dynamic_files(module: str) -> list[Path]:
    """Return the file of a module that diffusers is loading, and that of the bundle if this code is part of one."""
    origins = [str(sys.modules[module].__file__)]
    if __spec__.name.startswith(DYNAMIC_MODULES):
        origins.append(str(__spec__.origin))
    return [Path(origin) for origin in origins]


def make_way(module: str, source: str) -> None:
    """Let diffusers load this and the next pipeline from a local folder as if each were the first.

    It copies the files of each to the same place and runs each `pipeline.py` in the same module, where it expects a
    single pipeline class. Python imports a name once, and compiles no file of the same size and second again.
    """
    for name, value in list(vars(sys.modules[module]).items()):
        is_pipeline = isinstance(value, type) and issubclass(value, DiffusionPipeline)
        if is_pipeline and value.__module__ == module and f"class {name}(" not in source:
            delattr(sys.modules[module], name)
    for file in dynamic_files(module):
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    if __spec__.name.startswith(LOCAL_MODULES):
        sys.modules.pop(__spec__.name, None)


def has_code(cls: type) -> bool:
    """Return whether a class was loaded from a file or can be imported, unlike one of a script or a notebook."""
    importable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls and cls.__module__ != "__main__"
    return "_code" in vars(cls) or importable


def code_of(cls: type) -> dict[str, str]:
    """Return the source of a class that `has_code`: file name to text.

    The files that it was loaded from; for a class of this package those of a Hub card; for any other class an import
    from its package.
    """
    if "_code" in vars(cls):
        return vars(cls)["_code"]
    if cls.__module__.startswith("noiseopt.pipelines."):  # the bundler is no part of a bundle
        return importlib.import_module("noiseopt.hub.build").code_of_pipeline(cls)
    name, package = cls.__name__, cls.__module__.split(".")[0]
    docstring = f'"""{name} of the package {package}, which has to be installed."""'
    return {"pipeline.py": f"{docstring}\n\nfrom {cls.__module__} import {name}\n"}
