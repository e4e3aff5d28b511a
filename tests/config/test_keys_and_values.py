"""Which keys and values a config may have, and how mistakes in them are reported."""

from typing import Any

import pytest

from capsexp.config.build import build_components
from capsexp.config.signature import fits
from capsexp.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.presnt=1"], "loss.presnt: Margin takes no 'presnt': did you mean 'present'?"),
        (["loss._args_=[1]"], "loss._args_: Margin takes no '_args_'"),
        (["dataset.preprocess.shft=1"], "dataset.preprocess.shft: Preprocess takes no 'shft'"),
        (["model.decoder.widths=[1]"], "model.decoder.widths: Decoder takes no 'widths'"),
        (["routing.iteration=1"], "routing.iteration: DynamicRouting takes no 'iteration'"),
        (["optimizer.beta=1"], "optimizer.beta: Adam takes no 'beta': did you mean 'betas'?"),
        (["~loss.present"], "loss.present: Margin needs a value"),
        (["~trainer.max_epochs"], "trainer.max_epochs: Trainer needs a value"),
        (["~routing.iterations"], "routing: DynamicRouting: missing a required argument: 'iterations'"),
        (["~model.decoder.hidden"], "model.decoder: Decoder: missing a required argument: 'hidden'"),
        (["~optimizer.lr"], "optimizer.lr: must be a number or a schedule, got None"),
        (["~optimizer.lr.every"], "optimizer.lr.every: Exponential needs a value"),
        (
            ["~routing._partial_"],
            "routing._partial_: must be true: the layer adds in_caps, out_caps and pose_dim",
        ),
        (["~optimizer._partial_"], "optimizer._partial_: must be true for this group"),
        (["loss._partial_=true"], "loss._partial_: must be false for this group"),
        (["~loss"], "loss: nothing is chosen; choose with loss=OPTION"),
        (["~dataset"], "dataset: nothing is chosen; choose with dataset=OPTION"),
        (["~model"], "model: nothing is chosen; choose with model=OPTION"),
        (["~loss._target_"], "loss: nothing is chosen; choose with loss=OPTION"),
        (["model.image_shape=[1,8,8]"], "model.image_shape: CapsNet takes no 'image_shape'"),
        (["model.classes=10"], "model.classes: CapsNet takes no 'classes'"),
        (["optimizer.params=[1]"], "optimizer.params: Adam takes no 'params'"),
        (["routing.in_caps=5"], "routing: DynamicRouting: multiple values for argument 'in_caps'"),
        (["model.decoder.classes=5"], "model.decoder: Decoder: multiple values for argument 'classes'"),
        (["~model.routing"], "routing: the chosen model has no routing; leave it out"),
        (["seed=-1"], "seed: must be an integer >= 0, got -1"),
        (["seed=1.5"], "seed: must be an integer >= 0, got 1.5"),
        (["seed=true"], "seed: must be an integer >= 0, got True"),
        (["~seed"], "seed: must be an integer >= 0, got None"),
    ],
)
def test_a_key_that_does_not_fit_is_reported_by_its_name(overrides, message, edited, problems):
    reported = problems(edited(*overrides))
    assert any(line.startswith(message) for line in reported), reported


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("routing.iterations=three", "routing.iterations: must be int, got 'three'"),
        ("routing.iterations=3.0", "routing.iterations: must be int, got 3.0"),
        ("routing.iterations=true", "routing.iterations: must be int, got True"),
        ("routing.iterations=null", "routing.iterations: must be int, got None"),
        ("routing.bias=1", "routing.bias: must be bool, got 1"),
        ("loss.present=high", "loss.present: must be int or float, got 'high'"),
        ("loss.present=false", "loss.present: must be int or float, got False"),
        ("loss.present=[0.9]", "loss.present: must be int or float, got [0.9]"),
        (
            "loss.reconstruction_weight=abc",
            "loss.reconstruction_weight: must be a node with a _target_ or int",
        ),
        (
            "loss.reconstruction_weight=null",
            "loss.reconstruction_weight: must be a node with a _target_ or int",
        ),
        ("trainer.grad_clip=off", "trainer.grad_clip: must be "),
        ("trainer.max_steps=1.5", "trainer.max_steps: must be int or null, got 1.5"),
        ("trainer.precision=half", "trainer.precision: must be 'float32' or 'bfloat16', got 'half'"),
        ("trainer.test=first", "trainer.test: must be 'best' or 'last' or 'none', got 'first'"),
        ("trainer.compile=null", "trainer.compile: must be bool, got None"),
        ("device.name=gpu", "device.name: must be 'auto' or 'cpu' or 'cuda' or 'mps', got 'gpu'"),
        ("model.conv_channels=64.5", "model.conv_channels: must be int, got 64.5"),
        ("model.padding=3", "model.padding: must be 'valid' or 'same', got 3"),
        ("model.padding=wide", "model.padding: must be 'valid' or 'same', got 'wide'"),
        ("model.decoder.hidden=8", "model.decoder.hidden: must be a list of int, got 8"),
        ("model.decoder.hidden=[8,a]", "model.decoder.hidden: must be a list of int, got [8, 'a']"),
        ("model.decoder.hidden=[null]", "model.decoder.hidden: must be a list of int, got [None]"),
        ("model.decoder=8", "model.decoder: must be a node with a _target_ or null, got 8"),
        ("model.routing=dynamic", "model.routing: must be a node with a _target_, got 'dynamic'"),
        ("model.routing=null", "model.routing: must be a node with a _target_, got None"),
        (
            "dataset.preprocess=null",
            "dataset.preprocess: must be a node with a _target_ that is a Preprocess, got None",
        ),
        ("dataset.preprocess.crop=a", "dataset.preprocess.crop: must be int or null, got 'a'"),
        ("optimizer.betas=[a,b]", "optimizer.betas: must be a list of 2 values, each float, got"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list of 2 values, each float, got 0.9"),
        ("optimizer.lr=fast", "optimizer.lr: must be a number or a schedule, got 'fast'"),
        ("optimizer.lr=true", "optimizer.lr: must be a number or a schedule, got True"),
        ("optimizer.lr.start=a", "optimizer.lr.start: must be "),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_by_its_key(override, message, edited, problems):
    reported = problems(edited(override))
    assert any(line.startswith(message) for line in reported), reported


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("routing.iterations=0", "routing: iterations must be >= 1, got 0"),
        ("loss.present=2", "loss: absent and present must be 0 <= absent < present <= 1, got 0.1 and 2"),
        ("loss.reconstruction_weight=.nan", "loss.reconstruction_weight: must be finite, got nan"),
        ("loss.reconstruction_weight=-1", "loss: reconstruction_weight must be >= 0, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr: must be finite, got nan"),
        ("optimizer.lr=-0.1", "optimizer: lr must be >= 0, got -0.1"),
        ("optimizer.lr.start=-0.1", "optimizer.lr: start must be >= minimum"),
        ("optimizer.lr.decay=2", "optimizer.lr: decay must be in (0, 1], got 2"),
        ("optimizer.betas=[2,0.9]", "optimizer: betas must be in [0, 1), got 2"),
        ("device.threads=0", "device: threads must be >= 1, got 0"),
        ("dataset.preprocess.crop=9", "dataset: crop "),
        ("dataset.validation=-1", "dataset: validation "),
    ],
)
def test_a_constructors_error_begins_with_the_key(override, message, edited, problems):
    reported = problems(edited(override))
    assert len(reported) == 1
    assert reported[0].startswith(message), reported


