"""How Hydra reads the YAML files of a config directory: with a line for the user where a file is wrong."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from capsexp.errors import UserError
from capsexp.files import read_regular

LARGEST_CONFIG = 2**20  # bytes
MOST_NODES = 10_000
"""Of a file whose aliases are replaced by what they stand for."""

RECIPES = "experiment/"
RECIPE_HEADER = "# @package _global_"


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Read YAML as OmegaConf does (1e-3 is a number, a date is a string), but ten times as fast."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers


class FileConfigSource(file_config_source.FileConfigSource):
    """The YAML files of a folder. A byte order mark is skipped.

    It has the name of Hydra's class, because Hydra registers its own again in a cluster's job,
    and refuses another name for the same files.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises:
            UserError: it cannot be read, or is no config; the message names the file and the line in it.
        """
        path = Path(os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path))))
        text = _read(path)
        content, header = _parse(path, text), _header(path, text)
        if config_path.startswith(RECIPES):
            _check_recipe(path, content, header["package"])
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{self.path}",
            config=OmegaConf.create(content),
            header=header,
        )


def register() -> None:
    """Let Hydra read all YAML files through `FileConfigSource` of this module."""
    Plugins.instance()  # registers Hydra's own sources first
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def _read(path: Path) -> str:
    try:
        content = read_regular(path, limit=LARGEST_CONFIG)
    except OSError as error:
        reason = "a config has at most 1 MiB" if error.errno == errno.EFBIG else error.strerror
        raise UserError(f"{path} cannot be read: {reason}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"is not UTF-8 (byte {content[error.start]:#x}); save the file as UTF-8"
        raise UserError(f"{path}, line {line}: {problem}") from None


def _header(path: Path, text: str) -> dict[str, str | None]:
    """Return Hydra's header, the comments `# @package …` at the start."""
    try:
        header: dict[str, str | None] = ConfigSource._get_header_dict(text[:512])
    except ValueError as error:
        raise UserError(f"{path}, line 1: {error}") from None
    if unknown := header.keys() - {"package"}:
        raise UserError(f"{path}, line 1: unknown header @{min(unknown)}; the only one is @package")
    return header


def _check_recipe(path: Path, content: dict[str, Any], package: str | None) -> None:
    if package != "_global_":
        raise UserError(f"{path}, line 1: a recipe begins with the line {RECIPE_HEADER!r}")
    if dotted := [key for key in content if "." in key]:
        first, _, rest = dotted[0].partition(".")
        raise UserError(f"{path}: write {first}: and below it, indented, {rest}: instead of {dotted[0]}:")


def _parse(path: Path, text: str) -> dict[str, Any]:
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ValueError("holds no settings")
        _check_nodes(node)
        content = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}, line {line}: {_reason(error, text, mark)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single value"
        line = node.start_mark.line + 1
        raise UserError(f"{path}, line {line}: must hold settings, KEY: VALUE, got {kind}")
    return content


def _reason(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    """Return what is wrong, in one line."""
    reason = " ".join(filter(None, (error.context, error.problem)))
    lines = text.splitlines()
    if mark is not None and mark.line < len(lines) and re.match(r" *\t", lines[mark.line]):
        reason += "; indent with spaces, not with a tab"
    return reason


def _check_nodes(root: yaml.Node) -> None:
    """Check what the YAML library lets pass: aliases to themselves, bombs, and keys.

    Raises:
        yaml.MarkedYAMLError: with the place of the mistake.
    """
    count = 0

    def visit(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
        nonlocal count
        count += 1
        if count > MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_NODES} values", problem_mark=root.start_mark)
        if node in above:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            _check_interpolation(node)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [value for _, value in node.value]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        for child in children:
            visit(child, (*above, node))

    visit(root, ())


def _check_interpolation(node: yaml.ScalarNode) -> None:
    try:
        parse(node.value)
    except GrammarParseError as error:
        raise yaml.MarkedYAMLError(problem=str(error).splitlines()[0], problem_mark=node.start_mark) from None


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(part, yaml.MappingNode) for part in parts):
                raise yaml.MarkedYAMLError(problem="<< needs a group of keys", problem_mark=key.start_mark)
        elif key.tag != "tag:yaml.org,2002:str":
            text = key.value if isinstance(key, yaml.ScalarNode) else "a list or a group of keys"
            problem = f"a key must be a word, got {text}; in quotes a number or true is a word"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        elif key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
        seen.add(str(key.value))
