"""The project's optimizers against their papers' formulas in float64, and in both runtimes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comparison import SCHEDULE_FREE, differences, logged
from lives import in_ranks, train
from pipeline.cli import UserError
from pipeline.config.ds_config import OPTIMIZERS
from pipeline.engine.engine import RateFactor, build_optimizer
from pipeline.engine.optimizers.foreach import as_matrix
from pipeline.engine.optimizers.muon import orthogonalised
from pipeline.models import build_generator
from pipeline.run_folder import GENERATOR_EMA_FILE, GENERATOR_FILE, checkpoint_dir

OURS = [name for name, row in OPTIMIZERS.items() if row.file]
SHAPES = ((20, 16, 3, 3), (20, 16, 3, 3), (18, 18, 1, 1), (8, 1, 3, 3), (16, 40), (16,), ())
"""Convolutions, two of them alike, one 1x1, one depthwise; a linear layer, a bias, a number."""
UPDATES = 16


def weights_and_gradients(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    """Return the same numbers in any dtype: first weights, and gradients for every update."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    weights = [nn.Parameter((0.3 * weight).to(dtype)) for weight in draw()]
    return weights, [[one.to(dtype) for one in draw()] for _ in range(UPDATES)]


def build(name: str, weights: list[nn.Parameter], **params: Any) -> Any:
    return build_optimizer({"type": name, "params": params}, weights)


def trained(name: str, dtype: torch.dtype, **params: Any) -> list[Tensor]:
    """Return the weights after all updates, each at another rate."""
    weights, updates = weights_and_gradients(dtype)
    optimizer = build(name, weights, **params)
    for number, gradients in enumerate(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate(params["lr"], number)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


def rate(lr: float, number: int) -> float:
    return lr * min(1, (number + 1) / 4) * (1 - number / 50)


# --- The formulas, weight by weight. Each yields a weight's value after every update. ---

Reference = Callable[..., Iterator[Tensor]]


def adam_of_torch(optimizer: type[torch.optim.Optimizer]) -> Reference:
    def values(
        weight: Tensor, gradients: list[Tensor], lr: float, **params: Any
    ) -> Iterator[Tensor]:
        own = nn.Parameter(weight.clone())
        inner = optimizer([own], lr=lr, **params)
        for number, gradient in enumerate(gradients):
            inner.param_groups[0]["lr"] = rate(lr, number)
            own.grad = gradient
            inner.step()
            yield own.detach()

    return values


def adafactor(weight: Tensor, gradients: list[Tensor], **params: Any) -> Iterator[Tensor]:
    """torch's on a matrix."""
    shape = weight.shape
    if weight.dim() > 1:
        weight, gradients = as_matrix(weight), [as_matrix(one) for one in gradients]
    epsilon = torch.finfo(torch.float32).eps
    params = {"eps": (epsilon, 1e-3), **params}
    for value in adam_of_torch(torch.optim.Adafactor)(weight, gradients, **params):
        yield value.view(shape)


def adan(
    weight: Tensor, gradients: list[Tensor], lr: float, betas: Any, eps: float, weight_decay: float
) -> Iterator[Tensor]:
    m, v, n, previous = 0.0, 0.0, 0.0, gradients[0]
    for k, g in enumerate(gradients, 1):
        eta, difference = rate(lr, k - 1), g - previous
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * difference
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * difference) ** 2
        first, second, third = (1 - beta**k for beta in betas)
        move = (m / first + betas[1] * v / second) / ((n / third).sqrt() + eps)
        weight = (weight - eta * move) / (1 + eta * weight_decay)
        previous = g
        yield weight


