"""The one door to Weights & Biases: the same numbers and pictures as in TensorBoard. It never stops
a run nor asks."""

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
    """Raise `UserError` where the package is missing."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--wandb needs the package wandb ({error}); `pip install wandb` into this "
            "environment, or "
            "leave --wandb out"
        ) from None


class WandbTracker:
    """A W&B run, the same one whenever this run is continued: its id is kept in `log_dir`/wandb/.

    Offline where WANDB_MODE says so, there is no key, or the server does not answer; then
    everything lies in `log_dir`/wandb/ and can be sent later. Whatever goes wrong is a warning,
    once, and the training goes on.
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
        with self._unstoppable():
            import wandb

            wandb.setup(wandb.Settings(silent=True))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._mode, self._why = _mode()
            try:
                self._start(name, config)
            except (
                Exception
            ) as error:  # wandb raises many kinds; a server that answers badly must not stop a run
                if self._mode != "online":
                    raise
                self._mode = "offline"
                self._why = f"wandb could not start online: {_short(error)}"
                wandb.teardown()  # or it would hold the id to be in use
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
        """One line: where what is logged goes."""
        if self._run is None:
            return "W&B: not used"
        if self._mode != "online":
            return f"W&B: {short_path(self._folder)} ({self._why})"
        return f"W&B: {self._run.url}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their tags, at a step. W&B draws them over `step`; its own count of calls
        means nothing."""
        self._log(step, values)

    def picture(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """HWC bytes."""
        self._log(step, lambda wandb: {tag: wandb.Image(np.ascontiguousarray(pixels))})

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """How values are spread, in 64 bins."""
        self._log(
            step, lambda wandb: {tag: wandb.Histogram(np_histogram=np.histogram(values, bins=64))}
        )

    def finish(self) -> None:
        """Send what is left, for a minute at most, and say how to send what could not be sent."""
        if self._run is None:
            return
        run, self._run = self._run, None
        folder = Path(run.settings.sync_dir)
        ended = threading.Event()

        def end() -> None:
            with self._unstoppable():
                run.finish()
                ended.set()

        thread = threading.Thread(
            target=end, daemon=True
        )  # wandb's own time limit does not bind where it hangs
        thread.start()
        thread.join(FINISH_SECONDS + 10)
        if self._mode == "offline":
            self._warn(
                f"W&B: this is not sent yet; `wandb login` and `wandb sync {short_path(folder)}` "
                "send it"
            )
        elif self._mode == "online" and not ended.is_set():
            self._warn(
                f"warning: W&B: not all could be sent in time; `wandb sync {short_path(folder)}` "
                "sends the rest"
            )

    def _log(
        self, step: int, values: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
    ) -> None:
        if self._run is None:
            return
        with self._unstoppable():
            import wandb

            self._run.log({"step": step, **(values(wandb) if callable(values) else values)})

    @contextmanager
    def _unstoppable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, it is W&B's
            self._run = None
            self._warn(f"warning: W&B: {_short(error)}; training goes on without it")


def _mode() -> tuple[str, str]:
    """(online, offline or disabled; why it is not online)."""
    said = os.environ.get("WANDB_MODE", "").lower()
    if said in ("offline", "dryrun", "disabled"):
        return ("disabled" if said == "disabled" else "offline"), f"WANDB_MODE={said}"
    base = os.environ.get("WANDB_BASE_URL") or _base_url()
    if not _has_key(base):
        return "offline", f"no key for {base}; `wandb login` or WANDB_API_KEY gives one"
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

    return str(wandb.setup().settings.base_url)  # with what `wandb login --host` wrote down


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
    """The id that this run has had from its first start on."""
    if path.is_file():
        return path.read_text().strip()
    new = secrets.token_hex(4)
    path.write_text(new + "\n")
    return new


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
