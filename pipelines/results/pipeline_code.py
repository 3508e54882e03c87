"""A pipeline's own code, kept beside its weights: what diffusers needs to load a class that it does not have."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

DYNAMIC_MODULES = "diffusers_modules."  # where diffusers puts what it loaded by `custom_pipeline`


class SavedWithCode:
    """Makes `save_pretrained` and `push_to_hub` write the pipeline's `pipeline.py` and name it in `model_index.json`.

    Then `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads what was saved, and so does the class
    itself, which needs no trust as it runs none of that code.
    """

    _code: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the code of a class that was loaded from a file: diffusers puts the next one in the same place."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(DYNAMIC_MODULES):
            cls._code = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """The stock method, which `save_pretrained` and `push_to_hub` call, with the code beside the configuration."""
        if has_code(type(self)):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / "pipeline.py").write_text(code_of(type(self)), encoding="utf-8", newline="\n")
        super().save_config(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_json_string(self) -> str:
        """The stock configuration, with the class named as one of `pipeline.py`."""
        text: str = super().to_json_string()  # pyright: ignore[reportAttributeAccessIssue]
        if not has_code(type(self)):
            return text
        named = json.loads(text) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """The configuration in a file, for a class that is at hand and needs no code to be loaded."""
        index = super()._dict_from_json_file(json_file)  # pyright: ignore[reportAttributeAccessIssue]
        return index | ({"_class_name": cls.__name__} if isinstance(index.get("_class_name"), list) else {})


def has_code(cls: type) -> bool:
    """Whether a class was loaded from a file or can be imported, unlike one of a script or a notebook."""
    importable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls and cls.__module__ != "__main__"
    return "_code" in vars(cls) or importable


def code_of(cls: type) -> str:
    """The source of a file that has a class which `has_code`.

    That of the file that it was loaded from, else a self-contained file for a class of this package, and for another an
    import of it from where it is installed.
    """
    if "_code" in vars(cls):
        return vars(cls)["_code"]
    if cls.__module__.startswith("noiseopt.pipelines."):  # what bundles its modules is no part of a bundle
        return importlib.import_module("noiseopt.hub.build").code_of_pipeline(cls)
    name, package = cls.__name__, cls.__module__.split(".")[0]
    return f'"""{name} of the package {package}, which has to be installed."""\n\nfrom {cls.__module__} import {name}\n'
