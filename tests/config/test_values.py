"""Values that no run can mean: all of them are refused, at once, whatever the setting."""

import copy
import functools
import math
import random

import pytest

from capsexp.config.build import build_checked, build_components
from capsexp.config.compose import compose, option_names, to_plain
from capsexp.config.hydra_settings import hydra_problems
from capsexp.config.settings import with_setting
from capsexp.config.values import leaf_problems, path_problems, root_problems
from capsexp.data.split import validation_size
from capsexp.errors import UserError, collecting, refuse, require_positive, stop_if_refused

BAD = (math.nan, math.inf, -math.inf, -1, 0, 1e30, 10**30, "abc", "", [], {}, True, None)
# The settings, by the last word of their key, that can mean one of these values. NaN, infinities, 1e30,
# 10^30, "" and {} are in no list.
MEANT = {
    "-1": {"init_identity", "beta_a", "beta_u"},
    "0": {
        *("seed", "split_seed", "placement_seed", "affine_seed", "pair_seed", "test_seed", "validation"),
        *("shift", "pad", "brightness", "rotation", "shear", "absent", "down_weight", "weight_decay"),
        *("reconstruction_weight", "decode", "dropout", "init_identity", "init_noise", "beta_a", "beta_u"),
        *("mean_smoothing", "variance_floor", "decay", "minimum", "end", "start", "correct", "wrong"),
        *("momentum", "weights"),
    },
    "'abc'": {"run", "output_root", "data_root", "root", "layer", "source", "dataset"},
    "[]": {"plugins", "others", "published", "targeted", "shifts", "rotations"},
    "True": {
        *("download", "flip", "deterministic", "mean_over_classes", "shared_transformations", "nesterov"),
        *("bias", "leaky", "detach", "compile", "overfit", "profile", "clip", "_partial_"),
    },
    "None": {
        *("run", "paper", "resize", "crop", "contrast", "standardise", "validation_instance", "viewpoint"),
        *("threads", "coordinates", "decoder", "votes_mib", "cost_norm", "classes", "layer", "source"),
        *("max_steps", "grad_clip", "ema_decay", "limit_train_batches", "limit_eval_batches"),
        *("stop_accuracy", "keep_every"),
    },
}
NETWORKS = ("cnn_sabour", "dynamic_routing_small", "em_routing")


@functools.cache
def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def options():
    """Every option of every group, as the overrides that choose it."""
    no_files = [name for name in option_names("dataset") if name != "image_folder"]
    choices = [("dataset=mnist", f"model={name}") for name in NETWORKS]
    for group in ("loss", "optimizer", "routing"):
        choices += [(f"{group}={name}",) for name in option_names(group)]
    return choices + [(f"dataset={name}", "model=cnn_hinton", "loss=margin") for name in no_files]


def check(config):
    """Check a whole config as a command does."""
    if problems := [line for line in root_problems(config) if not line.startswith("seed:")]:
        raise UserError(*problems)
    build_components(config, plugins=[])


def accepted_values(number, *, seed):
    """Try values in settings of options, all drawn at random; return the pairs that are accepted wrongly."""
    draw = random.Random(seed)
    wrong = []
    for overrides in draw.sample(options(), number):
        config = composed(*overrides)
        keys = [key for key in leaves(config) if not key.startswith("model.routing.")]
        for key, value in draw.sample([(key, value) for key in keys for value in BAD], 12):
            try:
                check(with_setting(config, key, copy.deepcopy(value)))
            except UserError:
                continue
            if key.rpartition(".")[2] not in MEANT.get(repr(value), ()):
                wrong.append((key, value))
    return wrong


def test_no_setting_takes_a_value_that_it_cannot_mean():
    assert accepted_values(5, seed=0) == []


