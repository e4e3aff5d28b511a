import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from capsexp.config import naming
from capsexp.config.naming import job_name, new_run_dir, sweep_name

CHOICES = {"model": "em_routing", "dataset": "digits", "experiment": None}


def test_a_job_is_named_after_its_settings():
    assert re.fullmatch(r"iterations-2-seed-0-[0-9a-f]{8}", job_name(["routing.iterations=2", "seed=0"]))
    assert re.fullmatch(r"default-[0-9a-f]{8}", job_name([]))


@pytest.mark.parametrize(
    "same",
    [
        ["seed=0", "routing.iterations=2"],
        ["routing.iterations=2", "seed=0", "device=cuda", "device.threads=1", "data_root=/data"],
        ["routing.iterations=2", "resume=force", "seed=0", "hydra.verbose=true", "run=x"],
    ],
)
def test_neither_order_nor_what_changes_no_result_changes_a_jobs_name(same):
    assert job_name(same) == job_name(["routing.iterations=2", "seed=0"])


@pytest.mark.parametrize(
    "other", [["seed=1"], ["seed=0", "a=1"], ["+seed=0"], ["seed=0", "seed=0,"], ["seed-0"], []]
)
def test_other_settings_have_another_name(other):
    assert job_name(other) != job_name(["seed=0"])


def test_the_last_override_of_a_key_counts():
    assert job_name(["seed=0", "seed=1"]) != job_name(["seed=1", "seed=0"])


@pytest.mark.parametrize(
    "value", ["x" * 300, "[1, 2]", "{a: 1, b: /x}", "'ä = ö'", "../../etc", "-", "\t\n", "="]
)
def test_names_are_plain_and_short(value):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,99}", job_name([f"model.pose={value}"]))


def test_a_longer_list_is_the_same_sweep_and_other_constants_are_another():
    name = sweep_name(CHOICES, ["trainer.max_epochs=2"], ["seed", "routing.iterations"])
    assert re.fullmatch(r"em_routing-digits-iterations-seed-[0-9a-f]{8}", name)
    assert name == sweep_name(CHOICES, ["device=cpu", "trainer.max_epochs=2"], ["routing.iterations", "seed"])
    assert name != sweep_name(CHOICES, ["trainer.max_epochs=3"], ["seed", "routing.iterations"])
    assert name != sweep_name(CHOICES, ["trainer.max_epochs=2"], ["seed"])


def test_a_sweep_is_named_after_its_recipe_and_not_after_what_it_varies():
    recipe = {**CHOICES, "experiment": "quickstart"}
    assert sweep_name(recipe, [], ["seed"]).startswith("quickstart-seed-")
    assert sweep_name(CHOICES, [], ["model"]).startswith("digits-model-")


# Eight names at most are possible here, so eight directories mean that none was taken twice.
EIGHT_NAMES = """
import random, sys, time, secrets
from pathlib import Path
from capsexp.config import naming
from capsexp.config.naming import new_run_dir
time.strftime = lambda form: "20260101-000000"
secrets.token_hex = lambda size: random.choice("abcdefgh")
print(new_run_dir(Path(sys.argv[1]), label="x").name)
"""


def test_eight_processes_in_the_same_second_get_eight_directories(tmp_path):
    command = [sys.executable, "-c", EIGHT_NAMES, str(tmp_path / "parent")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    names = {process.communicate()[0].strip() for process in processes}
    assert names == {f"20260101-000000-x-{letter}" for letter in "abcdefgh"}
    assert {path.name for path in (tmp_path / "parent").iterdir()} == names


def test_eight_threads_in_the_same_second_get_eight_directories(tmp_path, monkeypatch):
    letters = iter("aabbccddeeffgghh")
    monkeypatch.setattr(naming.time, "strftime", lambda form: "20260101-000000")
    monkeypatch.setattr(naming.secrets, "token_hex", lambda size: next(letters))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: new_run_dir(tmp_path), range(8)))
    assert len({path.name for path in paths}) == 8
    assert all(path.is_dir() for path in paths)


@pytest.mark.parametrize(
    ("label", "slug"),
    [("", ""), ("seed=1", "-seed-1"), ("a/../b ${c}='é,'", "-a-..-b-c"), ("x" * 99, "-" + "x" * 60)],
)
def test_names_hold_only_what_every_file_system_and_shell_takes(label, slug, tmp_path):
    name = new_run_dir(tmp_path, label=label).name
    assert re.fullmatch(r"\d{8}-\d{6}" + re.escape(slug) + "-[0-9a-f]{4}", name)
