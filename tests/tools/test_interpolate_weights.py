"""tools/interpolate_weights.py: blends of two networks' weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tqdm import tqdm

from dataset_corpus import run_tool
from fabricate import TINY, tiny_network, tiny_saved
from lives import train
from pipeline import cli
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import checkpoint_dir
from pipeline.training.judging import Judge
from tools.interpolate_weights import Options, first_difference, interpolate, main


def equal_bits(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and torch.equal(
            first[key].contiguous().flatten().view(torch.uint8),
            second[key].contiguous().flatten().view(torch.uint8),
        )
        for key in first
    )


@pytest.fixture
def refuse(capsys):
    """Run the tool in this process; it must fail with one line that contains all the words.

    Returns that line.
    """

    def run(*arguments, words):
        with pytest.raises(SystemExit) as stop:
            cli.run(Options, main, [str(argument) for argument in arguments])
        output, complaint = capsys.readouterr()
        assert (stop.value.code, output) == (2, "")
        assert complaint.startswith("error: ")
        assert complaint.count("\n") == 1
        assert all(word in complaint for word in words), complaint
        return complaint

    return run


@pytest.fixture
def pair(tmp_path):
    """Files of two networks that share one residual kernel."""
    files = []
    for seed, name in enumerate(("a.pth", "b.safetensors")):
        write_network(tmp_path / name, tiny_saved(seed, global_residual="bicubic"))
        files.append(tmp_path / name)
    return files


def test_several_alphas_write_several_files_to_the_bit_at_the_ends(tmp_path, pair):
    result = run_tool(
        "interpolate_weights",
        *pair,
        "--alpha",
        0,
        0.5,
        0.8,
        0.125,
        1,
        "-o",
        tmp_path / "out" / "mix.pth",
    )
    assert (result.returncode, result.stderr) == (0, "")
    a, b = (read_network(file) for file in pair)
    names = {0.0: "0.00", 0.5: "0.50", 0.8: "0.80", 0.125: "0.125", 1.0: "1.00"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"mix_a{name}.pth" for name in names.values()
    }
    for alpha, name in names.items():
        path = tmp_path / "out" / f"mix_a{name}.pth"
        found = read_network(path)
        assert str(path) in result.stdout
        assert (found.name, found.scale, found.params) == (a.name, a.scale, a.params)
        assert found.metadata["alpha"] == repr(alpha)
        assert found.metadata["a"].startswith("a.pth (sha256 ")
        assert found.metadata["b"].startswith("b.safetensors (sha256 ")
        assert torch.isfinite(found.build()(torch.rand(1, 3, 8, 8))).all()
        for key, tensor in found.state_dict.items():
            expected = (1 - alpha) * a.state_dict[key].double() + alpha * b.state_dict[key].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    for end, saved in (("0.00", a), ("1.00", b)):
        assert equal_bits(
            read_network(tmp_path / "out" / f"mix_a{end}.pth").state_dict, saved.state_dict
        )


def test_one_alpha_writes_the_file_as_named_and_never_over_another(tmp_path, pair, refuse):
    out = tmp_path / "mix.safetensors"
    assert run_tool("interpolate_weights", *pair, "--out", out).returncode == 0
    before = out.read_bytes()
    assert read_network(out).metadata["alpha"] == "0.8"
    refuse(*pair, "--out", out, "--alpha", 0.3, words=(str(out), "--force"))
    assert out.read_bytes() == before
    main(Options(*pair, out=out, alpha=(0.3,), force=True))
    assert read_network(out).metadata["alpha"] == "0.3"


def test_none_is_written_where_one_is_there(tmp_path, pair, refuse):
    (tmp_path / "mix_a0.50.pth").write_text("mine")
    refuse(
        *pair,
        "--alpha",
        0.2,
        0.5,
        "-o",
        tmp_path / "mix.pth",
        words=("mix_a0.50.pth already exists",),
    )
    assert not (tmp_path / "mix_a0.20.pth").exists()
    assert (tmp_path / "mix_a0.50.pth").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_and_the_dtype_is_kept(dtype):
    torch.manual_seed(0)
    a, b = ({"weight": torch.randn(1000).to(dtype)} for _ in range(2))
    blend = interpolate(a, b, 0.3)["weight"]
    assert blend.dtype == dtype
    exact = 0.7 * a["weight"].double() + 0.3 * b["weight"].double()
    roundings = 3 if dtype == torch.float32 else 1.001  # a half type is rounded once, at the end
    largest = roundings * torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7
    assert ((blend.double() - exact).abs() <= largest).all()


def test_the_ends_are_exact_even_where_arithmetic_is_not():
    a = {"weight": torch.tensor([-0.0, 1e-45, 1.0])}
    b = {"weight": torch.tensor([3.0, -2.0, 65504.0]).half()}
    assert equal_bits(interpolate(a, b, 0), a)
    assert equal_bits(interpolate(a, b, 1), b)
    assert interpolate(a, b, 0.5)["weight"].dtype == torch.float32


def test_what_both_have_stays_and_integers_come_from_the_nearer_one():
    third = torch.tensor([1 / 3, 0.1, -0.7])
    a = {"kernel": third, "num_batches_tracked": torch.tensor(10)}
    b = {"kernel": third.clone(), "num_batches_tracked": torch.tensor(99)}
    for alpha, count in ((0.1, 10), (0.49, 10), (0.51, 99), (0.9, 99)):
        blend = interpolate(a, b, alpha)
        assert torch.equal(blend["kernel"], third)
        assert blend["num_batches_tracked"] == count


def test_a_file_without_description_blends_with_a_described_one():
    described = SavedNetwork("vapsr", 2, dict(TINY), tiny_network(1).state_dict())
    recognised = SavedNetwork(
        "vapsr",
        2,
        {
            **TINY,
            "conv_groups": 1,
            "projection_kernel": 1,
            "upsampler_features": 56,
            "global_residual": "none",
        },
        tiny_network(2).state_dict(),
    )
    assert first_difference(described, recognised) == first_difference(recognised, described) == ""


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"scale": 3}, "vapsr x2 and vapsr x3"),
        ({"num_blocks": 3}, "num_blocks is 2 and 3"),
        ({"projection_kernel": 3}, "projection_kernel is 1 and 3"),
        ({"global_residual": "bicubic"}, "global_residual is 'none' and 'bicubic'"),
        ({"upsampler_features": 24}, r"tensor 'upsampler.0.bias' is \(56,\) and \(24,\)"),
    ],
)
def test_the_first_difference_is_named(tmp_path, refuse, change, difference):
    a, b = tiny_saved(1), tiny_saved(2, **change)
    assert re.search(difference, first_difference(a, b))
    for name, saved in (("a.pth", a), ("b.pth", b)):
        write_network(tmp_path / name, saved)
    complaint = refuse(
        tmp_path / "a.pth",
        tmp_path / "b.pth",
        "-o",
        tmp_path / "mix.pth",
        words=("are not the same network: ", "only weights of the same network"),
    )
    assert re.search(difference, complaint)
    assert not (tmp_path / "mix.pth").exists()


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({"colour_space": "oklab"}, {}, "colour_space is 'oklab' and 'rgb'"),
        ({}, {"colour_space": "y"}, "colour_space is 'rgb' and 'y'"),
    ],
)
def test_colour_spaces_are_not_blended(a, b, difference):
    networks = [tiny_saved(seed) for seed in (1, 2)]
    for network, params in zip(networks, (a, b), strict=True):
        network.params |= params
    assert first_difference(*networks) == difference


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({}, {}, ""),
        ({"norm": False}, {}, ""),
        ({"norm": True}, {}, "norm is True and False"),
        ({}, {"img_range": 1.0}, "img_range is 255.0 and 1.0"),
        ({"feature_channels": 48}, {}, ""),
        ({}, {"feature_channels": 12}, "feature_channels is 48 and 12"),
        ({}, {"arch": "PLKSR"}, "arch is 'SPAN' and 'PLKSR'"),
    ],
)
def test_parameters_of_spandrels_networks_are_compared(a, b, difference):
    networks = [SavedNetwork("spandrel", 2, {"arch": "SPAN", **params}, {}) for params in (a, b)]
    assert first_difference(*networks) == difference


def test_broken_weights_are_refused_by_name(tmp_path, pair, refuse):
    saved = tiny_saved(global_residual="bicubic")
    saved.state_dict["conv_body.bias"].fill_(float("nan"))
    write_network(tmp_path / "nan.pth", saved)
    refuse(
        pair[0],
        tmp_path / "nan.pth",
        "-o",
        tmp_path / "mix.pth",
        words=("nan.pth: ", "'conv_body.bias' contains NaN"),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--alpha", "1.5"), ("--alpha 1.5", "from 0 (A alone) to 1")),
        (("--alpha", "nan"), ("--alpha nan", "from 0")),
        (("--alpha", "0.5", "0.50"), ("--alpha 0.5 is given twice",)),
        (("--out", "mix.onnx"), ("mix.onnx", "must end in .pth or .safetensors")),
        (("--alhpa", "1"), ("unknown option --alhpa", "--alpha")),
    ],
)
def test_bad_options_are_one_line(tmp_path, refuse, arguments, words):
    out = () if "--out" in arguments else ("--out", tmp_path / "mix.pth")
    refuse("none.pth", "none.pth", *arguments, *out, words=words)


def test_help_teaches():
    text = " ".join(run_tool("interpolate_weights", "--help").stdout.split())
    for word in (
        "PSNR",
        "discriminator",
        "alpha 0 is exactly A and alpha 1 exactly B",
        "--force",
        "-o",
        "evaluate.py",
    ):
        assert word in text


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A small run with the checkpoints of steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    train(dataset, run_dir, "steps=6", "save_every=2", "keep=9", "validate_every=6")
    return run_dir


def test_the_search_is_the_greedy_soup(dataset, trained, tmp_path, capsys):
    out = tmp_path / "soup.pth"
    options = ("--search", trained, "--dataset-dir", dataset, "-o", out)
    with pytest.raises(SystemExit) as stop:
        cli.run(Options, main, [str(option) for option in options])
    printed, errors = capsys.readouterr()
    assert (stop.value.code, errors) == (0, "")
    found = read_network(out)
    judge = Judge(trained, (dataset,))
    with tqdm(disable=True) as bar:
        candidates, scores = {}, {}
        for step in (2, 4, 6):
            for kind, file in (("averaged", "generator_ema"), ("raw", "generator")):
                path = checkpoint_dir(trained, step) / f"{file}.safetensors"
                name = f"step {step}, {kind}"
                candidates[name] = read_network(path)
                scores[name] = judge.scores(candidates[name].build(), bar)["psnr_y"]
        # the recipe of the paper, with the mean over all members taken anew each time
        order = sorted(scores, key=lambda name: -scores[name])
        members, best = order[:1], scores[order[0]]
        for name in order[1:]:
            tried = [candidates[member].state_dict for member in [*members, name]]
            mean = {
                key: torch.stack([state[key].float() for state in tried]).mean(0)
                for key in tried[0]
            }
            network = SavedNetwork(found.name, found.scale, found.params, mean).build()
            if (score := judge.scores(network, bar)["psnr_y"]) >= best - 1e-6:
                members, best, soup = [*members, name], score, mean
    assert json.loads(found.metadata["ingredient_names"]) == members
    measured = json.loads(found.metadata["measured"])
    assert {name: one["psnr_y"] for name, one in measured.items()} == scores
    assert json.loads(found.metadata["validation"])["psnr_y"] == pytest.approx(best, abs=1e-4)
    for key, tensor in (soup if len(members) > 1 else candidates[members[0]].state_dict).items():
        torch.testing.assert_close(found.state_dict[key], tensor, rtol=1e-6, atol=1e-7)
    assert len(json.loads(found.metadata["ingredients"])) == len(members)
    assert f"->soup of {len(members)}" in printed
    assert "bicubic" in printed


def test_a_search_of_files_by_another_metric(dataset, trained, tmp_path):
    files = [checkpoint_dir(trained, step) / "generator_ema.safetensors" for step in (2, 6)]
    arguments = Options(
        out=tmp_path / "soup.safetensors",
        search=(*files,),
        run=trained,
        metric="ssim_y",
        dataset_dir=(dataset,),
    )
    assert main(arguments) == 0
    found = read_network(tmp_path / "soup.safetensors").metadata
    assert found["chosen_by"] == "highest SSIM-Y on the run's 3 validation images"
    measured = json.loads(found["measured"])
    assert set(measured) == {str(file) for file in files}
    assert json.loads(found["validation"])["ssim_y"] >= max(
        one["ssim_y"] for one in measured.values()
    )


def test_a_search_is_checked_before_it_starts(
    dataset, trained, tmp_path, pair, refuse, monkeypatch
):
    monkeypatch.setattr(Judge, "scores", None)  # nothing is measured
    soup = tmp_path / "soup.pth"
    run = ("--run", trained)
    write_network(tmp_path / "x4.pth", tiny_saved(1, scale=4))
    write_network(tmp_path / "y4.pth", tiny_saved(2, scale=4))
    (tmp_path / "half.pth").write_bytes(b"PK")
    for search, options, words in (
        ((*pair,), (), ("--run",)),
        ((pair[0],), run, ("at least two",)),
        ((pair[0], pair[0]), run, ("at least two different",)),
        ((trained, pair[0]), (), ("either one run folder",)),
        ((tmp_path,), (), (str(tmp_path), "no intact checkpoint")),
        ((*pair, tmp_path / "half.pth"), run, ("half.pth",)),
        ((pair[0], tmp_path / "x4.pth"), run, ("vapsr x2 and vapsr x4",)),
        ((tmp_path / "x4.pth", tmp_path / "y4.pth"), run, ("scale 2",)),
        ((trained,), ("--alpha", 0.5), ("--alpha 0.5 and --search",)),
        ((trained,), ("--metric", "psrn"), ("no metric 'psrn'", "psnr")),
        ((trained,), ("--metric", "lpips"), ("--metric lpips", "needs validation_lpips")),
        ((trained,), ("-o", tmp_path / "a.pth" / "soup.pth"), ("a.pth",)),
    ):
        out = () if "-o" in options else ("-o", soup)
        arguments = ("--search", *search, *options, "--dataset-dir", dataset, *out)
        refuse(*arguments, words=words)
    refuse(*pair, "--metric", "psnr", "-o", soup, words=("--metric is for --search",))
    refuse("-o", soup, words=("give two weights files",))
    assert not soup.exists()
