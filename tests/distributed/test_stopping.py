"""The agreement of all ranks on saving and stopping."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lives import in_ranks, start_in_ranks


def _requests_until_the_peer_is_gone() -> str:
    from pipeline.cli import RunError
    from pipeline.distributed.ranks import start_distributed
    from pipeline.distributed.stopping import Agreement, Request

    ranks = start_distributed()
    agreement = Agreement(ranks)
    agreement.exchange(Request())
    if ranks.rank == 1:
        os._exit(0)
    try:
        for _ in range(1000):
            agreement.exchange(Request())
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


def test_a_rank_that_is_gone_is_named_as_the_cause(tmp_path: Path) -> None:
    """In the words by which the supervisor looks for the cause elsewhere."""
    first, second = start_in_ranks(_requests_until_the_peer_is_gone, tmp_path, 2)
    for process in (second, first):
        process.join(60)
    assert (first.exitcode, second.exitcode) == (0, 0), (tmp_path / "0.output").read_text()
    told = json.loads((tmp_path / "0.json").read_text())
    assert told.startswith("RankLostError: another rank has ended or does not answer")


def _agreed() -> list[tuple[int, int]]:
    from pipeline.distributed.ranks import start_distributed
    from pipeline.distributed.stopping import Agreement, Request, RequestKind

    ranks = start_distributed()
    agreement = Agreement(ranks)
    own = [Request(), Request(RequestKind.SAVE), Request(RequestKind.STOP, 2 + 13 * ranks.rank)]
    found = [agreement.exchange(request if ranks.rank else Request()) for request in own[:2]]
    found += [agreement.exchange(own[2]), agreement.finish()]
    return [(int(kind), number) for kind, number in found]


def test_the_largest_request_of_all_ranks_is_agreed_on_one_step_late(tmp_path: Path) -> None:
    first, second = in_ranks(_agreed, tmp_path, 2)
    assert first == second == [[0, 0], [0, 0], [1, 0], [2, 15]]