def muon(
    weight: Tensor,
    gradients: list[Tensor],
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    adjust_lr_fn: str,
    adamw_lr: float,
) -> Iterator[Tensor]:
    if weight.dim() < 2 or min(weight.shape[:2]) < 16:
        yield from adam_of_torch(torch.optim.AdamW)(
            weight, gradients, adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return
    shape, weight = weight.shape, as_matrix(weight)
    buffer = torch.zeros_like(weight)
    for number, gradient in enumerate(gradients):
        g, eta = as_matrix(gradient), rate(lr, number)
        buffer = momentum * buffer + (1 - momentum) * g
        move = momentum * buffer + (1 - momentum) * g if nesterov else buffer
        move = move / move.norm()
        for _ in range(5):
            square = move @ move.T
            move = 3.4445 * move + (-4.7750 * square + 2.0315 * square @ square) @ move
        rows, columns = weight.shape
        factor = (
            0.2 * math.sqrt(max(rows, columns))
            if adjust_lr_fn == "match_rms_adamw"
            else math.sqrt(max(1, rows / columns))
        )
        weight = weight * (1 - eta * weight_decay) - eta * factor * move
        yield weight.view(shape)


def soap(
    weight: Tensor,
    gradients: list[Tensor],
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    precondition_frequency: int,
    max_precond_dim: int,
) -> Iterator[Tensor]:
    shape = weight.shape
    if weight.dim() > 2:
        weight = weight.flatten(2)
    modes = [
        i for i, size in enumerate(weight.shape) if weight.dim() > 1 and 1 < size <= max_precond_dim
    ]
    moments: dict[int, Any] = dict.fromkeys(modes, 0.0)
    bases: dict[int, Tensor] = {}
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)

    def rotated(values: Tensor, *, back: bool = False) -> Tensor:
        for mode in modes:
            basis = bases[mode] if back else bases[mode].T
            values = torch.tensordot(basis, values, dims=([1], [mode])).movedim(0, mode)
        return values

    for number, gradient in enumerate(gradients):
        g, eta = gradient.view(weight.shape), rate(lr, number)
        if number > 0:
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * rotated(g) ** 2
            move = rotated(m) / ((v / (1 - betas[1] ** number)).sqrt() + eps)
            weight = weight - eta / (1 - betas[0] ** number) * rotated(move, back=True)
            weight = weight * (1 - eta * weight_decay)
        for mode in modes:
            slices = g.movedim(mode, 0).flatten(1)
            moments[mode] = betas[1] * moments[mode] + (1 - betas[1]) * slices @ slices.T
            if number == 0:
                bases[mode] = torch.linalg.eigh(moments[mode]).eigenvectors.flip(1)
            elif number % precondition_frequency == 0:
                estimates = (bases[mode].T @ moments[mode] @ bases[mode]).diagonal()
                order = estimates.argsort(descending=True)
                v = v.index_select(mode, order)
                bases[mode] = torch.linalg.qr(moments[mode] @ bases[mode][:, order]).Q
        yield weight.view(shape)


def schedule_free(
    weight: Tensor,
    gradients: list[Tensor],
    lr: float,
    betas: Any,
    eps: float,
    weight_decay: float,
    r: float,
    weight_lr_power: float,
) -> Iterator[Tensor]:
    x, y, z, v, total, largest = weight, weight, weight, 0.0, 0.0, 0.0
    for k, g in enumerate(gradients, 1):
        eta = rate(lr, k - 1)
        v = betas[1] * v + (1 - betas[1]) * g**2
        move = g / ((v / (1 - betas[1] ** k)).sqrt() + eps) + weight_decay * y
        z = z - eta * move
        largest = max(largest, eta)
        share = k**r * largest**weight_lr_power
        total += share
        x = (1 - share / total) * x + share / total * z
        y = (1 - betas[0]) * z + betas[0] * x
        yield y


ADAM = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.05}
CASES: dict[str, tuple[str, Reference, dict[str, Any]]] = {
    "radam": ("RAdam", adam_of_torch(torch.optim.RAdam), ADAM),
    "radam-decoupled": (
        "RAdam",
        adam_of_torch(torch.optim.RAdam),
        {**ADAM, "decoupled_weight_decay": True},
    ),
    "nadam": ("NAdam", adam_of_torch(torch.optim.NAdam), {**ADAM, "momentum_decay": 0.01}),
    "nadam-decoupled": (
        "NAdam",
        adam_of_torch(torch.optim.NAdam),
        {**ADAM, "decoupled_weight_decay": True},
    ),
    "adan": ("Adan", adan, {**ADAM, "betas": (0.98, 0.92, 0.99)}),
    "adafactor": ("Adafactor", adafactor, {"lr": 0.05, "weight_decay": 0.05, "d": 1.0}),
    "muon": (
        "Muon",
        muon,
        {
            **ADAM,
            "momentum": 0.95,
            "nesterov": True,
            "adjust_lr_fn": "match_rms_adamw",
            "adamw_lr": 0.004,
        },
    ),
    "muon-original": (
        "Muon",
        muon,
        {
            **ADAM,
            "momentum": 0.9,
            "nesterov": False,
            "adjust_lr_fn": "original",
            "adamw_lr": 0.01,
        },
    ),
    "soap": ("SOAP", soap, {**ADAM, "precondition_frequency": 4, "max_precond_dim": 32}),
    "schedule-free": (
        "ScheduleFreeAdamW",
        schedule_free,
        {**ADAM, "r": 0.5, "weight_lr_power": 2.0},
    ),
}


