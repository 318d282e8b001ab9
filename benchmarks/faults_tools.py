"""Kill the dataset tools, run two at once, fill the disk: nothing may be lost or half done."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

import warm
from benchmarks.fault_injection import ENTER, FAULT
from pipeline.cli import RunError, UserError, nearest
from pipeline.cli import run as run_command
from pipeline.data.image_files import QUARANTINE
from pipeline.libraries import cv2

PATIENCE = 300  # seconds for a tool on a busy machine
KILLED = -signal.SIGKILL
CUT = ("--threads", "1", "--min-sharpness", "0", "--size")


@dataclass(frozen=True)
class Tool:
    """A command that writes `out` from the sources, or changes a copy of `original` in place."""

    script: str
    arguments: Callable[[Path, Path], Sequence[object]]  # of (sources, out)
    original: str = ""  # folder of the sources that is copied to `out` before the tool runs


TOOLS = {
    "images": Tool("images_to_data", lambda s, out: (s / "photos", out, *CUT, 64)),
    "videos": Tool(
        "video_to_data",
        lambda s, out: (s / "film.mkv", "--out", out, "--segment-time", 1, *CUT, 64),
    ),
    "tars": Tool("imagenet_to_data", lambda s, out: (s / "photos.tar", "--out", out, *CUT, 64)),
    "pairs": Tool(
        "pairs_to_data",
        lambda s, out: (s / "hr", s / "lr", "--scale", 2, "--out", out, *CUT, 64),
    ),
    "convert": Tool(
        "convert_dataset", lambda s, out: (s / "crops", out, "--to", "png", "--threads", 1)
    ),
    "clean": Tool(
        "check_training_data",
        lambda _, out: ("--data-dir", out, "--clean", "--force", "--min-size", 64, "--threads", 1),
        original="dirty",
    ),
}


@dataclass
class Undisturbed:
    """What a tool does when nothing disturbs it."""

    status: int
    tree: dict[str, str]  # path below `out` -> hash
    bytes: int
    file_events: int
    seconds: float


@dataclass
class Outcome:
    """What one fault did."""

    fault: str
    moment: str
    status: int | None = None  # exit status of the disturbed run
    reported: str = ""  # its last line
    lost: list[str] = field(default_factory=list)  # whatever is not as undisturbed afterwards

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "holds": not self.lost}


class Campaign:
    """The sources, what undisturbed tools make of them, and the faults, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sources = folder, folder / "sources"
        self._undisturbed: dict[str, Undisturbed] = {}
        if not self.sources.exists():
            making = folder / "sources.part"
            shutil.rmtree(making, ignore_errors=True)
            _make_sources(making)
            making.rename(self.sources)
            # From the photographs' own place, because their crops record where they are.
            crops = self.sources / "crops"
            # Exit status 1: a photograph is damaged.
            subprocess.run(self.command("images", crops), check=False, capture_output=True)
            _make_dirty(crops, self.sources / "dirty")
        self._originals = _tree(self.sources)

    def command(self, name: str, out: Path) -> list[str]:
        tool = TOOLS[name]
        script = str(ROOT / "tools" / f"{tool.script}.py")
        return [warm.python(), script, *map(str, tool.arguments(self.sources, out))]

    def undisturbed(self, name: str) -> Undisturbed:
        if name not in self._undisturbed:
            place = self._place(f"undisturbed-{name}", name)
            events = place / "events"
            began = time.monotonic()
            done = self._finish(name, place, ["count_file_events", place / "out", events])
            seconds = time.monotonic() - began
            if done.returncode not in (0, 1):
                raise RunError(_output(place).read_text(encoding="utf-8", errors="replace"))
            size = sum(p.stat().st_size for p in (place / "out").rglob("*") if p.is_file())
            tree = _tree(place / "out")
            self._undisturbed[name] = Undisturbed(
                done.returncode, tree, size, int(events.read_text()), seconds
            )
            shutil.rmtree(place)
        return self._undisturbed[name]

    def kill(self, name: str, draw: random.Random) -> Outcome:
        """kill -9 before a random file operation, or after a random time."""
        expected, place = self.undisturbed(name), self._place("fault", name)
        outcome = Outcome(f"kill -9 of {TOOLS[name].script}.py", "")
        if draw.random() < 0.5:
            number = draw.randint(1, expected.file_events)
            outcome.moment = f"before file operation {number} of {expected.file_events}"
            process = self._start(name, place, ["kill_at_file_event", place / "out", number])
            process.wait(PATIENCE)
        else:
            seconds = draw.uniform(0, expected.seconds)
            outcome.moment = f"after {seconds:.2f} s"
            process = self._start(name, place)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
        return self._conclude(name, place, outcome, process)

    def two_at_once(self, name: str, draw: random.Random) -> Outcome:
        """The same command twice at the same time."""
        expected, place = self.undisturbed(name), self._place("fault", name)
        pause = draw.uniform(0, expected.seconds / 2)
        outcome = Outcome(f"two {TOOLS[name].script}.py at once", f"{pause:.2f} s apart")
        first = self._start(name, place)
        time.sleep(pause)
        second = self._start(name, place)
        first.wait(PATIENCE)
        statuses = {first.returncode, second.wait(PATIENCE)}
        if expected.status not in statuses or not statuses <= {0, expected.status, 2}:
            outcome.lost.append(f"they ended with {sorted(statuses)}")
        return self._conclude(name, place, outcome, second)

    def disk_full(self, name: str, draw: random.Random) -> Outcome:
        """A disk that is full half-way: a tmpfs, which needs the right to mount."""
        expected, place = self.undisturbed(name), self.folder / "fault"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", place], check=True)
        try:
            self._place("fault", name)
            free = draw.randrange(max(1, expected.bytes))
            outcome = Outcome(
                f"disk full under {TOOLS[name].script}.py", f"after {free:,} bytes of output"
            )
            filler = place / "filler"
            _fill(filler, free)
            process = self._start(name, place)
            process.wait(PATIENCE)
            filler.unlink()
            if process.returncode not in (1, 2, expected.status):
                outcome.lost.append(f"it ended with {process.returncode}")
            return self._conclude(name, place, outcome, process)
        finally:
            subprocess.run(["umount", place], check=True)

    def _place(self, folder: str, name: str) -> Path:
        """Return an empty folder for one fault, with the tool's original in it."""
        place = self.folder / folder
        if not os.path.ismount(place):
            shutil.rmtree(place, ignore_errors=True)
        _output(place).unlink(missing_ok=True)
        for part in ("pids", "tmp"):
            (place / part).mkdir(parents=True)
        if TOOLS[name].original:
            shutil.copytree(self.sources / TOOLS[name].original, place / "out")
        return place

    def _start(
        self, name: str, place: Path, call: Sequence[object] = ()
    ) -> subprocess.Popen[bytes]:
        calls = {f"{TOOLS[name].script}.py": [[*map(_plain, call)]]} if call else {}
        with open(_output(place), "ab") as output:
            return subprocess.Popen(
                self.command(name, place / "out"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "TMPDIR": str(place / "tmp"),
                    warm.BEFORE: ENTER,
                    FAULT: json.dumps({"pids": str(place / "pids"), "calls": calls}),
                },
            )

    def _finish(
        self, name: str, place: Path, call: Sequence[object] = ()
    ) -> subprocess.Popen[bytes]:
        process = self._start(name, place, call)
        process.wait(PATIENCE)
        return process

    def _conclude(
        self, name: str, place: Path, outcome: Outcome, process: subprocess.Popen[bytes]
    ) -> Outcome:
        """Run the same command again and compare everything with an undisturbed run."""
        process.wait(PATIENCE)
        # The command may stand for a process of the warm server, which ends, and gives up its lock,
        # a moment later.
        deadline = time.monotonic() + PATIENCE
        for file in (place / "pids").iterdir():
            while _is_alive(file.name.rsplit("-", 1)[1]):
                if time.monotonic() > deadline:
                    raise RunError(f"{file.name} is still alive")
                time.sleep(0.01)
        expected, out = self.undisturbed(name), place / "out"
        text = _output(place).read_text(encoding="utf-8", errors="replace")
        outcome.status = process.returncode
        outcome.reported = next(reversed(text.strip().splitlines()), "")[:300]
        if "Traceback" in text and process.returncode != KILLED:
            outcome.lost.append(f"a traceback: {text[-600:]}")
        _output(place).unlink()
        status = self._finish(name, place).returncode
        # A second run of --clean finds nothing bad any more.
        if status not in {expected.status, 0 if TOOLS[name].original else expected.status}:
            text = _output(place).read_text(encoding="utf-8", errors="replace")
            outcome.lost.append(f"the next run ended with {status}: {text[-600:]}")
        found = _tree(out)
        for path in sorted(expected.tree.keys() | found.keys()):
            if path not in found:
                outcome.lost.append(f"{path} is missing")
            elif path not in expected.tree:
                outcome.lost.append(f"{path} is left behind")
            elif found[path] != expected.tree[path]:
                outcome.lost.append(f"{path} differs")
        outcome.lost += [f"tmp/{path} is left behind" for path in _tree(place / "tmp")]
        if _tree(self.sources) != self._originals:
            outcome.lost.append("an original was changed")
        return outcome


