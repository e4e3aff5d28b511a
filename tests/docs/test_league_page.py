"""The tables of docs/league.md equal docs/league.json, which a script makes from finished runs."""

import json
import shutil

import make_league_page
import pytest

from capsexp.errors import Notes

ROWS = {"em": "em_r3", "uniform": "uniform", "vb": "vb_r1"}


@pytest.fixture(scope="module")
def script():
    return make_league_page


def test_the_page_equals_the_data(script):
    written = script.PAGE.read_text(encoding="utf-8")
    data = json.loads(script.DATA.read_text(encoding="utf-8"))
    assert script.page(data, written) == written, f"run `{script.COMMAND}`"
    assert script.FIGURE.exists() == bool(data["curves"])


def errors(count):
    part = {"name": "car 0", "class": "car", "images": 200, "errors": count}
    classes = [{"name": "car", "images": 200, "errors": count}, {"name": "truck", "images": 0, "errors": 0}]
    return {
        **{"images": 200, "errors": count, "classes": classes, "group": "toy", "groups": [part]},
        "confusion": [[200 - count, count], [0, 0]],
    }


@pytest.fixture
def outputs(write_run, tmp_path):
    """Two rows of two seeds, one also with toys held out; a stopped run, and one of another recipe."""

    def write(name, routing, count=None, *, seed=0, fold=None, recipe=None, products=1000, **fields):
        settings = {"seed": seed, "dataset.validation_instance": fold, "trainer.max_steps": 30}
        path = write_run(
            name,
            {**settings, "trainer.batch_size": 64, "routing.kind": routing},
            test=None if count is None else 1 - count / 200,
            choices={
                **{"experiment": recipe or f"league_routing_{ROWS[routing]}", "routing": routing},
                **{"model": "em_routing", "dataset": "smallnorb"},
            },
            costs={"parameters": 5, "multiplications": products, "peak_memory": 2**20},
            **fields,
        )
        (path / ".hydra").mkdir()
        overrides = [f"experiment=league_routing_{ROWS[routing]}", f"seed={seed}", f"run={name}"]
        (path / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        if count is not None:
            (path / "test_errors.json").write_text(json.dumps(errors(count)))
        lines = [{"step": step, "training_seconds": step / 10} for step in (10, 20, 30)]
        (path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    for seed in (0, 1):
        write(f"em-{seed}", "em", 10 + 2 * seed, seed=seed, products=2_000_000)
        write(f"uniform-{seed}", "uniform", 20 + 2 * seed, seed=seed)
    write("em-2", "em", seed=2, status="interrupted", products=2_000_000)
    for fold, accuracy in ((4, 0.5), (6, 0.7), (9, 0.2)):
        path = write(f"fold-{fold}", "em", fold=fold, validation=[accuracy] * 3, products=2_000_000)
        with open(path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 30, "validation/balanced_accuracy": accuracy}) + "\n")
    write("vb", "vb", fold=4, validation=[0.9], products=3_000_000)
    write("other", "em", 199, recipe="hinton2018_smallnorb")
    return tmp_path


def test_rows_come_from_the_runs_of_league_recipes(script, outputs):
    data = script.collect([outputs], Notes())
    em, uniform, vb = data["rows"]
    assert [row["recipe"] for row in data["rows"]] == [
        "league_routing_em_r3",
        "league_routing_uniform",
        "league_routing_vb_r1",
    ]
    assert em["budget"] == "1,920 images"
    assert em["seeds"] == [0, 1]
    assert em["measures"]["test/error"]["mean"] == pytest.approx(5.5)
    assert em["measures"]["test/gap_to_uniform"]["mean"] == pytest.approx(-5)
    assert em["measures"]["validation/folds_4_6_7_8"] == {"mean": 0.6, "sd": pytest.approx(0.141421), "n": 2}
    assert em["measures"]["validation/fold_9"]["mean"] == 0.2
    assert em["toys"] == {"car 0": 5.5}
    assert em["status"] == "2 finished, 1 interrupted"
    assert len(em["resume"]) == 1
    assert em["command"] == "capsexp train experiment=league_routing_em_r3"
    assert "test/gap_to_uniform" not in uniform["measures"]
    assert "test/error" not in vb["measures"]
    points = {curve["label"]: curve["points"] for curve in data["curves"]}
    assert points["league_routing_em_r3"][0] == [1, pytest.approx(50)]  # fold 4: all recipes have it


def test_speeds_and_seconds_come_from_runs_that_had_the_machine_alone(script, outputs):
    quiet = outputs / "quiet"
    shutil.copytree(outputs / "em-0", quiet / "em")
    status = json.loads((quiet / "em" / "status.json").read_text())
    (quiet / "em" / "status.json").write_text(json.dumps({**status, "training_seconds": 1.5}))
    data = script.collect([*(path for path in outputs.iterdir() if path != quiet)], Notes(), [quiet])
    em, uniform, _ = data["rows"]
    assert em["measures"]["images_per_second"] == {"mean": pytest.approx(30 * 64 / 1.5), "n": 1}
    assert em["seeds"] == [0, 1]
    assert "images_per_second" not in uniform["measures"]
    points = {curve["label"]: curve["points"] for curve in data["curves"]}
    assert points["league_routing_em_r3"][0] == [pytest.approx(10 * 1.5 / 30), pytest.approx(50)]


def test_tables_show_the_data(script, outputs):
    data = json.loads(json.dumps(script.collect([outputs], Notes())))
    text = script.tables(data)
    assert "**smallnorb, 1,920 images**" in text
    row = next(line for line in text.splitlines() if line.startswith("| `league_routing_em_r3` | 5.50"))
    assert "| 5.50 ± 0.71 (2) | 5.50 [5.50, 5.50] | -5.00 [-5.00, -5.00] | 60.0 ± 14.1 (2) | 20.0 |" in row
    assert "| 2 finished, 1 interrupted |" in row
    assert "2.2 (68K parameters" in row
    assert "gap to pool" not in text
    assert f"unfinished; `capsexp train experiment=league_routing_em_r3 seed=2 run={outputs}/em-2`" in text
    assert "![Error on toys held out" in text


def test_the_figure_is_drawn_from_the_data(script, outputs, tmp_path):
    script.draw(script.collect([outputs], Notes()), tmp_path / "league.png")
    assert (tmp_path / "league.png").stat().st_size > 5000


def test_the_confusion_of_toy_9_is_drawn(script, outputs, tmp_path):
    content = {"last": errors(40), "best": None}
    (outputs / "fold-9" / "validation_errors.json").write_text(json.dumps(content))
    (entry,) = script.collect([outputs], Notes())["odd_fold"]
    assert entry["classes"] == ["car", "truck"]
    assert entry["confusion"] == [[160, 40], [0, 0]]
    script.draw_confusion(entry, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 3000


def test_a_page_without_markers_is_refused(script):
    with pytest.raises(SystemExit, match="needs the lines"):
        script.page({"rows": [], "curves": []}, "# The league\n")
