import subprocess
import sys

import pytest

from capsexp.config.settings import NOT_COMPARED, comparable, differences, fingerprint, without


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
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": hash_seed},
    )
    assert told.stdout.strip() == fingerprint({"a": 1, "b": "x"})


def test_other_settings_have_another_fingerprint():
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
