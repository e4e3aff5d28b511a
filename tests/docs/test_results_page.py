"""docs/results.md and README's table equal docs/results/runs.json, which a script makes from runs."""

import copy
import json
import re
from pathlib import Path

import make_results_page as script
import pytest
import yaml
from page_parts import NONE
from results_page import store, tables
from results_page.record import record
from results_page.trials import trials

from capsexp.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "experiment"


@pytest.fixture
def data():
    return {"headlines": copy.deepcopy(store.load(script.DATA)["headlines"]), "runs": []}


@pytest.fixture
def finished(write_run):
    """Write a finished run of a recipe, with all files that a record is made of."""

    def write(
        name, *, seed=0, accuracy=0.99, overrides=(), recipe="sabour2017_mnist", settings=None, **fields
    ):
        status = {
            "choices": {"experiment": recipe, "dataset": "mnist"},
            "best": {"accuracy": 0.98, "step": 20},
            "results": {"test/accuracy": accuracy} | fields.pop("results", {}),
            "training_seconds": 120.0,
            "steps_per_epoch": 10,
            "costs": {"parameters": 8_200_000},
            "caveats": ["mnist: not the published images"],
        }
        path = write_run(
            name,
            {"seed": seed, "trainer.batch_size": 64, "trainer.test": "last"} | (settings or {}),
            validation=[0.9, 0.95, 0.98],
            **status | fields,
        )
        (path / ".hydra").mkdir()
        typed = [f"experiment={recipe}", f"seed={seed}", *overrides, "device.threads=1", f"run={path}"]
        (path / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
        with open(path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 30, "test/accuracy": accuracy}) + "\n")
        clock = [{"step": step, "training_seconds": 4.0 * step} for step in (10, 20, 30)]
        (path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in clock))
        environment = {"versions": {"capsexp": "0.1.0", "torch": "2.9"}, "commit": "a" * 40, "dirty": False}
        environment |= {"device": "cpu (1 thread)", "cores": 2, "cpu": "A Processor", "host": "secret"}
        (path / "env.json").write_text(json.dumps(environment))
        return path

    return write


