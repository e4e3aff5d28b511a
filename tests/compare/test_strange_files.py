"""A run directory may hold anything: tables show the other runs, with one notice for each damaged file."""

import contextlib
import os
import signal
import socket

import pytest

from capsexp.cli.sweep.folder import Sweep, jobs_table

FILES = ("status.json", "resolved_config.yaml", "env.json", "command.txt", "metrics.jsonl", "figures/a.png")
COMMANDS = (
    ("runs",),
    ("compare", "--show", "train/loss"),
    ("compare", "--csv", "--group-by", "seed"),
    ("compare", "--json"),
    ("compare", "--md"),
    ("report", "-o", "page.html"),
)


@pytest.fixture(autouse=True)
def ends():
    """Opening a pipe or reading a device would never end."""

    def stop(*_):
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def look(capsexp, write_run, tmp_path, monkeypatch):
    """Run the commands; each shows the good run and ends well. Returns the notices of all."""
    monkeypatch.chdir(tmp_path)
    write_run("outputs/good", {"seed": 10_007}, validation=[0.75], test=0.5)

    def call(*commands):
        notices = {}
        for command in commands or COMMANDS:
            code, out, error = capsexp(*command, "outputs", CAPSEXP_OUTPUTS="outputs")
            shown = (tmp_path / "page.html").read_text() if command[0] == "report" else out
            assert code == 0, (command, error)
            assert "good" in shown
            assert "Traceback" not in error
            assert all(line.startswith(("capsexp: ", "curves: ")) for line in error.splitlines())
            assert (out + error).replace("\n", "").isprintable()
            assert shown.replace("\n", "").isprintable()
            notices[command] = error.splitlines()
        return notices

    return call


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def unix_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most a hundred bytes long
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
        opened.bind(path.name)
    os.chdir(before)


def loop(path):
    path.symlink_to(path)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


def endless(path):
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("kind", [pipe, device, folder, unix_socket, loop, sparse, endless])
def test_only_regular_files_of_sane_size_are_read(kind, look, write_run):
    for name in FILES:
        path = write_run(f"outputs/bad-{name.partition('/')[2] or name}", validation=[0.1]) / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        kind(path)
    notices = look()
    assert all(len(lines) <= len(FILES) + 1 for lines in notices.values())
    for name in FILES[:4]:
        assert sum(f"bad-{name}/{name}" in line for line in notices["runs",]) == 1


DEEP = [[[]]]
for _ in range(200):
    DEEP = [DEEP]
WRONG = (
    *(float("nan"), float("inf"), -float("inf"), -1, 1e30, -1e30, 10**400, 1e308, "x", "\x1b[2J", "9" * 5000),
    *(True, [], [1], {}, {"accuracy": "x"}, {"accuracy": [1e308]}, {"x": {"x": None}}, DEEP, "[/x]\udcff"),
)
FIELDS = ("started", "heartbeat", "seconds", "step", "total", "steps_per_epoch", "best", "results", "choices")
MORE = ("status", "host", "pid", "error", "resumes", "stopped")


@pytest.mark.parametrize("field", [*FIELDS, *MORE])
def test_no_value_of_the_status_stops_a_table(field, look, write_run, tmp_path):
    for index, value in enumerate(WRONG):
        write_run(f"outputs/{index}", {"seed": index}, **{field: value})
    for command, lines in look().items():
        assert len(lines) <= len(WRONG) + 1, command  # one notice for each run
    jobs = Sweep(tmp_path / "outputs").jobs()
    assert jobs_table(jobs).row_count == len(jobs) == len(WRONG) + 1


@pytest.mark.parametrize("section", ["best", "results", "choices"])
def test_no_value_below_a_section_of_the_status_stops_a_table(section, look, write_run):
    keys = {"best": "accuracy", "results": "test/accuracy", "choices": "model"}
    for index, value in enumerate(WRONG):
        write_run(f"outputs/{index}", {"seed": index}, **{section: {keys[section]: value, "\x9bkey": value}})
    look()


def nested(depth):
    return "[" * depth + "]" * depth


