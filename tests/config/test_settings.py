import os
import subprocess
import sys

import pytest

from capsexp.config.settings import (
    NOT_COMPARED,
    comparable,
    differences,
    fingerprint,
    flat,
    with_setting,
    without,
    without_routing_copy,
)


def test_settings_have_dotted_keys_and_leave_out_what_changes_no_result():
    config = dict.fromkeys(NOT_COMPARED, "x") | {"seed": 1, "model": {"sizes": [1, 2], "decoder": None}}
    config["dataset"] = {"root": "/data", "name": "digits", "source": {"root": "/data", "validation": 5}}
    assert comparable(config) == {
        "seed": 1,
        "model.sizes": [1, 2],
        "model.decoder": None,
        "dataset.name": "digits",
        "dataset.source.validation": 5,
    }


def test_differences_name_every_key():
    lines = list(differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}))
    assert lines == ["b: was 2, is 3", "c: was None, is 4"]


def test_without_leaves_the_rest():
    assert without({"seed": 1, "a": 2}, "seed", "unknown") == {"a": 2}


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_fingerprints_are_the_same_in_every_process(hash_seed):
    code = "from capsexp.config.settings import fingerprint; print(fingerprint({'a': 1, 'b': 'x'}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    assert done.stdout.strip() == fingerprint({"a": 1, "b": "x"})


def test_other_settings_have_another_fingerprint():
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def with_copy(**routing):
    return {"seed": 1, "routing": routing, "model": {"width": 2, "routing": dict(routing)}}


def test_flat_settings_leave_out_the_models_copy_of_the_routing():
    config = with_copy(iterations=3)
    assert flat(config) == {"seed": 1, "routing.iterations": 3, "model.width": 2}
    assert without_routing_copy(config)["model"] == {"width": 2}
    assert comparable(config) == {**flat(config), "model.routing.iterations": 3}


def test_a_routing_of_the_models_own_is_no_copy():
    config = with_copy(iterations=3)
    config["model"]["routing"]["iterations"] = 5
    assert flat(config) == comparable(config)
    for other in ({"seed": 1}, {"model": {"width": 2}}, {"routing": {"iterations": 3}, "model": None}):
        assert without_routing_copy(other) == other


def test_a_new_value_of_the_routing_reaches_the_models_copy():
    config = with_copy(iterations=3, bias=False)
    assert with_setting(config, "routing.iterations", 5) == with_copy(iterations=5, bias=False)
    assert with_setting(config, "model.width", 3)["model"] == {**config["model"], "width": 3}
    assert with_setting({"seed": 1}, "a.b", 2) == {"seed": 1, "a": {"b": 2}}
    assert config == with_copy(iterations=3, bias=False)