def test_every_optimizer_of_ours_has_a_formula() -> None:
    assert {name for name, *_ in CASES.values()} == set(OURS)


@pytest.mark.parametrize("case", CASES)
def test_its_updates_are_the_formulas(case: str) -> None:
    name, reference, params = CASES[case]
    # Eigenvectors of nearly equal eigenvalues depend on rounding.
    found = trained(name, torch.float64 if name == "SOAP" else torch.float32, **params)
    weights, updates = weights_and_gradients(torch.float64)
    for i, weight in enumerate(weights):
        *_, wanted = reference(weight.detach(), [gradients[i] for gradients in updates], **params)
        assert i > 0 or (wanted - weight).abs().max() > 0.01, "the updates must be visible"
        torch.testing.assert_close(
            found[i].double(),
            wanted,
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, i=i: f"{SHAPES[i]}: {text}",
        )


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "Adan",
            {"betas": [0.9, 0.99]},
            "optimizer Adan: betas must be 3 numbers, not (0.9, 0.99)",
        ),
        ("AdamW", {"betas": 0.9}, "optimizer AdamW: "),
        ("RAdam", {"betas": 0.9}, "betas must be 2 numbers, not 0.9"),
        ("NAdam", {"betas": [0.9, 1.0]}, "betas must be from 0 to below 1"),
        ("NAdam", {"lr": "fast"}, "lr must be 0 or above, not 'fast'"),
        ("Muon", {"lr": -1.0}, "lr must be 0 or above, not -1.0"),
        ("Muon", {"adjust_lr_fn": "none"}, "must be match_rms_adamw or original, not 'none'"),
        ("Muon", {"adamw_lr": -1}, "adamw_lr must be 0 or above, not -1"),
        ("Muon", {"ns_steps": 0}, "ns_steps must be a whole number from 1 to 20, not 0"),
        ("Adafactor", {"d": 0}, "d must be above 0, not 0"),
        ("Adafactor", {"beta2_decay": 0.8}, "beta2_decay must be from -1 to below 0, not 0.8"),
        ("SOAP", {"precondition_frequency": 0}, "must be a whole number, 1 or above, not 0"),
        ("ScheduleFreeAdamW", {"weight_decay": -1}, "weight_decay must be 0 or above, not -1"),
    ],
)
def test_a_bad_value_is_one_clear_line(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, [nn.Parameter(torch.zeros(1))], **params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_muon_moves_singular_values_to_about_one() -> None:
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices, 5))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(orthogonalised(matrices.mT, 5), orthogonalised(matrices, 5).mT)


def test_muon_is_torchs_up_to_its_bfloat16() -> None:
    weights, updates = weights_and_gradients(torch.float32)
    ours, theirs = (
        nn.Parameter(weights[4].detach().clone()),
        nn.Parameter(weights[4].detach().clone()),
    )
    params = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    pair = build("Muon", [ours], **params), torch.optim.Muon([theirs], **params)
    for gradients in updates:
        ours.grad, theirs.grad = gradients[4], gradients[4]
        for optimizer in pair:
            optimizer.step()
    moved = (theirs - weights[4]).norm()
    assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("name", OURS)
def test_a_rate_factor_is_another_rate(name: str) -> None:
    """The schedule-free one weighs its average by the rate, too: no rate but the first differs."""
    found = []
    for lr, factor in ((0.01, 0.5), (0.005, 1.0)):
        weights, updates = weights_and_gradients(torch.float32)
        optimizer = build(name, weights, lr=lr)
        factors = RateFactor(optimizer)
        for gradients in updates[:4]:
            factors.set(factor)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == lr
        found.append(weights)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# --- Updates that must not be made ---


