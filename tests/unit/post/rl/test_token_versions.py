"""A token may be of the weights that its group was dispatched with, or of newer ones that there are; of no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import TrustError
from tests.unit.post.rl.test_dispatcher import answer, blocked, groups, made, publish, sampled


@pytest.mark.parametrize("lying", [[2, 3], [3, 5]])
def test_tokens_of_weights_that_the_group_cannot_have_are_not_believed(tmp_path: Path, lying: list[int]) -> None:
    board = made(tmp_path, staleness=1)
    publish(board, 0)
    for step in (1, 2, 3):
        while (assignment := board.take("a", 9)) is not None and not blocked(board):
            answer(board, assignment)
        answer(board, assignment)  # type: ignore[arg-type]
        publish(board, step)
    assignment = board.take("a", 1)
    assert groups(assignment) == [12] and assignment is not None and assignment.version == 3  # of step 5, from 3 or 4
    lie = sampled(board, 12, "a", 3)
    lie.answers[0].versions[:] = lying
    with pytest.raises(TrustError, match="versions . to . of the weights sampled it, and 3 to 4 may have.*"):
        board.answered(lie)
    assert not board.pay_next(0) and board.in_flight == {12: "a"}
    board.answered(sampled(board, 12, "a", 4))
    assert board.pay_next(0)
