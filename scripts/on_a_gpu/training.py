"""Part 4: three minutes of smallNORB, or of the embedded digits where there is no smallNORB."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from scripts.on_a_gpu.child import python, require_time, run_child
from scripts.on_a_gpu.parts import Outcome, Plan

SECONDS, DRY_SECONDS = 180, 3
REST = 35
"""Seconds for the start, the data and the test."""
NORB = "hinton2018_smallnorb_laptop"
DIGITS = "quickstart_em"
FOLDER = "on_a_gpu_training"


def run(plan: Plan, end: float) -> Outcome:
    """Train in a run directory beside the report, a new one each time."""
    require_time(end)
    recipe, note = (DIGITS, "a dry run: embedded digits") if plan.cpu else recipe_for_data()
    directory = plan.folder / FOLDER
    shutil.rmtree(directory, ignore_errors=True)
    seconds = DRY_SECONDS if plan.cpu else max(1, min(SECONDS, int(end - time.monotonic() - REST)))
    overrides = [f"experiment={recipe}", f"run={directory}", f"device={'cpu' if plan.cpu else 'cuda'}"]
    overrides += [f"trainer.max_seconds={seconds}", "trainer.max_epochs=null", "trainer.max_steps=null"]
    if recipe == NORB:  # 13 crops would take as long as a large part of the training
        overrides.append("dataset.preprocess.test_crops=1")
    child = run_child([python(), "-P", "-m", "capsexp", "train", *overrides], end=end)
    result = {"recipe": recipe, "note": note, "seconds": seconds, **run_figures(directory)}
    if not child.in_time:
        return Outcome("out of time", f"{recipe}: stopped at step {result.get('steps')}", result)
    if child.code != 0 or "test error" not in result:
        return Outcome("failed", child.last_line(), result)
    return Outcome("ok", f"{recipe}: {result['test error']:.2%} test error; {note}", result)


def recipe_for_data() -> tuple[str, str]:
    """Return the recipe that the data allow, and a note about them."""
    from capsexp.config.build import build_components
    from capsexp.config.compose import compose, to_plain

    config = to_plain(compose("train", ["dataset=smallnorb", "device=cpu"], config_dir=None))
    missing = build_components(config, plugins=[]).dataset.missing_files()
    if missing:
        return DIGITS, f"no smallNORB in {config['data_root']} (CAPSEXP_DATA): embedded digits instead"
    return NORB, "smallNORB, one test crop"


def run_figures(directory: Path) -> dict[str, Any]:
    """Return status, steps, images per second and test error of a run, as far as it came."""
    from omegaconf import OmegaConf

    if not (directory / "status.json").exists():
        return {}
    status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    steps, trained = status.get("step"), status.get("training_seconds")
    found = {"run": directory.name, "status": status["status"], "steps": steps, "training seconds": trained}
    if steps and trained:
        size = OmegaConf.load(directory / "resolved_config.yaml").trainer.batch_size
        found |= {"batch": size, "images/s": steps * size / trained}
    accuracy = status.get("results", {}).get("test/accuracy")
    return found if accuracy is None else {**found, "test error": 1 - accuracy}