def state_of(weights: list[nn.Parameter], optimizer: Any) -> Any:
    return deepcopy(([weight.detach() for weight in weights], optimizer.state_dict()["state"]))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return all(equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_a_skipped_update_changes_no_bit_and_does_not_count(name: str) -> None:
    """In the first update, when there is no state yet, and in a later one."""
    whole, skipping = (weights_and_gradients(torch.float32)[0] for _ in range(2))
    updates = weights_and_gradients(torch.float32)[1]
    params = {"lr": 0.01, **({"precondition_frequency": 1000} if name == "SOAP" else {})}
    optimizers = [build(name, weights, **params) for weights in (whole, skipping)]
    optimizers[1].found_inf = torch.zeros(())

    def update(weights: list[nn.Parameter], optimizer: Any, gradients: list[Tensor]) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    for number, gradients in enumerate(updates[:4]):
        update(whole, optimizers[0], gradients)
        if number == 2 or (number == 0 and name != "SOAP"):
            before = state_of(skipping, optimizers[1])
            for bad in (math.nan, math.inf):
                optimizers[1].found_inf.fill_(1)
                update(skipping, optimizers[1], [torch.full_like(one, bad) for one in gradients])
                optimizers[1].found_inf.fill_(0)
            after = state_of(skipping, optimizers[1])
            assert equal(before[0], after[0])
            assert number == 0 or equal(before[1], after[1])
        update(skipping, optimizers[1], gradients)
    assert equal(state_of(whole, optimizers[0]), state_of(skipping, optimizers[1]))


def test_soap_survives_a_first_update_that_is_skipped() -> None:
    """It has no eigenvectors then, and works like Adam until they are computed."""
    weights, updates = weights_and_gradients(torch.float32)
    optimizer = build("SOAP", weights, lr=0.01, precondition_frequency=3)
    optimizer.found_inf = torch.ones(())
    begun = [weight.detach().clone() for weight in weights]
    for number, gradients in enumerate(updates[:8]):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * math.nan if number == 0 else gradient
        optimizer.step()
        optimizer.found_inf.fill_(0)
        assert equal(begun, [weight.detach() for weight in weights]) == (number == 0)
    for state in optimizer.state.values():
        for name, value in state.items():
            assert torch.isfinite(value).all(), name
            if name.startswith("basis"):
                torch.testing.assert_close(value @ value.T, torch.eye(len(value)))
                assert not torch.equal(value, torch.eye(len(value)))


# --- The device ---


class Counting(TorchDispatchMode):
    """Counts operations that a device would run, and those whose result the host looks at."""

    FREE = ("empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias", "sym_")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        is_look = name == "_local_scalar_dense"
        self.looks += is_look
        self.operations += not (function.is_view or name.startswith(self.FREE) or is_look)
        return function(*args, **(kwargs or {}))


MOST_OPERATIONS = {"Adafactor": 400, "Muon": 330, "SOAP": 900}
"""Those that compute the weights of each shape together. VapSR has 13 shapes."""


@pytest.fixture(scope="module")
def vapsr() -> nn.Module:
    network = build_generator("vapsr", 4)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    return network


@pytest.mark.parametrize("name", OURS)
def test_an_update_is_few_operations_and_waits_for_none(vapsr: nn.Module, name: str) -> None:
    optimizer = build(name, list(vapsr.parameters()), lr=0.001)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    with Counting() as counting:
        optimizer.step()
    assert counting.looks == 0
    assert 10 < counting.operations <= MOST_OPERATIONS.get(name, 70)


# --- The runtimes ---

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("deepspeed", {}),
    "bf16": ("deepspeed", {"bf16": {"enabled": True}}),
    "fp16": ("deepspeed", {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    "zero1": ("deepspeed", {"zero_optimization": {"stage": 1}}),
    "zero2-bf16": ("deepspeed", {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}),
    "accelerate": ("accelerate", {}),
}


def _lives(folder: str) -> dict[str, dict[str, Any]]:
    """Train with every optimizer in every way that it allows; save, load and skip updates."""
    from deepspeed.accelerator import get_accelerator

    from pipeline.distributed.ranks import start_distributed, stop_distributed

    ranks = start_distributed()
    # refused on most CPUs, though it works on all
    type(get_accelerator()).is_fp16_supported = lambda self: True
    found = {}
    for name in OURS:
        for kind, (runtime, changes) in KINDS.items():
            if "zero" in kind and OPTIMIZERS[name].needs_whole_weights:
                continue
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0,
                "steps_per_print": 1 << 60,
                "optimizer": {"type": name, "params": {"lr": 0.01, "weight_decay": 0.1}},
                **changes,
            }
            found[f"{name} {kind}"] = _life(config, runtime, ranks, Path(folder) / name / kind)
    stop_distributed()
    return found


def _life(config: dict[str, Any], runtime: str, ranks: Any, folder: Path) -> dict[str, Any]:
    from pipeline.checkpoint.engine_state import capture_engine, load_engine
    from pipeline.checkpoint.snapshot import HostMemory, Snapshot
    from pipeline.engine.engine import backward_and_step, build_engine

    def new_engine(seed: int) -> Any:
        torch.manual_seed(seed)
        layers = nn.Conv2d(16, 16, 3), nn.PReLU(), nn.Conv2d(16, 3, 3)
        return build_engine(nn.Sequential(*layers), config, ranks, runtime)

    def update(engine: Any, numbers: range, factor: float = 1.0) -> None:
        for number in numbers:
            images = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(number))
            images = images.to(next(engine.module.parameters()).dtype)
            backward_and_step(engine, (engine(images).float() - 1).square().mean() * factor)

    def files(engine: Any) -> dict[str, Any]:
        snapshot = Snapshot(HostMemory())
        captured = capture_engine(engine, "net", snapshot)
        snapshot.copy()
        # What an engine counts of its own life, such as its skipped updates, may differ.
        return {
            path: {
                key: state[key]
                for key in ("module", "optimizer", "optimizer_state_dict")
                if key in state
            }
            for path, state in ((path, one.thaw()) for path, one in captured.items())
        } | {"whole": {path: one.thaw() for path, one in captured.items()}}

    straight, torn = new_engine(0), new_engine(1)
    begun = [weight.detach().clone() for weight in straight.module.parameters()]
    update(straight, range(3))
    for path, state in files(straight)["whole"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / path)
    load_engine(torn, folder, "net")
    for engine in (straight, torn):
        update(engine, range(3, 12))
    before, other = deepcopy(files(straight)), files(torn)
    update(straight, range(2), factor=math.nan)
    after = files(straight)
    for values in (before, other, after):
        del values["whole"]
    weights = straight.weights
    found = {
        "resumed": differences(before, other),
        "skipped": differences(_states(before), _states(after)),
        "was_skipped": bool(straight.was_skipped),
        # In 16 bits, some weights are too large to change so little.
        "moved": (min if weights[0].dtype == torch.float32 else max)(
            float((weight - first).abs().max())
            for weight, first in zip(weights, begun, strict=True)
        ),
        "dtypes": sorted({str(weight.dtype) for weight in weights}),
        "averaged": not torch.equal(weights[0].float(), next(straight.module.parameters()).float()),
    }
    for engine in (straight, torn):
        engine.destroy()
    return found