FAULTS: dict[str, Callable[[Campaign, str, random.Random], Outcome]] = {
    "kill": Campaign.kill,
    "two": Campaign.two_at_once,
    "full": Campaign.disk_full,
}


def run(
    seed: int,
    count: int,
    folder: Path,
    tools: Sequence[str] = tuple(TOOLS),
    kinds: Sequence[str] = tuple(FAULTS),
) -> Iterator[dict[str, Any]]:
    """Inject `count` kills into each of `tools`, and a tenth as many faults of the other kinds.

    Yields a record for each: fault, moment, status, reported, lost (a list, empty if the promise
    held) and holds. Equal seeds give equal draws. `folder` keeps the sources for the next call.
    """
    campaign = Campaign(folder)
    for name in tools:
        for kind in kinds:
            for number in range(count if kind == "kill" else max(1, count // 10)):
                draw = random.Random(f"{name}/{kind}/{seed}/{number}")
                yield {
                    "family": f"tools: {name}, {kind}",
                    "seed": seed,
                    "number": number,
                    **FAULTS[kind](campaign, name, draw).as_dict(),
                }


def _is_alive(pid: str) -> bool:
    """Whether a process exists and is no zombie, which holds no files any more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _output(place: Path) -> Path:
    """Return the file of what the tools print, outside the disk that may be full."""
    return place.with_name(f"{place.name}.output")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _fill(path: Path, free: int) -> None:
    """Write a file that leaves `free` bytes on its file system."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(path, max(0, path.stat().st_size - free))


def _tree(folder: Path) -> dict[str, str]:
    """Return path -> hash of all files; of the quarantine's report, without the times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.parent.name == QUARANTINE and path.suffix == ".jsonl":
                lines = [json.loads(line) for line in content.splitlines()]
                content = repr([{**line, "time": ""} for line in lines]).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _photograph(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image with edges and texture: uint8, (height, width, 3)."""
    coarse = draw.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + draw.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _make_sources(folder: Path) -> None:
    """Write photographs, pairs, a tar archive and a film."""
    import av

    draw = np.random.default_rng(0)
    for part in ("photos", "hr", "lr"):
        (folder / part).mkdir(parents=True)
    for number in range(8):
        photo = _photograph(draw, 136, 200)
        cv2.imwrite(str(folder / "photos" / f"{number}.png"), photo)
        cv2.imwrite(str(folder / "hr" / f"{number}.png"), photo)
        lr = cv2.resize(photo, (100, 68), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "lr" / f"{number}.png"), lr)
    (folder / "photos" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with tarfile.open(folder / "photos.tar", "w") as archive:
        archive.add(folder / "photos", "photos")
    with av.open(f"file:{folder}/film.mkv", "w") as film:
        stream = film.add_stream("libx264", rate=10, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 200, 136, "yuv420p"
        scene = _photograph(draw, 136, 800)
        for number in range(40):
            view = np.ascontiguousarray(scene[:, number * 12 : number * 12 + 200])
            film.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        film.mux(stream.encode(None))


def _make_dirty(crops: Path, dirty: Path) -> None:
    """Copy a dataset and damage some of its files; add a bad image of no manifest."""
    shutil.copytree(crops, dirty / "crops")
    files = sorted((dirty / "crops").rglob("*.npy"))
    for file in files[::3]:
        file.write_bytes(file.read_bytes()[:-100])
    flat = np.full((64, 64, 3), 128, np.uint8)
    np.save(dirty / "flat.npy", flat)
    np.save(dirty / "small.npy", _photograph(np.random.default_rng(1), 32, 32))


@dataclass(frozen=True)
class Options:
    """Disturb the dataset tools, run the same command again, and compare the dataset with that of
    an undisturbed run, byte for byte.

    Prints a JSON line for each fault. Exit status 1 if anything was lost, changed or left behind.

    Example: python benchmarks/faults_tools.py --count 50
    """

    count: int = 50
    """Kills of each tool; a tenth as many of the other faults."""
    seed: int = 0
    """Seed of the faults."""
    tool: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this tool; repeat it for several. Default: all."""
    kind: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this kind of fault: kill, two or full."""


def main(options: Options) -> int:
    for given, known in ((options.tool, TOOLS), (options.kind, FAULTS)):
        for name in given:
            if name not in known:
                raise UserError(f"{name!r} is not known{nearest(name, known)}")
    counts = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        for record in run(
            options.seed,
            options.count,
            Path(folder),
            options.tool or tuple(TOOLS),
            options.kind or tuple(FAULTS),
        ):
            counts[not record["holds"]] += 1
            print(json.dumps(record), flush=True)
    print(f"{sum(counts)} faults; the promise held for {counts[0]}")
    return 1 if counts[1] else 0


if __name__ == "__main__":
    run_command(Options, main)