def evaluate(path, *, crops, accuracy, step=30, **settings):
    """Append to evaluations.jsonl what `capsexp eval` does."""
    config = yaml.safe_load((path / "resolved_config.yaml").read_text())
    config["dataset"]["preprocess"] = {"test_crops": crops}
    config |= {"split": "test", "weights": "last"} | settings
    line = {"split": "test", "step": step, "config": config, "accuracy": accuracy}
    with open(path / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def test_the_pages_equal_the_data():
    script.check(store.load(script.DATA))


def test_the_data_are_as_the_script_writes_them(tmp_path):
    store.save(store.load(script.DATA), tmp_path / "runs.json")
    assert (tmp_path / "runs.json").read_text() == script.DATA.read_text()


def test_the_papers_errors_are_those_of_the_recipes(data):
    for headline in data["headlines"]:
        for recipe in headline["recipes"]:
            stated = yaml.safe_load((CONF / f"{recipe}.yaml").read_text()).get("paper")
            if stated is not None:
                assert (stated["error"], stated["sd"]) == (headline["error"], headline["sd"]), recipe


def test_a_record_says_what_was_run_and_measured(finished):
    found = record(finished("a", seed=3, overrides=["model.conv_channels=64", "data_root=/somewhere"]))
    shown = {key: found[key] for key in ("recipe", "overrides", "seed", "steps", "images", "epochs")}
    assert shown == {
        **{"recipe": "sabour2017_mnist", "overrides": ["model.conv_channels=64"], "seed": 3},
        **{"steps": 30, "images": 1920, "epochs": 3.0},
    }
    machine = {key: found[key] for key in ("device", "threads", "cpu", "cores", "torch")}
    assert machine == {"device": "cpu", "threads": 1, "cpu": "A Processor", "cores": 2, "torch": "2.9"}
    assert found["tests"] == [{"weights": "last", "step": 30, "crops": 1, "error": 1.0}]
    assert found["curve"] == [[640, 40.0, 10.0], [1280, 80.0, 5.0], [1920, 120.0, 2.0]]
    assert found["caveats"] == ["mnist: not the published images"]
    assert re.fullmatch("[0-9a-f]{64}", found["sha256"])
    assert "secret" not in json.dumps(found)
    assert "/somewhere" not in json.dumps(found)


def test_the_best_weights_are_those_of_their_step(finished):
    (test,) = record(finished("a", settings={"trainer.test": "best"}))["tests"]
    assert (test["weights"], test["step"]) == ("best", 20)


def test_several_crops_and_other_weights_stand_beside_the_own_test(finished):
    path = finished("a")
    evaluate(path, crops=13, accuracy=0.992, weights="best")
    evaluate(path, crops=1, accuracy=0.97, step=20, weights="best")
    found = record(path)
    assert [(test["crops"], test["weights"], test["error"]) for test in found["tests"]] == [
        (1, "last", 1.0),
        (13, "last", 0.8),
    ]
    assert [(test["step"], test["error"]) for test in found["other_tests"]] == [(20, 3.0)]


def test_pairs_have_errors_of_pairs_and_of_digits(finished, data):
    path = finished("a", recipe="sabour2017_multimnist", results={"test/digit_accuracy": 0.995})
    store.add(data, record(path))
    assert data["runs"][0]["tests"][0]["digit_error"] == 0.5
    assert "**1.00 of pairs, 0.50 of digits**" in tables.headlines(data)


def test_caveats_of_older_runs_come_from_their_log(finished):
    path = finished("a", caveats=None)
    lines = [
        "mnist: 10 classes",
        "CapsNet with 8,200,000 parameters; 30 steps",
        "mnist: a copy",
        "epoch 1/3  step 1",
    ]
    (path / "train.log").write_text("".join(f"2026-11-28 15:35:46,381 INFO {line}\n" for line in lines))
    assert record(path)["caveats"] == ["mnist: a copy"]


def test_a_run_without_a_test_has_its_curve(finished, data):
    store.add(data, record(finished("a", settings={"trainer.test": "none"})))
    assert data["runs"][0]["tests"] == []
    assert "no long run yet" in tables.headlines(data)
    assert "curves" in script.PARTS
    assert "results.png" in script.curves(data)


def damaged(path, name, content):
    (path / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.joinpath("status.json").unlink(), "no run directory"),
        (lambda path: damaged(path, "status.json", "{"), "status of this one is unknown"),
        (lambda path: damaged(path, "metrics.jsonl", '{"step": 10}\n{"st'), "metrics.jsonl is damaged"),
        (lambda path: damaged(path, "metrics.jsonl", '{"step": 10}\n'), "does not hold the test"),
        (lambda path: damaged(path, "metrics.jsonl", "[1]\n"), "metrics.jsonl is damaged"),
        (lambda path: damaged(path, "env.json", "{"), "env.json cannot be read"),
        (lambda path: damaged(path, "test_errors.json", "{}"), "test_errors.json cannot be read"),
        (lambda path: damaged(path, "evaluations.jsonl", "{}\n"), "evaluations.jsonl is damaged"),
        (
            lambda path: path.joinpath(".hydra", "overrides.yaml").unlink(),
            "are not known",
        ),
        (lambda path: evaluate(path, crops=1, accuracy=0.9, seed=5), "a test with seed=5"),
    ],
)
def test_bad_runs_are_refused_in_one_line(finished, change, message):
    path = finished("a")
    change(path)
    with pytest.raises(UserError, match=message) as refused:
        record(path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "interrupted"}, "status of this one is interrupted"),
        ({"choices": {}}, "without experiment=NAME"),
        ({"training_seconds": None}, "does not say how long it trained"),
        ({"settings": {"trainer.limit_eval_batches": 5}}, "limit_eval_batches=5"),
        ({"settings": {"trainer.overfit": True}}, "trainer.overfit=True"),
        ({"results": {"test/accuracy": None}}, "no test/accuracy"),
    ],
)
def test_runs_that_a_record_cannot_describe_are_refused(finished, fields, message):
    with pytest.raises(UserError, match=message):
        record(finished("a", **fields))