LAUGHS = "a0: &a0 {x: 1, y: 2, z: 3}\n" + "".join(
    f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}\n" for i in range(1, 9)
)
CONFIGS = {
    "laughs": LAUGHS,
    "laughs in a merge": LAUGHS + "b: {<<: [" + ",".join(["*a8"] * 9) + "]}\n",
    "laughs in a list": "a: &a [x]\n"
    + "".join(
        f"{c}: &{c} [{','.join([f'*{d}'] * 9)}]\n" for c, d in zip("bcdefghij", "abcdefghi", strict=True)
    ),
    "itself": "x: &x {a: *x}\n",
    "itself in a list": "x: &x [*x]\n",
    "itself merged": "x: &x {<<: *x}\n",
    "itself as its key": "? &x [*x]\n: 1\n",
    "deep": "a: " + nested(300),
    "deeper": "a: " + nested(900),
    "deepest": "a: " + nested(100_000),
    "deep in blocks": "\n".join(" " * depth + "a:" for depth in range(400)),
    "not a key": "{[1]: 2}",
    "a date": "a: 2001-01-01\nb: !!timestamp 2001-01-01\n",
    "no date": "b: !!timestamp x\n",
    "no bool": "b: !!bool x\n",
    "no number": "b: !!int x\nc: !!float x\n",
    "a set": "b: !!set {1, 2}\n",
    "pairs": "b: !!omap [a: 1]\n",
    "bytes": "b: !!binary aGFs\n",
    "Python": "b: !!python/object/apply:os.system [id]\n",
    "huge integer": "seed: 0x" + "f" * 9000,
    "long integer": "seed: " + "9" * 9000,
    "numbers beyond all": "seed: .nan\nb: .inf\nc: 1e999\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "empty": "",
    "a list": "- 1",
    "a text": "x",
    "keys of other types": "1: a\nnull: b\ntrue: c\n.nan: d\n",
    "many keys": "\n".join(f"k{number}: {number}" for number in range(3000)),
    "markup": "seed: '[bold]x[/]'\nname: '[/x]'\n",
    "escape sequences": 'seed: "\\e[2J\\x9b31m\\u202e"\n"\\e]0;x\\a": 1\n',
    "formulas": "seed: =cmd()\nname: '@x'\n",
    "HTML": "seed: <script>alert(1)</script>\n",
    "paper": "paper: {error: .nan}\n",
    "another paper": "paper: [1]\n",
    "interpolation": "seed: ${oc.env:HOME}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_stops_a_table(name, look, write_run):
    (write_run("outputs/bad", validation=[0.1]) / "resolved_config.yaml").write_text(CONFIGS[name])
    for command, lines in look(*COMMANDS[1:3]).items():
        assert len(lines) <= 2, command


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xef\xbb\xbf{}",
        b"null",
        b"1" * 9000,
    ],
    ids=range(8),
)
def test_no_content_of_any_file_stops_a_table(content, look, write_run):
    for name in FILES:
        path = write_run(f"outputs/{name.partition('/')[0]}", validation=[0.1]) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    look()


LINES = (
    *(
        '{"step": 1, "train/loss": NaN}',
        '{"step": 2, "train/loss": Infinity}',
        '{"step": 3, "train/loss": 1e308}',
    ),
    *(
        '{"step": 4, "train/loss": -1e308}',
        '{"step": 5, "train/loss": 5e-324}',
        '{"step": 6, "train/loss": "x"}',
    ),
    *('{"step": -7, "train/loss": 1}', '{"step": 1e3, "train/loss": 1}', '{"step": true, "train/loss": 1}'),
    '{"step": 1' + "0" * 400 + ', "train/loss": 1}',
    '{"step": 8, "train/loss": 1' + "0" * 400 + "}",
    '{"step": 9, "train/loss": 9' + "9" * 9000 + "}",
    '{"step": 10, "train/loss": 1, "x": ' + nested(20_000) + "}",
    '{"step": 11, "train/loss": 1, "x": "' + "y" * 100_000 + '"}',
    '{"step": 12, "train/loss": ' + nested(100_000) + "}",
    *(
        '{"train/loss": 1}',
        '["train/loss"]',
        '{"step": {}, "train/loss": []}',
        '{"step": 1, "train/loss": 1',
        "{}",
    ),
)


@pytest.mark.parametrize("index", [*range(len(LINES)), None])
def test_no_line_of_the_metrics_stops_a_table(index, look, write_run):
    lines = LINES if index is None else [LINES[index]]
    for number in range(2):  # a mean over two seeds
        path = write_run(f"outputs/bad{number}", {"seed": number}, validation=[0.5])
        (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    command = ("compare", "--plot", "curves.svg", "--show", "train/loss", "--sort-by", "train/loss")
    look(command, *(COMMANDS[-1:] if index is None else []))


NAMES = (
    *(
        "[bold]x[/bold]",
        "[/x]",
        "[link=file:x]y",
        "a\x1b[2Jb",
        "=cmd()|x",
        "-x",
        "a\nb",
        "a\tb",
        "größe",
        "<b>&",
    ),
    *("x|y", b"\xff".decode(errors="surrogateescape")),
)


def test_names_are_shown_as_typed_in_every_table(look, write_run, capsexp, tmp_path):
    for index, name in enumerate(NAMES):
        write_run(f"outputs/{name}", {"seed": index, "loss.name": name}, choices={"model": name}, error=name)
    look()
    _, listed, _ = capsexp("runs", "outputs")
    _, table, _ = capsexp("compare", "outputs")
    for name in ("[bold]x[/bold]", "[/x]", "[link=file:x]y", r"a\x1b[2Jb", r"a\nb", "größe", r"\udcff"):
        assert listed.count(name) >= 2
        assert table.count(name) >= 2
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    _, csv, _ = capsexp("compare", "outputs", "--csv")
    assert not any(line.startswith(("=", "-", "+", "@")) for line in csv.splitlines())
    assert "'=cmd()|x" in csv


def test_links_in_the_outputs_lead_nowhere_twice(look, tmp_path):
    (tmp_path / "outputs" / "up").symlink_to(tmp_path)
    (tmp_path / "outputs" / "root").symlink_to("/")
    (tmp_path / "outputs" / "loop").symlink_to("loop")
    (tmp_path / "outputs" / "gone").symlink_to("nothing")
    (tmp_path / "outputs" / "good2").symlink_to(tmp_path / "outputs" / "good")
    assert look(("runs",)) == {("runs",): []}
