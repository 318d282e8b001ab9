"""The sections of the self-check, and the numbers in README and docs that they give. Needs no
torch.

The order is the priority: where the time does not suffice, the last ones are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A part of the self-check, which runs in a process of its own."""

    name: str
    seconds: float
    """Its share of the default eight minutes."""
    about: str
    documented: tuple[str, ...] = field(default=())
    """The ids of its checks that README and docs name, in comments behind what is not measured
    yet."""
    most_seconds: float = 0.0
    """After which it hangs; 0: twice its share and 45 s, for the imports from a cold disk."""

    @property
    def limit(self) -> float:
        return self.most_seconds or 2 * self.seconds + 45


SECTIONS = {
    section.name: section
    for section in (
        Section(
            "machine",
            10,
            "what there is: driver, torch, capability, compiler, bandwidth, matrix rate",
            ("machine.mig",),
        ),
        Section(
            "arithmetic", 25, "networks, losses and metrics against the CPU and against float64"
        ),
        Section(
            "engine",
            45,
            "updates of DeepSpeed and Accelerate against autograd; their kernels and waits",
            ("engine.fp16",),
        ),
        Section(
            "speed",
            110,
            "training steps by benchmarks/train_step.py",
            ("speed.vapsr_x4", "speed.vapsr_x4.fp16.reduce-overhead.b64"),
        ),
        Section(
            "loader",
            70,
            "every kind of batch against the CPU's; batches a second",
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
                "loader.same.jpeg",
            ),
        ),
        Section(
            "resume",
            80,
            "a run that is killed and continued against one that is not",
            ("resume.deterministic",),
        ),
        Section("training", 60, "the demo: stopped, continued and evaluated", ("training.gain",)),
        Section(
            "inference",
            40,
            "pictures and a film: tiles, precisions, little memory",
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
    """Id of a check that README or docs name -> its section."""
    return {name: section.name for section in SECTIONS.values() for name in section.documented}
