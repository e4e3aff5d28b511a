"""Test tables of recipes: expansion, refused overrides, and published errors."""

from pathlib import Path

import pytest
import yaml

from capsexp.cli.sweep.tables import check_sweep, expand_tables
from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.config.naming import sweep_name
from capsexp.config.settings import Published, comparable, published
from capsexp.errors import UserError

EXPERIMENTS = {path.stem: path for path in Path(conf_dir(), "experiment").glob("*.yaml")}
TABLES = {
    name: rows
    for name, path in EXPERIMENTS.items()
    if (rows := yaml.safe_load(path.read_text()).get("table"))
}

# Test errors in %, as the papers print them: Sabour et al. 2017, Table 1 and section 7; Hinton et al. 2018,
# Tables 1 and 2, sections 4 and 5; for the others, see the recipes.
PUBLISHED_ERRORS = {
    "sabour2017_mnist_baseline": (0.39, None),
    "sabour2017_mnist_r1_no_reconstruction": (0.34, 0.032),
    "sabour2017_mnist_r1_reconstruction": (0.29, 0.011),
    "sabour2017_mnist_r3_no_reconstruction": (0.35, 0.036),
    "sabour2017_mnist": (0.25, 0.005),
    "sabour2017_svhn": (4.3, None),
    "sabour2017_multimnist_baseline": (8.1, None),
    "sabour2017_multimnist_r1": (7.5, None),
    "sabour2017_multimnist": (5.2, None),
    "sabour2017_affnist": (21, None),
    "sabour2017_affnist_baseline": (34, None),
    "hinton2018_table1_r1": (9.7, None),
    "hinton2018_table1_r2": (2.2, None),
    "hinton2018_smallnorb_310k": (1.8, None),
    "hinton2018_table1_r5": (3.9, None),
    "hinton2018_table1_vector": (2.9, None),
    "hinton2018_table1_no_coordinates": (2.6, None),
    "hinton2018_table1_vector_no_coordinates": (3.2, None),
    "hinton2018_table1_margin": (3.2, None),
    "hinton2018_table1_cross_entropy": (5.8, None),
    "hinton2018_table1_baseline": (5.2, None),
    "hinton2018_table1_mixing": (4.5, None),
    "hinton2018_smallnorb": (2.2, None),
    "hinton2018_mnist": (0.44, None),
    "hinton2018_cifar10": (11.9, None),
    "hinton2018_azimuth": (13.5, None),
    "hinton2018_azimuth_baseline": (20, None),
    "hinton2018_elevation": (12.3, None),
    "hinton2018_elevation_baseline": (17.8, None),
    "hahn2019_cifar10": (8.17, 0.18),
    "hahn2019_cifar10_2layers": (7.86, 0.12),
    "hahn2019_smallnorb_azimuth": (19.86, 1.03),
    "hahn2019_smallnorb_elevation": (15.91, 1.09),
    "tsai2020_cifar10": (5.15, None),
    "gu2020_affnist": (6.79, None),
    "heinsen2019_smallnorb": (0.9, None),
    "ribeiro2020_smallnorb": (1.3, None),
    "zhao2021_cifar10": (7.37, None),
    "zhao2021_smallnorb": (1.57, None),
    "mazzia2021_mnist": (0.26, None),
    "mazzia2021_smallnorb": (2.34, None),
}


@pytest.fixture
def own(tmp_path):
    """Write experiments into a folder of user configs; return the folder."""
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)

    def write(**texts):
        for name, text in texts.items():
            (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
        return str(folder.parent)

    return write


@pytest.fixture
def pair(own):
    """A table of two small networks that differ in their class capsules."""
    large = "defaults: [quickstart]\nmodel: {class_dim: 24}\n"
    return own(large=large, pair="table: [quickstart, large]\n")


def problems(overrides, *, config_dir=None):
    expanded, rows = expand_tables(overrides, config_dir=config_dir)
    with pytest.raises(UserError) as caught:
        check_sweep("train", expanded, rows=rows, config_dir=config_dir)
    return list(caught.value.problems)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_is_a_recipe(name):
    rows = TABLES[name]
    assert len({*rows}) == len(rows) > 1
    assert {*rows} <= EXPERIMENTS.keys() - TABLES.keys()
    assert expand_tables([f"experiment={name}"], config_dir=None) == ([f"experiment={','.join(rows)}"], rows)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - TABLES.keys()))
def test_a_recipe_has_its_published_error_or_none(name):
    # Our own recipes, and recipes with other settings than the published experiment, have none.
    config = to_plain(compose("train", [f"experiment={name}"], config_dir=None))
    assert published(config) == PUBLISHED_ERRORS.get(name)


def test_the_rows_of_a_table_replace_its_name(pair):
    overrides = ["seed=0,1", "experiment=pair", "trainer.max_steps=3"]
    assert expand_tables(overrides, config_dir=pair) == (
        ["seed=0,1", "experiment=quickstart,large", "trainer.max_steps=3"],
        ["quickstart", "large"],
    )


