"""Logging to Weights & Biases: the same numbers and images as in TensorBoard.

It never stops a run and never asks for input.
"""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipeline.checkpoint.random_states import random_states, restore_random_states
from pipeline.cli import UserError
from pipeline.files import short_path

WANDB_DIR = "wandb"
ID_FILE = "run_id"
INIT_SECONDS, FINISH_SECONDS, REACH_SECONDS = 30, 60, 5


def require_wandb() -> None:
    """Raise `UserError` if the package wandb is missing."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--wandb needs the package wandb ({error}); run `pip install wandb` in this "
            "environment, or omit --wandb"
        ) from None


class WandbTracker:
    """A W&B run, kept when training continues: its id is stored in `log_dir`/wandb/.

    Offline if WANDB_MODE says so, there is no key, or the server does not answer; then everything
    is stored in `log_dir`/wandb/ and can be sent later. Any error is a warning, once, and training
    continues.
    """

    def __init__(
        self,
        log_dir: Path,
        project: str,
        name: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn, self._project = warn, project
        self._run: Any = None
        self._mode, self._why = "offline", ""
        self._folder = log_dir / WANDB_DIR
        states = random_states()
        with self._warn_on_error():
            import wandb

            wandb.setup(wandb.Settings(silent=True))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._mode, self._why = _mode()
            try:
                self._start(name, config)
            except Exception as error:  # wandb raises many types, also for bad server replies
                if self._mode != "online":
                    raise
                self._mode = "offline"
                self._why = f"wandb could not start online: {_short(error)}"
                wandb.teardown()  # otherwise wandb would consider the id to be in use
                self._start(name, config)
        restore_random_states(states)

    def _start(self, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self._run = wandb.init(
            project=self._project,
            name=name,
            id=_run_id(self._folder / ID_FILE),
            resume="allow" if self._mode == "online" else None,
            dir=str(self._folder.parent),
            mode=self._mode,
            config=dict(config),
            settings=settings,
            reinit="create_new",
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @property
    def introduction(self) -> str:
        """A line that says where the logs go."""
        if self._run is None:
            return "W&B: not used"
        if self._mode != "online":
            return f"W&B: {short_path(self._folder)} ({self._why})"
        return f"W&B: {self._run.url}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag at `step`, which W&B uses as the x axis instead of its own counter."""
        self._log(step, values)

    def picture(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Log an image: uint8 (height, width, 3)."""
        self._log(step, lambda wandb: {tag: wandb.Image(np.ascontiguousarray(pixels))})

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Log a histogram with 64 bins."""
        self._log(
            step, lambda wandb: {tag: wandb.Histogram(np_histogram=np.histogram(values, bins=64))}
        )

    def finish(self) -> None:
        """Send what is left, within about a minute, and say how to send what could not be sent."""
        if self._run is None:
            return
        run, self._run = self._run, None
        folder = Path(run.settings.sync_dir)
        ended = threading.Event()

        def end() -> None:
            with self._warn_on_error():
                run.finish()
                ended.set()

        # A thread with a time limit, because wandb's own limit does not apply where it hangs.
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS + 10)
        if self._mode == "offline":
            self._warn(
                f"W&B: not sent yet; send it with `wandb login` and `wandb sync "
                f"{short_path(folder)}`"
            )
        elif self._mode == "online" and not ended.is_set():
            self._warn(
                "warning: W&B: not everything was sent in time; send the rest with `wandb sync "
                f"{short_path(folder)}`"
            )

    def _log(
        self, step: int, values: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
    ) -> None:
        if self._run is None:
            return
        with self._warn_on_error():
            import wandb

            self._run.log({"step": step, **(values(wandb) if callable(values) else values)})

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any error of W&B's
            self._run = None
            self._warn(f"warning: W&B: {_short(error)}; training continues without it")


def _mode() -> tuple[str, str]:
    """Return the mode (online, offline or disabled) and why it is not online."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun", "disabled"):
        return ("disabled" if asked == "disabled" else "offline"), f"WANDB_MODE={asked}"
    base = os.environ.get("WANDB_BASE_URL") or _base_url()
    if not _has_key(base):
        return "offline", f"no key for {base}; set one with `wandb login` or WANDB_API_KEY"
    address = urlsplit(base)
    try:
        socket.create_connection(
            (address.hostname or "", address.port or (443 if address.scheme == "https" else 80)),
            timeout=REACH_SECONDS,
        ).close()
    except OSError as error:
        if not any(
            os.environ.get(name)
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        ):
            return "offline", f"{base} cannot be reached: {error.strerror or error}"
    return "online", ""


def _base_url() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)  # includes what `wandb login --host` stored


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(
                urlsplit(base_url).hostname or ""
            ):
                return True
    return False


def _run_id(path: Path) -> str:
    """Return this run's W&B id, which is made at its first start."""
    if path.is_file():
        return path.read_text().strip()
    new = secrets.token_hex(4)
    path.write_text(new + "\n")
    return new


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