def test_every_problem_is_reported_at_once(edited, problems):
    overrides = ["seed=-1", "loss.present=2", "trainer.max_epochs=0", "dataset.x=1", "optimizer.eps=a"]
    reported = problems(edited(*overrides, "routing.iterations=a", "model.y=1", "device.threads=0"))
    keys = [line.partition(":")[0] for line in reported]
    assert sorted(keys) == sorted(
        ["seed", "loss", "trainer", "dataset.x", "optimizer.eps", "routing.iterations", "model.y", "device"]
    )


def test_a_wrong_key_of_the_routing_is_reported_once_and_not_again_as_the_models(edited, problems):
    assert problems(edited("routing.iterations=a")) == ["routing.iterations: must be int, got 'a'"]


@pytest.mark.parametrize("value", [1, 0.5, "text", None, [1], {"key": 1}], ids=str)
def test_an_argument_without_an_annotation_takes_every_value(value):
    assert fits(value, Any)


def test_a_model_may_have_a_routing_of_its_own(edited, problems):
    settings = edited()
    settings["model"]["routing"] = settings["routing"] | {"iterations": 0}
    assert problems(settings) == ["model.routing: iterations must be >= 1, got 0"]
    own = {"_target_": "capsexp.routing.uniform.UniformRouting", "_partial_": True, "bias": True}
    settings["model"]["routing"] = own
    routing = build_components(settings, plugins=[]).new_model().class_caps.routing
    assert type(routing).__name__ == "UniformRouting"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (key, 0, f"{key} must be >= 1, got 0")
        for key in ("max_epochs", "max_steps", "batch_size", "accumulate")
    ]
    + [(key, 0, f"{key} must be >= 1, got 0") for key in ("validate_every", "log_every", "images_every")]
    + [(key, 0, f"{key} must be >= 1, got 0") for key in ("save_every", "keep_every")]
    + [(key, -1, f"{key} must be >= 1, got -1") for key in ("limit_train_batches", "limit_eval_batches")]
    + [("grad_clip", value, f"grad_clip must be > 0, got {value}") for value in (0, -1.5)]
    + [("ema_decay", value, rf"ema_decay must be in \(0, 1\), got {value}") for value in (0.0, 1.0, 1.5)]
    + [("accumulate", 9999, r"accumulate must be <= batch_size \(\d+\), got 9999")],
)
def test_a_setting_of_the_trainer_out_of_range_is_reported(key, value, message, edited):
    settings = edited()
    settings["trainer"][key] = value
    with pytest.raises(UserError, match=f"^trainer: {message}$"):
        build_components(settings, plugins=[])
