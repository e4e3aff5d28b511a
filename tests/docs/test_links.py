"""Every relative link and image of the documentation leads somewhere, without MkDocs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\)|\\.)*\]\(([^)\s]+)\)")
ELSEWHERE = ("https://", "http://", "mailto:")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """The lines of a page outside code blocks; code spans are emptied."""
    lines, fenced = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(re.sub(r"`[^`]*`", "`", line))
    return lines


def headings(path):
    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.fullmatch(r"#+ (.*)", line)):
            yield heading[1]


def anchors(path):
    """Anchors that GitHub and MkDocs give alike, and those of documented Python names."""
    found = set()
    for text in headings(path):
        bare = re.sub(r"[^\w\s-]", "", text.replace("`", "")).strip().lower()
        github, mkdocs = re.sub(r"\s", "-", bare), re.sub(r"[-\s]+", "-", bare)
        found |= {github} if github == mkdocs else set()
    return found | {line.removeprefix("::: ") for line in prose(path) if line.startswith("::: ")}


def broken(path, target):
    file, _, anchor = target.partition("#")
    there = path if not file else (path.parent / file).resolve()
    if not there.exists():
        return f"{target}: there is no {file}"
    if anchor and anchor not in anchors(there):
        return f"{target}: {name_of(there)} has no heading for #{anchor}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_and_anchors_lead_somewhere(path):
    targets = [target for line in prose(path) for target in LINK.findall(line)]
    problems = [broken(path, target) for target in targets if not target.startswith(ELSEWHERE)]
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent != ROOT], ids=name_of)
def test_pages_of_the_site_link_to_pages_of_the_site_alone(path):
    targets = [target for line in prose(path) for target in LINK.findall(line)]
    inside = [target for target in targets if not target.startswith(("#", *ELSEWHERE))]
    for target in inside:
        assert (path.parent / target.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), target


def test_every_image_is_shown():
    shown = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    unused = [image.name for image in (ROOT / "docs" / "images").iterdir() if image.name not in shown]
    assert unused == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