def test_no_setting_of_a_study_takes_a_value_that_it_cannot_mean():
    for name in random.Random(0).sample(option_names("study"), 3):
        node = to_plain(compose("train", [f"+study={name}"], config_dir=None))["study"]
        pairs = [(key, value) for key in leaves({"study": node}) for value in BAD]
        for key, value in random.Random(0).sample(pairs, min(20, len(pairs))):
            changed = with_setting({"study": node}, key, copy.deepcopy(value))["study"]
            try:
                build_checked(changed, at="study", plugins=[])
            except UserError:
                continue
            assert key.rpartition(".")[2] in MEANT.get(repr(value), ()), (key, value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.grad_clip=.nan", "trainer.grad_clip: must be finite, got nan"),
        ("trainer.batch_size={a: 1}", "trainer.batch_size: must be int, got {'a': 1}"),
        ("optimizer.eps=.inf", "optimizer.eps: must be finite, got inf"),
        ("optimizer.eps=0", "optimizer: eps must be > 0, got 0"),
        ("optimizer.lr=0", "optimizer: lr must be > 0, got 0"),
        ("optimizer.lr={start: 1}", "optimizer.lr: must be a number or a schedule, got {'start': 1}"),
        ("optimizer.betas=[0.9]", "optimizer.betas: must be a list of 2 values, each float, got [0.9]"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer: betas must be in [0, 1), got 1.0 (each of [0.9, 1.0])"),
        ("optimizer.capturable=true", "optimizer: a step fails: "),
        ("model.primary_scale=.nan", "model.primary_scale: must be finite, got nan"),
        ("model.primary_scale=-1", "model: primary_scale must be > 0, got -1"),
        ("model.conv_kernel=99", "model: conv_kernel must be < twice the image's 8x8, got 99"),
        ("model.class_dim=100000000000000000", "model: "),
        ("model.decoder={a: 1}", "model.decoder: must be a node with a _target_ or null, got {'a': 1}"),
        ("routing.iterations=1000000000000", "routing: iterations must be <= 1000, got 1000000000000"),
        ("routing._partial_=1", "routing._partial_: must be "),
        ("dataset.validation=5000", "dataset: validation must leave an image to train on, got 5000 of 1438"),
        ("dataset.validation=0.9999", "dataset: validation must leave an image to train on, got 0.9999 of"),
        ("dataset.split_seed=-1", "dataset: split_seed must be an integer from 0 to 2^63 - 1, got -1"),
        (
            "dataset.preprocess={_target_: torch.nn.ReLU}",
            "dataset.preprocess: must be a node with a _target_",
        ),
        ("loss._target_=torch.nn.Identity", "loss: Identity is no loss: it has no scheduled"),
        (
            "seed=18446744073709551616",
            "seed: must be an integer of at most 64 bits, got 18446744073709551616",
        ),
        ("device.threads=100000000", "device: threads must be <= 1024, got 100000000"),
    ],
)
def test_a_value_that_no_run_can_mean_is_one_line(override, line, edited, problems):
    reported = problems(edited(override))
    assert len(reported) == 1
    assert reported[0].startswith(line), reported


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [("sgd", {"momentum": 5}), ("sgd", {"momentum": math.nan}), ("adam", {"weight_decay": -1})],
)
def test_an_optimizer_with_which_no_network_can_learn_is_refused(optimizer, setting):
    config = composed(f"optimizer={optimizer}")
    with pytest.raises(UserError, match="optimizer"):
        build_components({**config, "optimizer": config["optimizer"] | setting}, plugins=[])


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("loss.margin.end", 5, r"loss: margin must be in \(0, 1\], got .* at step \d+ of \d+"),
        ("loss.margin.start", 0, r"loss: margin must be in \(0, 1\], got 0 at step 0 of \d+"),
        ("routing.inverse_temperature", -1, "routing: inverse_temperature must be >= 0, got -1"),
        ("routing.inverse_temperature", 0, "routing: inverse_temperature must be > 0, got 0"),
        ("routing.inverse_temperature_ramp", 0, "routing: inverse_temperature_ramp must be > 0, got 0"),
        (
            "loss.reconstruction_weight",
            {"_target_": "torch.nn.ReLU"},
            "loss: reconstruction_weight must be a",
        ),
        ("optimizer.lr.start", 0.0, "optimizer.lr: start must be >= minimum"),
    ],
)
def test_a_schedule_is_checked_over_a_whole_run(key, value, line):
    with pytest.raises(UserError, match=line) as caught:
        build_components(with_setting(composed("model=em_routing"), key, value), plugins=[])
    assert len(caught.value.problems) == 1


