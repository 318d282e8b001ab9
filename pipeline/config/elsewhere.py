"""Words of other training programs for keys and options of ours, for messages.

From the option files of BasicSR, traiNNer-redux and neosr, and the arguments of PyTorch Lightning
and Hugging Face's Trainer. Imports no torch.
"""

from __future__ import annotations

WORDS: dict[str, str] = {
    **dict.fromkeys(("batch", "batch_size", "train_batch_size"), "ds.train_batch_size"),
    **dict.fromkeys(
        ("batch_size_per_gpu", "train_micro_batch_size_per_gpu", "micro_batch_size"),
        "ds.train_micro_batch_size_per_gpu",
    ),
    **dict.fromkeys(
        ("accumulate", "accum_iter", "gradient_accumulation_steps"),
        "ds.gradient_accumulation_steps",
    ),
    **dict.fromkeys(("lr", "learning_rate"), "ds.optimizer.params.lr"),
    "betas": "ds.optimizer.params.betas",
    "weight_decay": "ds.optimizer.params.weight_decay",
    **dict.fromkeys(("optim_g", "optimizer"), "ds.optimizer.type"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "ds.scheduler.type"),
    **dict.fromkeys(("warmup", "warmup_iter", "warmup_steps"), "ds.scheduler.params"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "max_grad_norm"), "ds.gradient_clipping"),
    **dict.fromkeys(("bf16", "bfloat16", "use_amp", "amp"), "ds.bf16.enabled"),
    "fp16": "ds.fp16.enabled",
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "num_train_epochs"), "--max-epochs"),
    **dict.fromkeys(
        ("total_iter", "total_iters", "iters", "iterations", "max_steps", "niter"), "steps"
    ),
    **dict.fromkeys(
        ("workers", "num_workers", "num_worker_per_gpu", "dataloader_num_workers"), "data.threads"
    ),
    **dict.fromkeys(("gt_size", "hr_size", "patch_size", "crop_size"), "data.crop"),
    **dict.fromkeys(("use_hflip", "use_rot"), "data.augment"),
    "dataset_enlarge_ratio": "data.multiplier",
    **dict.fromkeys(("dataroot", "dataroot_gt", "data_dir"), "--dataset-dir"),
    "dataroot_lq": "--lr-dir",
    **dict.fromkeys(("val_freq", "eval_steps"), "validate_every"),
    **dict.fromkeys(("save_checkpoint_freq", "save_steps"), "save_every"),
    **dict.fromkeys(("print_freq", "logging_steps"), "log_every"),
    **dict.fromkeys(("network_g", "network", "model", "arch"), "generator.name"),
    "network_d": "adversarial.discriminator",
    **dict.fromkeys(("gan_opt", "gan_type"), "adversarial"),
    **dict.fromkeys(("pixel_opt", "perceptual_opt", "loss", "criterion"), "losses"),
    **dict.fromkeys(("manual_seed", "random_seed"), "seed"),
    "upscale": "scale",
    "ema": "ema_decay",
    **dict.fromkeys(("pretrain_network_g", "pretrain", "pretrained", "weights"), "--start"),
    **dict.fromkeys(("num_gpu", "num_gpus", "gpus"), "--procs"),
    **dict.fromkeys(("resume", "resume_state"), "--output-dir"),
}
"""A word elsewhere -> the key of a recipe, ds.KEY of DeepSpeed's file or option that does it."""


def ours(word: str) -> str:
    """Return `"; here it is ..."` for a word of another program; "" for any other word."""
    target = WORDS.get(word.lstrip("-").replace("-", "_").lower())
    if target is None:
        return ""
    return f"; here it is {target}" + ("" if target.startswith("--") else "=VALUE")
