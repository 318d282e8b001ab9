"""The self-check: the small check of this machine, sections that crash or hang, and its ids."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import ROOT, environment, run_python
from launch.selfcheck import child, documents
from launch.selfcheck.child import SectionResult, run_section
from launch.selfcheck.documents import filled_in, places, text_of
from launch.selfcheck.report import Check, Report, SkippedError
from launch.selfcheck.table import SECTIONS, Section, documented

SAID = re.compile(
    r"\b(not (yet )?(measured|run|tried)|(measured|tried|run) on (a )?GPUs?)\b", re.IGNORECASE
)
"""What documents say of numbers that only a GPU can give. It can also be about something else:"""
ABOUT_OTHERS = (
    "downloads not tried",
    "an engine build not tried",
    "not tried in ComfyUI",
    "computed, not measured",
    "that is not measured",
    "is not tried again",
)


# --- Ids ---


def test_ids_in_documents_and_in_the_self_check_agree() -> None:
    named = {place.id for place in places()}
    assert named == set(documented())
    for name, section in documented().items():
        assert name.startswith(f"{section}.")


def test_whatever_waits_for_a_gpu_has_an_id() -> None:
    """To fix a failure, write ` <!-- selfcheck: SECTION.NAME -->` after the number and add the id
    to launch/selfcheck/table.py."""
    lacking = [
        f"{path.name}: {line}"
        for path in documents.documents()
        for line in path.read_text().splitlines()
        if SAID.search(line)
        and "<!-- selfcheck: " not in line
        and not any(known in line for known in ABOUT_OTHERS)
    ]
    assert lacking == []


def test_measured_values_are_put_into_the_lines_of_the_documents() -> None:
    checks = {
        "loader.npy": Check("loader.npy", 12345.6, "images/s"),
        "loader.png": Check("loader.png", None),
        "several.strong.2": Check("several.strong.2", 310.0, "images/s"),
    }
    lines = filled_in(checks)
    assert (
        "docs/benchmarks.md: | a: this loader, npy | 969 | 7.73 | 1,802 | 7.39 | 1,032 | 12,346 "
        "images/s "
        "<!-- selfcheck: loader.npy --> |" in lines
    )
    assert any(
        line.startswith("README.md: ")
        and "on PNG; 12,346 images/s <!-- selfcheck: loader.npy -->" in line
        for line in lines
    )
    assert not any("PNG | 181" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3 ms"),
        (0.123456, "0.123 ms"),
        (1234.5, "1,234 ms"),
        (1e-7, "1e-07 ms"),
        ("yes", "yes ms"),
        (None, "- ms"),
    ],
)
def test_values_are_written_for_people(value: float | str | None, text: str) -> None:
    assert text_of(Check("a.b", value, "ms")) == text


# --- Checks ---


def checks_of(folder: Path, action: Any) -> list[Check]:
    file = folder / "checks.jsonl"
    with open(file, "w") as opened:
        action(Report(opened, "machine", folder, 100, 200, is_small=True))
    return [Check(**json.loads(line)) for line in file.read_text().splitlines()]


def test_limits_are_kept_or_not(tmp_path: Path) -> None:
    def action(report: Report) -> None:
        report.at_most("low", 1.0, 1.0)
        report.at_most("high", 1.5, 1.0)
        report.at_most("nan", math.nan, 1.0)
        report.at_least("psnr", math.inf, 40.0, "dB")
        report.at_least("none", -math.inf, 40.0, "dB")
        report.number("speed", 3.0, "ms")
        report.skip("gpu", "no GPU")
        with report.guarded("broken"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        with report.guarded("absent"):
            raise SkippedError("no such library")

    found = checks_of(tmp_path, action)
    assert [(check.id, check.ok) for check in found] == [
        ("machine.low", True),
        ("machine.high", False),
        ("machine.nan", False),
        ("machine.psnr", True),
        ("machine.none", False),
        ("machine.speed", None),
        ("machine.gpu", None),
        ("machine.broken", False),
        ("machine.absent", None),
    ]
    # JSON cannot express these as numbers
    assert [check.value for check in found[2:5]] == ["nan", "inf", "-inf"]
    assert found[7].note == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found[8].note == "skipped: no such library"


# --- Sections that go wrong ---


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """section(code) runs the code as the section `machine`, in its process, in a second or two."""

    def play(code: str, most: float = 30.0) -> SectionResult:
        (tmp_path / "sitecustomize.py").write_text(
            "import sys, types\n"
            "module = sys.modules['launch.selfcheck.sections.machine'] = "
            "types.ModuleType('machine')\n"
            f"exec({code!r}, module.__dict__)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return run_section(SECTIONS["machine"], share=5, most=most, is_small=True)

    return play


def test_a_section_that_ends_well_passes(section: Any) -> None:
    found = section(
        "def run(report):\n    report.number('speed', 2.0, 'ms')\n    report.fact('right', True)\n"
    )
    assert (found.status, found.why, [check.id for check in found.checks]) == (
        "PASS",
        "",
        ["machine.speed", "machine.right"],
    )
    assert found.as_json()["checks"][0] == {
        "id": "machine.speed",
        "value": 2.0,
        "unit": "ms",
        "limit": "",
        "ok": None,
        "command": "",
    }


def test_a_check_that_fails_fails_its_section(section: Any) -> None:
    found = section(
        "def run(report):\n    report.at_most('error', 2.0, 1.0)\n    report.fact('right', True)\n"
    )
    assert (found.status, len(found.checks)) == ("FAIL", 2)


def test_what_is_missing_skips_its_section(section: Any) -> None:
    found = section(
        "def run(report):\n    from launch.selfcheck.report import SkippedError\n"
        "    raise SkippedError('DALI is not installed')\n"
    )
    assert (found.status, found.why) == ("skipped", "DALI is not installed")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "import os, signal\ndef run(report):\n    report.number('a', 1, '')\n    "
            "os.kill(os.getpid(), signal.SIGSEGV)\n",
            "was killed by SIGSEGV",
        ),
        (
            "def run(report):\n    report.number('a', 1, '')\n    raise MemoryError('no memory is "
            "left')\n",
            "ended with status 1: MemoryError: no memory is left",
        ),
    ],
)
def test_a_crash_is_a_line_and_keeps_what_came_before(section: Any, code: str, why: str) -> None:
    found = section(code)
    assert (found.status, found.why, [check.id for check in found.checks]) == (
        "FAIL",
        why,
        ["machine.a"],
    )


def test_a_section_that_hangs_is_ended_with_all_its_processes(section: Any, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    found = section(
        "import subprocess, sys, time\n"
        "def run(report):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        f"    open({str(note)!r}, 'w').write(str(child.pid))\n"
        "    print('waiting for the device', flush=True)\n    time.sleep(1000)\n",
        most=4.0,
    )
    assert (found.status, found.why) == ("FAIL", "did not end within 4 s: waiting for the device")
    stat, deadline = Path(f"/proc/{note.read_text()}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_line_that_a_kill_has_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "checks.jsonl"
    file.write_text('{"id": "machine.a", "value": 1.0, "ok": true}\n{"id": "machine.b", "val')
    found = child._read("machine", file)
    assert ([check.id for check in found.checks], found.status) == (["machine.a"], "")


# --- The command ---


def command(
    *arguments: str, timeout: float = 60, python: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python or warm.python(), "-m", "launch.selfcheck", *arguments],
        env=environment(threads=1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--only", "machine,enginee"],
            "error: --only enginee: unknown section; did you mean 'engine'?\n",
        ),
        (["--minutes", "0"], "error: --minutes 0 must be above 0\n"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (2, said)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nimport launch.selfcheck.__main__\nimport launch.selfcheck.child\n"
        "heavy = {'torch', 'numpy', 'cv2', 'deepspeed', 'pydantic'} & set(sys.modules)\nassert not "
        "heavy, heavy\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for name, section in SECTIONS.items():
        assert (ROOT / "launch/selfcheck/sections" / f"{name}.py").is_file()
        assert section.about


def test_sections_are_left_out_where_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.selfcheck import __main__ as main

    given = []

    def run(section: Section, *, share: float, most: float, is_small: bool) -> SectionResult:
        given.append((section.name, share, most))
        clock[0] += 100
        return SectionResult(section.name, "PASS", seconds=100)

    clock = [0.0]
    monkeypatch.setattr(main, "run_section", run)
    monkeypatch.setattr(main.time, "monotonic", lambda: clock[0])
    found = main.check(list(SECTIONS.values()), 240, is_small=True)
    assert [one.status for one in found] == ["PASS"] * 3 + ["skipped"] * 6
    assert found[3].why == "out of time; raise --minutes"
    assert [(name, share, most) for name, share, most in given] == [
        ("machine", 5.0, 65.0),
        ("arithmetic", 12.5, 95.0),
        ("engine", 22.5, 40.0),
    ]
    assert "out of time" in capsys.readouterr().out


PARTS = ("machine,arithmetic,engine", "speed", "loader,inference", "resume,training", "several")
"""All sections, in parts that can run in parallel."""
NEED_A_GPU = (
    "engine.fp16",
    "inference.half",
    "arithmetic.tf32",
    "machine.driver",
    "speed.vapsr_x4",
)


def test_the_parts_are_the_whole() -> None:
    assert sorted(",".join(PARTS).split(",")) == sorted(SECTIONS)


@pytest.mark.parametrize("part", PARTS)
def test_the_whole_check_on_this_machine(tmp_path: Path, part: str) -> None:
    """Run the small check: nothing fails, every id in the documents appears, and the checks that
    need a GPU say so."""
    file = tmp_path / "selfcheck.json"
    words = ("--only", part, "--small", "--minutes", "30", "--json", str(file), "--docs")
    # A section that kills its runs finds the ranks among the launcher's children, where forks of
    # another process are not.
    done = command(*words, timeout=1200, python=sys.executable if "resume" in part else None)
    content = json.loads(
        file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    sections = {section["name"]: section for section in content["sections"]}
    assert sorted(sections) == sorted(part.split(","))
    checks = {check["id"]: check for section in sections.values() for check in section["checks"]}
    assert [check for check in checks.values() if check["ok"] is False] == [], done.stdout
    assert {section["status"] for section in sections.values()} == {"PASS"}, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, section in documented().items() if section in sections} <= set(checks)
    for name in NEED_A_GPU:
        if name.partition(".")[0] in sections:
            assert checks[name]["note"].startswith("skipped: "), name
    assert f"everything is in {file}" in done.stdout
    if "resume" in sections:
        assert checks["resume.default"]["value"] == "bit-identical"
    if "several" in sections:
        assert checks["several.evaluate"]["ok"]
    if "loader" in sections:
        assert re.search(
            r"^README\.md: .*\d images/s <!-- selfcheck: loader\.npy -->", done.stdout, re.MULTILINE
        )


def test_a_report_names_no_host_user_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.selfcheck.__main__ import environment_facts

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5c89852c-d268-c3f3,MIG-cba663e8-9bed")
    told = environment_facts(is_small=True)
    assert told["variables"]["CUDA_VISIBLE_DEVICES"] == "GPU-…,MIG-…"
    assert told["packages"]["torch"]
    text = json.dumps({key: value for key, value in told.items() if key != "system"})
    for secret in (os.uname().nodename, str(Path.home()), str(ROOT)):
        assert secret not in text
