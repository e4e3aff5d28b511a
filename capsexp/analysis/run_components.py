"""The components of a trained run, with the data that it stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.config.paths import absolute_settings, with_absolute_paths
from capsexp.config.saved import load_saved_config
from capsexp.config.settings import Change, changes
from capsexp.data.dataset import NO_LIST
from capsexp.data.manifest import Manifest, hashed, listing_of
from capsexp.errors import UserError

NO_OTHER_IMAGES = {"preprocess", "download"}
"""Parts of a key under which no setting changes which images are read."""


def run_components(config: dict[str, Any], *, plugins: Sequence[str]) -> Components:
    """Build the components of a trained run.

    The classes and the files of the splits are those that the run stored, also if the folder has changed. If
    the config names other data than the run's, their classes must be the same, and a remark says so.

    Args:
        config: the plain config, with `run`. Its other values may differ from those that the run stored.
        plugins: see `build_components`.

    Raises:
        UserError: every problem, one line each; other data with other classes.
    """
    run = Path(config["run"])
    manifest = Manifest.load(run)
    if manifest is None:
        components = build_components(config, plugins=plugins)
        return components._replace(remarks=(NO_LIST,) if components.dataset.lists_files else ())
    stored = load_saved_config(run)
    differing = list(changes(_data_settings(stored), _data_settings(config)))
    if _is_moved(manifest, config, differing):
        differing = []
    remarks = list(map(_remark, differing))
    is_own = not any(_decides_splits(change.key, config, manifest) for change in differing)
    components = build_components(config, plugins=plugins, manifest=manifest if is_own else None)
    if is_own and _roots(stored) != _roots(config):
        others = list(manifest.differences(components.dataset.manifest(())))
        if others:
            remarks += others
            components = build_components(config, plugins=plugins)
    _require_classes(components, manifest)
    return components._replace(remarks=tuple(remarks))


def _data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide which images are read."""
    settings = absolute_settings({"dataset": config["dataset"]})
    return {key: value for key, value in settings.items() if not NO_OTHER_IMAGES & {*key.split(".")}}


def _remark(change: Change) -> str:
    """Return the line about a setting by which other images are read than those of the run."""
    key, old, new = change
    return f"{key} was {old!r}, is {new!r}: these are not the images of the run's splits"


def _roots(config: Mapping[str, Any]) -> list[Any]:
    """Return where the dataset and its source look for published files."""
    nodes = with_absolute_paths([config["dataset"], config["dataset"].get("source") or {}])
    return [node.get("root") for node in nodes]


def _innermost(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the node of the dataset whose files are read, and its key."""
    key, node = "dataset", config["dataset"]
    while isinstance(node.get("source"), Mapping):
        key, node = f"{key}.source", node["source"]
    return key, node


def _is_moved(manifest: Manifest, config: Mapping[str, Any], differing: Sequence[Change]) -> bool:
    """Whether only the folder is another one, and it holds the run's files, which all are read here."""
    key, node = _innermost(config)
    if [change.key for change in differing] != [f"{key}.path"] or not manifest.files:
        return False
    folder = Path(str(node["path"])).expanduser()
    files = [file for listed in manifest.files.values() for file in listed]
    try:
        same_sizes = all((folder / file.path).stat().st_size == file.size for file in files)
        return same_sizes and all(hashed(folder / file.path)[1] == file.sha256 for file in files)
    except OSError:
        return False


def _decides_splits(key: str, config: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether another value of a setting makes the stored manifest useless for reading."""
    if key.endswith("._target_"):
        return True
    innermost, _ = _innermost(config)
    return len(manifest.files) > 0 and key.rpartition(".")[0] == innermost


def _require_classes(components: Components, manifest: Manifest) -> None:
    dataset = components.dataset
    if tuple(dataset.classes) != manifest.classes:
        raise UserError(
            f"{dataset.folder or dataset.name} has the classes {listing_of(dataset.classes)}; "
            f"this run learned {listing_of(manifest.classes)}"
        )