@pytest.mark.parametrize(
    ("override", "expanded"),
    [
        ("+experiment=pair", "+experiment=quickstart,large"),
        ("experiment=hinton2018_mnist,pair", "experiment=hinton2018_mnist,quickstart,large"),
        ("experiment=large,pair", "experiment=large,quickstart"),
        ("experiment=glob(pa*)", "experiment=quickstart,large"),
    ],
)
def test_tables_are_expanded_in_lists_without_duplicates(override, expanded, pair):
    assert expand_tables([override], config_dir=pair)[0] == [expanded]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=quickstart"],
        ["experiment=quickstart,nope"],
        ["experiment=null"],
        ["~experiment"],
        ["seed="],
    ],
)
def test_overrides_without_a_table_stay_the_same(overrides):
    assert expand_tables(overrides, config_dir=None) == (overrides, [])


def test_a_table_is_not_a_run(pair):
    problem = "experiment=pair is a table of 2 recipes: `capsexp train -m` trains them all"
    with pytest.raises(UserError, match=f"^{problem}, experiment=quickstart is the first of them$"):
        compose("train", ["experiment=pair"], config_dir=pair)


def test_errors_in_rows_are_reported_at_once_with_their_rows(own):
    sizes = {"one": 0, "two": -1, "three": 16}
    recipes = {
        name: f"defaults: [quickstart]\nmodel: {{class_dim: {size}}}\n" for name, size in sizes.items()
    }
    folder = own(**recipes, all="table: [three, one, two, four]\n")
    lines = problems(["experiment=all", "seed=0,1", "trainer.max_step=3"], config_dir=folder)
    assert lines[0].startswith("experiment=four: no such option")
    assert lines[1:] == [
        "unknown key 'trainer.max_step': did you mean 'trainer.max_steps'?",
        "experiment=one: model: class_dim must be >= 1, got 0",
        "experiment=two: model: class_dim must be >= 1, got -1",
    ]
    own(all="table: [three, one, two]\n")
    lines = problems(["experiment=all"], config_dir=folder)
    assert lines == [
        "experiment=one: model: class_dim must be >= 1, got 0",
        "experiment=two: model: class_dim must be >= 1, got -1",
    ]


def test_a_row_cannot_be_a_table(pair, own):
    own(nested="table: [pair, quickstart]\n")
    (line,) = problems(["experiment=nested"], config_dir=pair)
    assert line.startswith("experiment=pair is a table of 2 recipes")


@pytest.mark.parametrize("override", ["model.class_dim=8", "model.class_dim=8,16"])
def test_a_setting_in_which_rows_differ_cannot_be_overridden(override, pair):
    (line,) = problems(["experiment=pair", override], config_dir=pair)
    start = f"{override}: the rows of the table differ in model.class_dim, and this would make them equal"
    assert line == f"{start}; the rows with 16 are experiment=quickstart"


def test_a_table_of_several_networks_refuses_another_network():
    (line,) = problems(["experiment=hinton2018_table1", "model=em_routing"])
    start, _, rows = line.partition("; the rows with em_routing_310k are experiment=")
    assert start == "model=em_routing: the rows of the table differ in model, and this would make them equal"
    others = [row for row in TABLES["hinton2018_table1"] if row != "hinton2018_table1_baseline"]
    assert rows.split(",") == others
    check_sweep("train", [f"experiment={rows}", "model=em_routing"], rows=[], config_dir=None)


def test_settings_that_all_rows_share_can_be_overridden(pair):
    overrides = [
        "model.decoder=null",
        "loss.present=0.8",
        "optimizer=sgd",
        "dataset=mnist",
        "trainer.max_steps=3",
    ]
    expanded, rows = expand_tables(["experiment=pair", *overrides], config_dir=pair)
    assert check_sweep("train", expanded, rows=rows, config_dir=pair)


def test_errors_in_all_values_of_a_sweep_are_reported():
    lines = problems(["model.class_dim=16,0,-1"])
    assert lines == [f"model: class_dim must be >= 1, got {size}" for size in (0, -1)]


def test_each_table_has_its_own_folder_with_its_name():
    names = [sweep_name({"experiment": name}, [f"experiment={name}"], ["seed"]) for name in TABLES]
    assert len({*names}) == len(TABLES)
    assert all(folder.startswith(f"{name}-seed-") for name, folder in zip(TABLES, names, strict=True))


# Published errors


def test_a_published_error_is_not_a_setting():
    config = {"seed": 1, "paper": {"error": 0.25, "sd": 0.005}}
    assert published(config) == Published(0.25, 0.005)
    assert comparable(config) == comparable({"seed": 1}) == {"seed": 1}
    assert published({"paper": {"error": 9}}) == Published(9.0, None)
    assert published({"paper": None}) is published({}) is None


@pytest.mark.parametrize(
    "node", [0.25, "0.25", {}, {"error": None}, {"error": 101}, {"error": 1, "sd": -1}, {"error": 1, "n": 3}]
)
def test_an_invalid_published_error_is_refused(node):
    with pytest.raises(
        ValueError, match=r"^paper must be null or \{error: PERCENT, sd: PERCENT or null\}, got "
    ):
        published({"paper": node})


def test_a_recipe_with_an_invalid_published_error_is_reported_before_it_runs(own):
    folder = own(wrong="defaults: [quickstart]\npaper: {eror: 3}\n")
    (line,) = problems(["experiment=wrong,quickstart"], config_dir=folder)
    assert line == "paper must be null or {error: PERCENT, sd: PERCENT or null}, got {'eror': 3}"
