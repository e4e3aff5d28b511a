import re

import pytest
import torch

from capsexp.training.memory import OutOfMemoryError, explain_out_of_memory, peak_resident


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**58),
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")),
    ],
)
def test_an_out_of_memory_error_names_the_settings_to_change(allocate):
    message = r"^out of memory at trainer\.batch_size=64, with a peak of [\d,]+ MiB: lower it, or split "
    with pytest.raises(OutOfMemoryError, match=message) as caught, explain_out_of_memory(batch_size=64):
        allocate()
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_other_errors_are_unchanged():
    with pytest.raises(RuntimeError, match=re.escape("mat1 and mat2")), explain_out_of_memory(batch_size=1):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_the_peak_is_in_bytes():
    assert 2**25 < peak_resident() < 2**40
