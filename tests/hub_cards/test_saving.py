"""A saved pipeline has its code with it: loaded again, from its folder or the Hub, it is what it was."""

import json

from noiseopt.hub.bundle import bundle


def test_code_goes_along(hub, processes, root, tmp_path):
    folders = {}
    for name in ("reno", "cno"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        entry = root / f"pipelines/{name}_stable_diffusion.py"
        (folders[name] / "pipeline.py").write_text(bundle(entry, root, root / "rewards"), encoding="utf-8")
    program = root / "tests/hub_cards/save_card.py"
    run = processes.run(program, folders["reno"], folders["cno"], tmp_path, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert all(facts.values()), facts
    pushed = {path.name for path in (hub.root / "someone/mine").iterdir()}
    assert {"README.md", "model_index.json", "pipeline.py", "unet"} <= pushed
    assert (hub.root / "someone/mine/pipeline.py").read_bytes() == (folders["reno"] / "pipeline.py").read_bytes()
