import pytest

from capsexp.config.overrides import parse


@pytest.mark.parametrize("place", range(3))
def test_options_may_stand_anywhere_among_overrides(place):
    arguments = ["a=1,2", "b=3"]
    arguments[place:place] = ["-m", "-cn", "own"]
    options, flags, overrides = parse(arguments)
    assert (options.multirun, options.config_name) == (True, "own")
    assert (flags, overrides) == (["-m", "-cn", "own"], ["a=1,2", "b=3"])