def test_every_wrong_argument_of_a_constructor_is_reported(edited, problems):
    changes = ("trainer.max_epochs=0", "trainer.grad_clip=-1", "trainer.ema_decay=2", "model.class_dim=0")
    lines = problems(edited(*changes, "model.primary_scale=0"))
    words = ["max_epochs", "grad_clip", "ema_decay", "class_dim", "primary_scale"]
    assert all(any(f" {word} must" in line for line in lines) for word in words), lines


def test_collecting_goes_on_after_a_refusal_and_ignores_what_follows_from_it():
    with collecting() as lines:
        require_positive(a=0, b=-1)
        refuse("c is wrong")
        stop_if_refused()
    assert lines == ["a must be > 0, got 0", "b must be > 0, got -1", "c is wrong"]
    with collecting() as lines:
        refuse("a is wrong")
        [][0]
    assert lines == ["a is wrong"]
    with pytest.raises(IndexError), collecting():
        [][0]
    with pytest.raises(ValueError, match="a must be > 0, got 0"):
        require_positive(a=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("run", value)
            for value in ("", " ", 5, True, ["a"], "a\nb", "a\0b", "\udcff", "x" * 256, "a/" * 3000)
        ),
        *(("output_root", value) for value in (5, None, "", ["a"])),
        ("data_root", 5),
        ("run", "~there_is_no_such_user/x"),
        *(("plugins", value) for value in ("os", ["os"], [""], [5], ["a b"], ["there_is_no_such_package"])),
        *(("limit", value) for value in ("abc", 1.5, 0, -1, True, math.nan)),
        *(("weights", value) for value in ("bst", 1.5, -1, True, None, [])),
        *(("top", value) for value in (0, None, "a", 1.0)),
        ("reconstructions", 1),
        *(("seed", value) for value in (-1, 2**63, 1.0, None, True)),
        *(("resume", value) for value in ("yes", None, 5)),
        *(("paper", value) for value in (5, {"error": math.nan}, {"error": -1}, [])),
    ],
)
def test_a_setting_of_no_component_is_checked(key, value):
    (line,) = root_problems({key: value})
    assert line.startswith((f"{key}: ", f"{key} must"))
    assert "\n" not in line
    assert len(line) < 400


def test_settings_that_a_run_can_mean_are_left_alone():
    good = {"run": "a b/ü", "output_root": "outputs", "plugins": ["yaml"], "limit": None, "top": 3, "seed": 0}
    assert list(root_problems(good | {"weights": 0, "resume": "auto", "paper": None})) == []
    assert list(path_problems("a/" * 1000, "run")) == []
    assert list(leaf_problems({"a": [1, 2.5, "b", None, True]}, "at")) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("hydra.verbose=foo", "hydra.verbose: must be true, false or names of packages"),
        ("+hydra.foo=1", "hydra.foo: Hydra has no such setting"),
        ("+hydra.run.foo=1", "hydra.run.foo: Hydra has no such setting"),
        ("hydra.run.dir=", "hydra.run.dir: must not be empty"),
        ("hydra.launcher=5", "hydra.launcher: must be a node"),
    ],
)
def test_hydras_own_settings_are_checked(override, line):
    (reported,) = hydra_problems(compose("train", [override], config_dir=None))
    assert reported.startswith(line)
    assert list(hydra_problems(compose("train", ["hydra.verbose=true"], config_dir=None))) == []


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10", "svhn"])
def test_the_validation_images_are_counted_before_a_file_is_read(name):
    node = composed(f"dataset={name}", "model=cnn_hinton")["dataset"]
    size = build_checked(node, at="dataset", plugins=[]).training_size
    for count, fits in ((size - 1, True), (size, False), (0.999999, False)):
        if fits:
            assert build_checked(node | {"validation": count}, at="dataset", plugins=[]).validation == count
        else:
            with pytest.raises(
                UserError, match=f"dataset: validation must leave an image to train on, got {count}"
            ):
                build_checked(node | {"validation": count}, at="dataset", plugins=[])


def test_digits_has_the_size_that_it_names():
    dataset = build_checked(composed("dataset=digits")["dataset"], at="dataset", plugins=[])
    assert dataset.read("train").size == dataset.training_size
    assert validation_size(0.1, dataset.training_size) == dataset.read_training()[1].size