def test_one_refused_run_keeps_all_out(finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DATA", tmp_path / "runs.json")
    (tmp_path / "folder").mkdir()
    runs = [finished("a"), tmp_path / "nowhere", tmp_path / "folder"]
    with pytest.raises(UserError, match=r"nowhere.*\n.*folder"):
        script.add(data, runs, row=None, cpu=None)
    assert data["runs"] == []
    assert not script.DATA.exists()


def test_a_run_replaces_its_earlier_record_and_keeps_the_row_of_its_settings(finished, data):
    store.add(data, record(finished("a", overrides=["a=1", "b=2"])), row="mnist_capsnet_small")
    store.add(data, record(finished("b", overrides=["b=2", "a=1"], accuracy=0.98)))
    store.add(data, record(finished("c", overrides=["b=2", "a=1"], seed=1)))
    assert [(run["row"], run["seed"]) for run in data["runs"]] == [
        ("mnist_capsnet_small", 0),
        ("mnist_capsnet_small", 1),
    ]
    assert data["runs"][0]["tests"][0]["error"] == 2.0


def test_an_unknown_row_is_refused_with_the_nearest(finished, data):
    with pytest.raises(UserError, match="did you mean 'mnist_capsnet'"):
        store.add(data, record(finished("a")), row="mnist_capsnat")


def test_seeds_are_shown_as_mean_and_deviation(finished, data):
    for seed, accuracy in enumerate((0.99, 0.98, 0.97)):
        store.add(data, record(finished(str(seed), seed=seed, accuracy=accuracy)))
    line = next(line for line in tables.headlines(data).splitlines() if "8.2M" in line)
    assert "| **2.00 ± 1.00 (n=3)** | +1.75 | 1,920 images, 3 epochs | 2 min, 1 thread, A Processor |" in line
    assert "| 0, 1, 2 | `sabour2017_mnist` | 1, 2, 3 | last |" in line
    assert "- Runs 1, 2, 3: mnist: not the published images" in tables.headlines(data)
    assert tables.all_runs(data).count("`capsexp train experiment=sabour2017_mnist seed=") == 3


def test_errors_by_class_are_means_over_seeds(finished, data):
    for seed, wrong in enumerate((1, 3)):
        path = finished(str(seed), seed=seed, accuracy=1 - wrong / 100)
        classes = [{"name": "0", "images": 50, "errors": wrong}, {"name": "1", "images": 50, "errors": 0}]
        content = {"images": 100, "classes": classes, "group": None, "groups": []}
        content["confusion"] = [[50 - wrong, wrong], [0, 50]]
        (path / "test_errors.json").write_text(json.dumps(content))
        store.add(data, record(path))
    assert "| 0 | 4.00 |\n| 1 | 0.00 |" in tables.errors(data)


def test_every_number_of_the_tables_comes_from_the_data():
    empty = {"headlines": [], "runs": []}
    for name, content in script.PARTS.items():
        assert not re.search(r"\d", content(empty).replace("sha256", "")), name
    data = store.load(script.DATA)
    before = {name: content(data) for name, content in script.PARTS.items()}
    for run in data["runs"]:
        run["tests"] = [{**test, "error": test["error"] + 1} for test in run["tests"]]
    for headline in data["headlines"]:
        headline["error"] = headline["error"] and headline["error"] + 1
    assert script.PARTS["headlines"](data) != before["headlines"]
    assert script.PARTS["earlier"](data) != before["earlier"]


def test_readme_shows_the_rows_nearest_to_their_papers_in_the_order_of_the_data(finished, data):
    for place, headline in enumerate(line for line in data["headlines"] if line["error"] and line["recipes"]):
        recipe = headline["recipes"][0]
        accuracy = 1 - (1 + place % 2) * headline["error"] / 100
        store.add(data, record(finished(recipe, recipe=recipe, accuracy=accuracy)))
    shown = tables.readme(data).splitlines()[2:]
    assert len(shown) == tables.BEST_ROWS
    assert "MNIST: CapsNet, 8.2M" in shown[0]
    text = f"# Title\n\n{script.markers('results')[0]}\n{script.markers('results')[1]}\nend\n"
    assert tables.readme(data) in script.readme(data, text)
    assert script.readme(data, "# Title\n") == "# Title\n"


def test_the_check_finds_a_changed_number(data, tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text(script.PAGE.read_text().replace("| 0.39 (Sabour", "| 0.93 (Sabour"))
    monkeypatch.setattr(script, "PAGE", page)
    with pytest.raises(SystemExit, match=r"results\.md does not equal runs\.json"):
        script.check(store.load(script.DATA))


def test_the_figure_has_a_panel_for_each_dataset(finished, data, tmp_path):
    store.add(data, record(finished("a")))
    store.add(
        data, record(finished("b", recipe="quickstart", choices={"experiment": "quickstart", "dataset": "x"}))
    )
    assert [*script.panels(data)] == ["mnist", "x"]
    script.draw(data, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_the_command_line_adds_a_run_and_writes_the_page(finished, data, tmp_path, monkeypatch, capsys):
    for name in ("DATA", "PAGE", "README", "FIGURE"):
        monkeypatch.setattr(script, name, tmp_path / getattr(script, name).name)
    store.save(data, script.DATA)
    parts = "".join("{}\n{}\n".format(*script.markers(name)) for name in script.PARTS)
    script.PAGE.write_text(parts)
    script.README.write_text("# capsexp\n")
    assert script.main(["add", str(finished("a")), "--row", "mnist_capsnet_small"]) == 0
    assert "**1.00**" in script.PAGE.read_text()
    assert script.main(["--check"]) == 0
    assert script.main(["readme"]) == 0
    assert script.main(["add", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run directory" in capsys.readouterr().err


def trial(recipe, error, fold, *overrides, seed=0):
    changed = [f"dataset.validation_instance={fold}", "trainer.test=none", *overrides]
    run = {"recipe": recipe, "overrides": changed, "seed": seed, "kept": True, "tests": [], "images": 640}
    return run | {"curve": [[320, 1.0, 50.0], [640, 2.0, error]], "epochs": 2.0}


def test_trials_are_sorted_by_their_mean_over_toys(data):
    data["runs"] = [
        trial("a", 20.0, 6),
        trial("a", 10.0, 7),
        trial("a", 12.0, 6, "loss.label_smoothing=0.1"),
        trial("b", 30.0, "[4,6]", seed=0),
        trial("b", 40.0, "[4,6]", seed=1),
    ]
    lines = trials(data).splitlines()
    assert lines[0].split(" | ")[3:] == ["toy 6, %", "toy 7, %", "toy [4,6], %", "mean, % |"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert [(row[0], row[1], row[3:]) for row in cells] == [
        ("`a`", "`loss.label_smoothing=0.1`", ["12.0", NONE, NONE, "12.0"]),
        ("`a`", NONE, ["20.0", "10.0", NONE, "15.0"]),
        ("`b`", NONE, [NONE, NONE, "35.0", "35.0"]),
    ]
    assert "In all rows: `trainer.test=none`." in lines


def test_a_run_with_a_test_is_no_trial(data):
    data["runs"] = [trial("a", 20.0, 6) | {"tests": [{"weights": "last"}]}]
    assert trials(data) == "No run yet.\n"
