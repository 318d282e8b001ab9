"""Test whether every host can open a TCP connection to the first.

This file is sent to every host as source, so it uses only the standard library. The first host
listens on all its addresses and the others try each of them. A token distinguishes the first host
from another one with the same address (every docker bridge is 172.17.0.1) and from another program
on the port.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from typing import Any

TRY_SECONDS = 1.5  # for one connection
LINGER_SECONDS = 0.5  # for the other addresses, once one has answered
RETRY_SECONDS = 0.1


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Run this host's part of the test.

    The first host returns {"busy": [port, ...]}, the others {"reached": {address: (own address,
    time)}, "refused": {address: why}}.
    """
    deadline = time.monotonic() + task["seconds"]
    return _listen(task, deadline) if task["is_first"] else _connect(task, deadline)


def _listen(task: dict[str, Any], deadline: float) -> dict[str, Any]:
    selector, busy = selectors.DefaultSelector(), []
    for port in task["ports"]:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(256)
            selector.register(listener, selectors.EVENT_READ)
        except OSError:
            listener.close()
            busy.append(port)
    heard, ends = set(), deadline
    while time.monotonic() < ends:
        for key, _ in selector.select(0.1):
            heard.add(_greet(key.fileobj, task["token"]))
        if len(heard - {""}) == task["others"]:
            ends = min(ends, time.monotonic() + LINGER_SECONDS + 0.2)
            task["others"] = -1  # all have connected: only the shortened deadline counts now
    return {"busy": busy}


def _greet(listener: socket.socket, token: str) -> str:
    """Accept a connection; return the name of the host that made it, or "" for a stranger."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return ""
    with contextlib.closing(connection):
        connection.settimeout(TRY_SECONDS)
        try:
            said, _, name = connection.recv(512).decode("utf-8", "replace").partition(" ")
            if said != token:
                return ""
            connection.sendall(token.encode())
            return name
        except OSError:
            return ""


def _connect(task: dict[str, Any], deadline: float) -> dict[str, Any]:
    found: dict[str, Any] = {"reached": {}, "refused": {}}
    threads = [
        threading.Thread(target=_try, args=(task, address, deadline, found), daemon=True)
        for address in task["addresses"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _try(task: dict[str, Any], address: str, deadline: float, found: dict[str, Any]) -> None:
    """Try `address` until it answers, or until shortly after another address has answered."""
    why = ""
    while time.monotonic() < deadline:
        moments = [moment for _, moment in list(found["reached"].values())]
        if moments and time.monotonic() > min(moments) + LINGER_SECONDS:
            break
        for port in task["ports"]:
            own, why = _ask(address, port, task)
            if own:
                found["reached"][address] = (own, time.monotonic())
                return
        time.sleep(RETRY_SECONDS)
    found["refused"][address] = why


def _ask(address: str, port: int, task: dict[str, Any]) -> tuple[str, str]:
    """Connect once; return (own address of the connection, "") or ("", why it failed)."""
    try:
        source = (task["source"], 0) if task["source"] else None
        with contextlib.closing(
            socket.create_connection((address, port), TRY_SECONDS, source)
        ) as connection:
            connection.sendall(f"{task['token']} {task['name']}".encode())
            if connection.recv(512).decode("utf-8", "replace") == task["token"]:
                return connection.getsockname()[0], ""
            return "", "another program or another machine answers there"
    except OSError as error:
        return "", "timed out" if isinstance(error, socket.timeout) else (
            error.strerror or str(error)
        )
