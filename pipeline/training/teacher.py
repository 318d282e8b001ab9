"""Distillation: a frozen, larger network shows the one in training what LR images become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config.recipe import Recipe
from pipeline.config.specs import TeacherSpec
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import run_network_file
from pipeline.training.options import TrainPlan

POSITIONS = 24  # positions compared in each direction; more are averaged in blocks
MIN_CHANNELS = 8  # of features; fewer are images


def teacher_file(spec: TeacherSpec) -> Path:
    """Return the weights file that a recipe's `teacher.file` names: of a run, the best step's.

    Raises `UserError` if there is none.
    """
    path = Path(spec.file).expanduser()
    if path.is_dir():
        return run_network_file(path, "best", ema=True)
    if not path.is_file():
        raise UserError(
            f"teacher.file: {spec.file} does not exist; give a weights file or a run folder"
        )
    return path


def read_teacher(recipe: Recipe) -> SavedNetwork:
    """Read the network that `recipe.teacher` names.

    Raises `UserError` if it cannot be read or is of another scale.
    """
    assert recipe.teacher is not None
    file = teacher_file(recipe.teacher)
    saved = read_network(file)
    if saved.scale != recipe.scale:
        raise UserError(
            f"teacher.file: {file} holds {saved.name} x{saved.scale}, but this recipe trains "
            f"x{recipe.scale}; a teacher must have the same scale"
        )
    return saved


def check_teacher(plan: TrainPlan) -> None:
    """Check the teacher of a stage, if it has one, before an old run is moved aside.

    Raises `UserError`.
    """
    if plan.recipe.teacher is None:
        return
    file = teacher_file(plan.recipe.teacher).resolve()
    if file.is_relative_to(plan.home.resolve()):
        raise UserError(
            f"teacher.file: {plan.recipe.teacher.file} is in this run's own folder; export the "
            "teacher with export_trained_model.py and give that file, or use another --output-dir"
        )
    read_teacher(plan.recipe).build()  # raises UserError if the tensors do not fit


class Teacher:
    """A frozen network, and the losses of another network against it.

    Two terms, weighted by the recipe's `teacher`:

    - `teacher`: mean absolute difference of the two outputs.
    - `teacher_features`: mean absolute difference of the affinities of features, i.e. of the
      cosines between the features of every two positions of an image. They have the same shape
      whatever the numbers of channels are (He et al., "FAKD: Feature-Affinity Based Knowledge
      Distillation for Efficient Image Super-Resolution", ICIP 2020, their spatial affinity). The
      features are the last ones before a network upscales.

    The teacher has no gradient. On a GPU it runs in BF16 where that is supported, because its
    output is compared, not learnt; on a CPU in FP32, where BF16 is not faster.

    Args:
        network: the teacher, on its device.
        student: the module in training; with a `feature_weight`, its features are kept from each
            forward pass to the next.
        spec: the recipe's `teacher`.
        lr_side: height and width of LR crops in pixels.

    Raises:
        UserError: a `feature_weight` is given, and a network has no features of LR's size.
    """

    def __init__(
        self, network: nn.Module, student: nn.Module, spec: TeacherSpec, lr_side: int
    ) -> None:
        self.network, self.spec = network.eval().requires_grad_(False), spec
        self._features: dict[str, Tensor] = {}
        if spec.feature_weight:
            for name, module in (("teacher", network), ("student", student)):
                tap = _last_features(module, lr_side)
                if tap is None:
                    raise UserError(
                        f"teacher.feature_weight: the {name}'s network has no features of the size "
                        "of LR; set teacher.feature_weight=0"
                    )
                tap.register_forward_hook(self._keeper(name))

    def losses(self, sr: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms, FP32 scalars.

        `lr` is the batch that the student has just turned into `sr`, (N, 3, H, W).
        """
        with torch.no_grad(), self._precision(lr):
            target = self.network(lr)
        terms = {}
        if self.spec.weight:
            terms["teacher"] = self.spec.weight * F.l1_loss(sr.float(), target.float())
        if self.spec.feature_weight:
            own, wanted = (self._features.pop(name) for name in ("student", "teacher"))
            side = min(own.shape[-1], wanted.shape[-1])
            terms["teacher_features"] = self.spec.feature_weight * F.l1_loss(
                affinity(own, side), affinity(wanted, side)
            )
        return terms

    def _keeper(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name == "teacher" or torch.is_grad_enabled():
                self._features[name] = output

        return keep

    @staticmethod
    def _precision(lr: Tensor) -> AbstractContextManager[None]:
        if lr.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()


def affinity(features: Tensor, side: int) -> Tensor:
    """Return the cosines between the features of every two positions, (N, P, P), FP32 or FP64.

    `features`: (N, C, H, H), with H a multiple of `side`. They are averaged in blocks, so that
    there are `side` blocks, or half, a third, … of it, but at most `POSITIONS`, in each direction.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    block = features.shape[-1] // side * -(-side // POSITIONS)
    if block > 1:
        features = F.avg_pool2d(features, block, ceil_mode=True)
    flat = F.normalize(features.flatten(2), dim=1)
    return flat.transpose(1, 2) @ flat


def _last_features(network: nn.Module, side: int) -> nn.Module | None:
    """Return the module of `network` that makes the last features before the network upscales.

    They have the size of the first features, which is LR's or, if the network first unshuffles its
    input, smaller, and at least `MIN_CHANNELS` channels. The last module of that size is left out
    if it makes exactly the channels of an image's pixels, 3 * scale**2: it makes the image.
    """
    found: list[tuple[nn.Module, torch.Size]] = []
    images = 3 * int(getattr(network, "scale", 1)) ** 2

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        is_map = isinstance(output, Tensor) and output.dim() == 4
        if is_map and output.shape[-1] == output.shape[-2] and output.shape[1] >= MIN_CHANNELS:
            found.append((module, output.shape))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(look) for leaf in leaves]
    parameter = next(network.parameters())
    was_training = network.training
    try:
        with torch.no_grad():
            # Not through __call__, which would compile the network for this image.
            network.eval().forward(torch.zeros(1, 3, side, side, device=parameter.device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    found = [(module, shape) for module, shape in found if shape[-1] == found[0][1][-1]]
    if found and found[-1][1][1] == images:
        found.pop()
    return found[-1][0] if found else None
