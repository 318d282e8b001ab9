"""Says things to a terminal or a file that may be slow, stopped or full, without ever waiting for it."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from typing import IO

MOST_WAITING = 10_000  # texts; what comes on top of them is lost


class Speaker:
    """Texts for several streams, written by a thread of its own in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[IO[str], str]] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def say(self, stream: IO[str], text: str) -> None:
        """Write `text`, later. Where nobody reads the stream any more (CTRL+S, `| less`), it waits, or is lost."""
        with suppress(queue.Full):
            self._waiting.put_nowait((stream, text))

    def finish(self, seconds: float) -> None:
        """Return when all is written, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            stream, text = self._waiting.get()
            with suppress(Exception):  # a full disk, a closed terminal: the job is not to end of it
                stream.write(text)
                stream.flush()
            self._waiting.task_done()
