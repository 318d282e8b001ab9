"""The sections of the self-check, and which numbers in README and docs they provide. Needs no
torch.

They are in order of priority: if time runs out, the last ones are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A part of the self-check, which runs in its own process."""

    name: str
    seconds: float
    """Its share of the default eight minutes."""
    about: str
    documented: tuple[str, ...] = field(default=())
    """Ids of its checks that README and docs name in comments, after numbers not measured yet."""
    most_seconds: float = 0.0
    """Time limit; 0: twice `seconds`, plus 45 s for imports from a cold disk."""

    @property
    def limit(self) -> float:
        return self.most_seconds or 2 * self.seconds + 45


SECTIONS = {
    section.name: section
    for section in (
        Section(
            "machine",
            10,
            "driver, torch, compute capability, compiler, bandwidth, matmul rate",
            ("machine.mig",),
        ),
        Section("arithmetic", 25, "networks, losses and metrics compared with the CPU and float64"),
        Section(
            "engine",
            45,
            "updates compared with autograd, optimizers with the CPU; kernels and waits",
            ("engine.fp16",),
        ),
        Section(
            "speed",
            110,
            "training steps, timed by benchmarks/train_step.py",
            ("speed.vapsr_x4", "speed.vapsr_x4.fp16.reduce-overhead.b64"),
        ),
        Section(
            "loader",
            80,
            "every kind of batch compared with the CPU's; batches per second",
            (
                "loader.npy",
                "loader.npy_torch",
                "loader.png",
                "loader.png_cached",
                "loader.npy_paired",
                "loader.npy_brightness",
                "loader.npy_noise",
                "loader.npy_gaussian",
                "loader.npy_realesrgan",
                "loader.npy_chain",
                "loader.same.jpeg",
                "loader.same.chain",
                "loader.same.chain_split",
            ),
        ),
        Section(
            "resume",
            80,
            "a run that is killed and continued, compared with an uninterrupted one",
            ("resume.deterministic",),
        ),
        Section("training", 60, "the demo: stopped, continued and evaluated", ("training.gain",)),
        Section(
            "inference",
            40,
            "pictures and a video: tiles, precisions, low memory",
            ("inference.tiles", "inference.fp16"),
        ),
        Section(
            "several",
            100,
            "all-reduce, evaluation and scaling on several GPUs",
            (
                "several.evaluate",
                "several.strong.1",
                "several.strong.2",
                "several.weak.1",
                "several.weak.2",
            ),
        ),
    )
}


def documented() -> dict[str, str]:
    """Return the ids of checks that README and docs name -> their section."""
    return {name: section.name for section in SECTIONS.values() for name in section.documented}
