"""`capsexp data` and `capsexp doctor`."""

import re

import torch


def test_doctor_lists_versions_devices_data_and_compiler(capsexp):
    code, out, _ = capsexp("doctor", COLUMNS="250")
    assert code == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert re.search(r"cuda +│ (no +│ device=cuda is refused|.*device=cuda)", out)
    assert re.search(r"data: digits +│ embedded +│ dataset=digits", out)
    assert re.search(r"data: mnist +│ missing +│ capsexp data prepare mnist", out)
    assert re.search(r"│ compiler +│", out)
    assert re.search(r"│ allocator +│", out)


def test_data_list_and_verify(capsexp, tmp_path):
    code, out, _ = capsexp("data", COLUMNS="250")
    assert code == 0
    assert re.search(r"digits +│ embedded", out)
    assert re.search(rf"mnist +│ missing +│ 0 +│ {tmp_path / 'data'}", out)
    assert capsexp("data", "verify", "digits")[:2] == (0, "digits: verified (embedded)\n")
    code, out, _ = capsexp("data", "verify", "digits", "mnist", "data_root=elsewhere", COLUMNS="250")
    assert code == 1
    assert "mnist: elsewhere/MNIST/raw/train-images-idx3-ubyte is missing" in out
