"""Every figure of README and docs is in benchmarks/figures.json, and every entry there is still in
its document; the command compares, reports and updates."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint, estimation, inference, loader, train_step
from benchmarks.reproduce import FIGURES, MARK, Options, _layout, holds, load, main, read_values
from conftest import ROOT
from pipeline.cli import RunError, UserError

DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
UNIT = (
    r"(?:dB|[mµu]?s|min|minutes?|seconds?|hours?|%|[KMG]i?B|kB|GB/s|MPix(?:/s)?|GMAC/s|megapixels"
    r"|CPU seconds|images/s|(?:images|crops|megapixels|crops) a \w+|times)(?![\w/])"
)
ONE = r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?"
JOINED = rf"(?:(?:,|,? to|,? and|,? or| /|,? against) {ONE})*"
# A number with a decimal point, a number before a unit, also as the first of several, and a time.
# Versions (2.4.0), shares of names (x1.5) and fractions (1/2) are no figures.
FIGURE = re.compile(
    rf"(?<![\w.,/])(?<!\w-){ONE}(?={JOINED}[ -]?{UNIT})"
    r"|(?<![\w.,/])(?<!\w-)[+-]?\d+(?:,\d{3})*\.\d+(?![\w]|\.\d)"
    r"|(?<![\w.:])\d+:\d\d(?![\w:])"
)
# A cell of a table, but for its first column, that holds only numbers and units holds figures.
CELL = re.compile(rf"[\s*(]*{ONE}(?:[\s*(),/]|to|{ONE}|{UNIT})*")


def blanked(match: re.Match[str]) -> str:
    return re.sub(r"\S", " ", match[0])


def figures_in(text: str) -> Iterator[re.Match[str]]:
    """The numbers of a document that are figures by their looks, with their places. Commands,
    inline code, comments and addresses are left out."""
    text = re.sub(r"^```\w+\n.*?^```", blanked, text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)", blanked, text, flags=re.DOTALL)
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", blanked, text)
    found = {match.start(): match for match in FIGURE.finditer(text)}
    for row in re.finditer(r"^\|(.*)\|$", text, re.MULTILINE):
        for cell in [*re.finditer(r"[^|]+", row[1])][1:]:
            if CELL.fullmatch(cell[0].rstrip() + " "):
                start = row.start(1) + cell.start()
                for match in re.compile(ONE).finditer(text, start, start + len(cell[0])):
                    found.setdefault(match.start(), match)
    yield from (found[start] for start in sorted(found))


def places(quote: str, text: str) -> list[re.Match[str]]:
    """Where a document says what an entry quotes; the groups are the numbers in braces."""
    parts = MARK.split(quote)  # text, number, text, number, ..., text
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in parts]
    pattern = "".join(f"({part})" if index % 2 else part for index, part in enumerate(parts))
    return list(re.finditer(rf"(?<![\d.]){pattern}(?![\d]|\.\d)", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_of_the_documents_is_recorded(document: str) -> None:
    text, figures = (ROOT / document).read_text(), load()
    known = [
        match.span(group)
        for command in figures.commands.values()
        for figure in command.figures.values()
        if figure.document == document
        for quote in figure.text
        for match in places(quote, text)
        for group in range(1, match.re.groups + 1)
    ]
    known += [
        match.span()
        for exclusion in figures.not_figures
        if fnmatch(document, exclusion.document)
        for match in re.finditer(exclusion.text, text)
    ]
    missing = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} in "
        f"{' '.join(text[max(match.start() - 30, 0) : match.end() + 30].split())!r}"
        for match in figures_in(text)
        if not any(start <= match.start() and match.end() <= end for start, end in known)
    ]
    assert not missing, "\n".join(
        [f"{document}: put these into benchmarks/figures.json, as a figure or not:", *missing]
    )


def test_every_entry_is_still_in_its_document() -> None:
    texts = {name: (ROOT / name).read_text() for name in DOCUMENTS}
    gone = [
        f"{name}: {quote!r} is not in {figure.document}"
        for command in load().commands.values()
        for name, figure in command.figures.items()
        for quote in figure.text
        if figure.document not in texts or not places(quote, texts[figure.document])
    ]
    assert not gone, "\n".join(["adapt benchmarks/figures.json to the documents:", *gone])


def test_every_command_can_be_run_and_read() -> None:
    figures = load()
    assert FIGURES.read_text() == _layout(json.loads(FIGURES.read_text())) + "\n"
    names = [
        *figures.commands,
        *(name for one in figures.commands.values() for name in one.figures),
    ]
    assert len({*names}) == len(names), "a name stands for one thing"
    used = {name for command in figures.commands.values() for name in command.placeholders()}
    assert used == figures.placeholders.keys()
    for title, command in figures.commands.items():
        assert date.fromisoformat(command.date) <= date.today(), title
        assert (command.run is None) == bool(command.why), title
        assert command.seconds > 0 or command.run is None, title
        text = "\n".join(command.run or [])
        for script in re.findall(r"(?:python |\./)((?:\w+/)*\w+\.(?:py|sh))\b", text):
            assert (ROOT / script).is_file(), f"{title}: {script}"
        for name, figure in command.figures.items():
            wanted = len(figure.documented) if command.run else 0
            assert sum(map(count_values, figure.read)) == wanted, name
            assert len(figure.measured) == len(figure.documented) > 0, name
            for said, tolerance in zip(figure.documented, figure.tolerances, strict=True):
                assert holds(said, float("nan"), tolerance) is False, name


def count_values(reader: Any) -> int:
    """How many numbers a reader gives, when it finds them."""
    if isinstance(reader, list):
        operands = reader[1:]
        assert len(operands) == (1 if reader[0] in ("min", "max") else 2)
        assert all(count_values(operand) == 1 for operand in operands)
        return 1
    return re.compile(reader).groups if isinstance(reader, str) and "#" not in reader else 1


def printed_by_benchmarks() -> dict[str, str]:
    """What the benchmarks print of made-up measurements: command -> output."""

    def costs(names: Iterable[str]) -> dict[str, list[loader.Cost]]:
        return {name: [loader.Cost(2.0, 3.0, 4000)] for name in names}

    def table(ways: dict[str, list[loader.Cost]], base: str, ratios: bool = False) -> str:
        with redirect_stdout(io.StringIO()) as stream:
            loader.print_table(ways, base)
            if ratios:
                loader.print_ratios(ways)
        return stream.getvalue()

    realesrgan = [name for name in loader.WAYS if "realesrgan" in name or "gaussian" in name]
    rows = [inference.Row(name, 9.0, 8.0, 10.0, 0.5, 1.5, 40.0) for name in inference.WAYS]
    saves = checkpoint.IN_STEP, checkpoint.IN_BACKGROUND, checkpoint.PLAIN
    step = {
        **dict.fromkeys(("step", "macs", "macs_per_second", "bytes", "bytes_per_second"), 1.0),
        "layout": "NCHW",
        "kernel": "native",
        "images": 8,
        "memory": 1e9,
        "first_step": 9.0,
        "device": "cpu",
        "calls": 1,
        "parts": dict.fromkeys(train_step.PARTS, 0.1),
    }
    bare = {"plain": 0.6, "contiguous": 1.02}
    cases = {
        train_step.Case("vapsr_x4", "eager", "fp32", "auto", 8): bare,
        train_step.Case("msrresnet_x4", "eager", "fp32", "auto", 8): {"contiguous": 1.0},
    }
    return {
        "loader": table(costs(loader.WAYS), loader.DALI_PNG, ratios=True),
        "loader-realesrgan": table(costs(realesrgan), realesrgan[-1]),
        "loader-16-bits": depths_printed(),
        "loader-operators": table(costs(loader.OPERATORS), loader.OURS),
        "inference-1": inference._table("title", rows),
        "inference-2": inference._table("title", rows),
        "inference-fp16": inference._table("title", rows),
        "checkpoint": "a checkpoint of 335 MB; torch\n"
        + checkpoint._table([checkpoint.Row(name, [0.7], [0.6], [0.8]) for name in saves]),
        "estimation": "\n".join(
            str(estimation.Row(case.label, case.true, [case.true]))
            for cases_of in estimation.CASES.values()
            for case in cases_of()
        ),
        "train-step": train_step.report(
            {case: {**step, "ours_in_parts_of_bare": ratios} for case, ratios in cases.items()}
        ),
    }


def depths_printed() -> str:
    with redirect_stdout(io.StringIO()) as stream:
        loader.print_depths({name: [loader.Cost(1.0, 1.0, 9)] for name in loader.DEPTHS})
    return stream.getvalue()


def test_readers_find_what_the_benchmarks_print(tmp_path: Path) -> None:
    commands = load().commands
    for name, output in printed_by_benchmarks().items():
        for figure in commands[name].figures.values():
            for reader in figure.read:
                assert read_values(reader, output, tmp_path)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("PSNR-Y 32.380 dB, 32.402 (float), 1.84 times as fast", ["32.380", "32.402", "1.84"]),
        ("It took 10 to 15 min, 2:03 at best, and 92 % of it", ["10", "15", "2:03", "92"]),
        ("-1.1 dB, 1,802 images/s, 80 crops a core-second", ["-1.1", "1,802", "80"]),
        ("torch 2.13.0, 512x512, ZeRO 0, 1 and 2, 1/2 of x4, batch 16, SHA-256, 1e-5", []),
        ("`--limit 0.5` and <!-- 0.5 dB --> [here](a-0.5.md)\n```bash\nx=0.5\n```", []),
        ("| VapSR 4 | 181 | 68 to 80 | **5 dB** (3) | x4 | - |", ["181", "68", "80", "5", "3"]),
    ],
)
def test_what_looks_like_a_figure(text: str, numbers: list[str]) -> None:
    assert [match[0] for match in figures_in(text)] == numbers


@pytest.mark.parametrize(
    ("documented", "tolerance", "good", "bad"),
    [
        ("32.38", "0.002", [32.378, 32.382], [32.377, 32.383]),
        ("1,802", "x2", [901, 3604], [900, 3605]),
        ("2:03", "x1.5", [82, 184], [81, 185]),
        ("-0.1 to +0.2", "0.1", [-0.2, 0.3], [-0.21, 0.31]),
        ("10 to 15", "x2", [5, 30], [4.9, 30.1]),
        ("1", "at most", [-5, 1], [1.01]),
        ("12", "at least", [12, 99], [11.9]),
        ("343,076", "0", [343076], [343075]),
    ],
)
def test_how_far_a_figure_may_be_off(
    documented: str, tolerance: str, good: list[float], bad: list[float]
) -> None:
    assert all(holds(documented, value, tolerance) for value in good)
    assert not any(holds(documented, value, tolerance) for value in bad)


def test_values_are_read_from_output_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"psnr": 30.5}]}')
    output = "first 1,802 2:03\nfirst 7 8\nsecond 4\n"

    def read(reader: Any) -> list[float]:
        return read_values(reader, output, tmp_path)

    assert read(r"^first ([\d,]+) ([\d:]+)$") == [1802, 123]
    assert read("a.json#rows/0/psnr") == [30.5]
    assert read(["-", ["/", r"^second (\d+)", 2], "a.json#rows/0/psnr"]) == [-28.5]
    assert read(["min", r"^first ([\d,]+)"]) == [7]
    assert read(["max", r"^first ([\d,]+)"]) == [1802]
    for missing in (r"^third (\d+)", ["min", r"^third (\d+)"], "a.json#rows/1/psnr", "b.json#rows"):
        with pytest.raises(RunError):
            read(missing)


def figures_file(folder: Path) -> Path:
    """Commands that hold, do not hold, fail, print too little, take long, and cannot run."""

    def command(lines: list[str] | None, **more: Any) -> dict[str, Any]:
        figure = {"document": "README.md", "text": ["{2.5} dB"], "read": [r"([\d.]+) dB"]}
        figure |= {"tolerance": ["0.1"], "measured": [1]}
        about = {"seconds": 1, "machine": "an old one", "date": "2026-01-01"}
        return {"run": lines, **about, **more, "figures": {}} | {"figures": {"": figure}}

    commands = {
        "good": command(['test "$VASTSCALE_CPU" = 1', "cat {photos} > {out}/x; cat {out}/x"]),
        "off": command(["echo 2.7 dB"]),
        "failing": command(["echo 2.5 dB", "false", "echo never"]),
        "silent": command(["echo 2.5 s"]),
        "long": command(["echo 2.5 dB"], seconds=61),
        "unmade": command(None, why="it was not kept"),
        "large": command(["echo 2.5 dB"], cores=100_000),
    }
    for name, one in commands.items():
        one["figures"] = {f"{name}-psnr": one["figures"][""]}
    content = {"placeholders": {"photos": "a file"}, "not_figures": [], "commands": commands}
    (folder / "figures.json").write_text(json.dumps(content))
    return folder / "figures.json"


def rows_of(printed: str) -> dict[str, str]:
    return {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines()[1:]}


def test_commands_run_and_the_table_says_what_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "with a blank"
    photos.write_text("2.45 dB\n")
    file = figures_file(tmp_path)
    assert main(Options(data=(f"photos={photos}",)), file) == 1
    rows = rows_of(capsys.readouterr().out)
    assert rows["good-psnr"] == "2.5 2.5 0.1 holds"  # 2.45 with one digit
    assert rows["off-psnr"] == "2.5 2.7 0.1 does not hold"
    assert rows["failing"].endswith(
        "does not hold: exit status 1 (--show prints all output): 2.5 dB"
    )
    assert "nothing in the output matches" in rows["silent"]
    assert rows["long"].endswith(
        "not run: takes about 61 s; name it to run it; measured 2026-01-01"
    )
    assert "cannot run here: it was not kept; measured 2026-01-01" in rows["unmade"]
    assert "cannot run here: needs 100000 cores" in rows["large"]
    assert json.loads(file.read_text())["commands"]["off"]["date"] == "2026-01-01"  # no --update


def test_named_commands_run_and_update_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = figures_file(tmp_path)
    options = Options(("long-psnr", "off", "failing"), update=True, machine="mine", show=True)
    assert main(options, file) == 1
    printed = capsys.readouterr()
    assert [*rows_of(printed.out)] == ["off-psnr", "failing", "long-psnr"]
    assert "2.7 dB" in printed.err
    commands = load(file).commands
    for name, measured in (("off", 2.7), ("long", 2.5)):
        assert commands[name].figures[f"{name}-psnr"].measured == [measured]
        assert (commands[name].machine, commands[name].date) == ("mine", str(date.today()))
    for name in ("failing", "good"):
        assert commands[name].figures[f"{name}-psnr"].measured == [1]
        assert commands[name].machine == "an old one"
    assert commands["off"].figures["off-psnr"].text == ["{2.5} dB"]
    assert main(Options(("long",)), file) == 0


def test_the_list_says_what_commands_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Options(list=True, names=("good", "unmade")), figures_file(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "good: good-psnr" in printed
    assert "needs photos; takes about 1 s" in printed
    assert "needs nothing; it was not kept" in printed
    assert "photos: a file" in printed
    assert "off" not in printed.replace("offered", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(("goood",)), "'goood': no such command or figure; did you mean 'good'?"),
        (Options(data=("photo=x",)), "--data photo=x: write NAME=PATH; did you mean 'photos'?"),
        (Options(data=("photos",)), "--data photos: write NAME=PATH"),
        (Options(data=("photos=/no/such",)), "--data photos=/no/such: no such path; give a file"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: Options, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main(options, figures_file(tmp_path))


def test_a_bad_file_of_figures_is_refused(tmp_path: Path) -> None:
    file = figures_file(tmp_path)
    content = file.read_text()
    file.write_text(content.replace('"why"', '"because"'))
    with pytest.raises(UserError, match="because"):
        load(file)