def _states(files: dict[str, Any]) -> list[Any]:
    """Return weights and optimizer states of captured files, without loss scale and such."""
    found = []
    for content in files.values():
        found.append(content.get("module"))
        for key in ("optimizer", "optimizer_state_dict"):
            state = content.get(key) or {}
            state = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
            found.append(state.get("state"))
    return found


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("optimizers")
    return in_ranks(_lives, folder / "ranks", 1, str(folder / "files"))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_it_trains_resumes_and_skips_in_every_way(
    lives: dict[str, dict[str, Any]], name: str, kind: str
) -> None:
    """Over 12 updates, resumed after 3 in an engine with other weights: SOAP computes its
    eigenvectors in the first and the eleventh."""
    if "zero" in kind and OPTIMIZERS[name].needs_whole_weights:
        assert f"{name} {kind}" not in lives
        return
    life = lives[f"{name} {kind}"]
    assert life["resumed"] == [], "a resumed run is the same, bit for bit"
    assert life["skipped"] == [], "NaN changes neither weights nor states"
    assert life["was_skipped"]
    assert life["moved"] > 1e-4, "the weights learn"
    assert life["dtypes"] == ["torch.bfloat16" if kind == "zero2-bf16" else "torch.float32"]
    is_16_bit = kind in ("bf16", "fp16")  # the weights of the network are then rounded masters
    assert life["averaged"] == (is_16_bit or name == "ScheduleFreeAdamW")


def test_a_schedule_free_run_validates_and_exports_its_average(
    dataset: Path, tmp_path: Path
) -> None:
    """Validation leaves the training alone: its numbers do not depend on how often it happens."""
    for every in (1, 4):
        train(dataset, tmp_path / str(every), "steps=4", f"validate_every={every}", *SCHEDULE_FREE)
    step = checkpoint_dir(tmp_path / "4", 4)
    raw, averaged = (load_file(step / name) for name in (GENERATOR_FILE, GENERATOR_EMA_FILE))
    saved = torch.load(step / "generator" / "mp_rank_00_model_states.pt", weights_only=False)
    states = [state["x"] for state in saved["optimizer"]["state"].values()]
    # Buffers are the same in both.
    weights = [name for name in saved["module"] if not torch.equal(raw[name], averaged[name])]
    assert len(weights) > 10
    for name, state in zip(weights, states, strict=True):
        assert torch.equal(averaged[name], state)
        assert torch.equal(raw[name], saved["module"][name])
    losses = [logged(tmp_path / str(every), "train", "loss") for every in (1, 4)]
    assert losses[0] == losses[1]
