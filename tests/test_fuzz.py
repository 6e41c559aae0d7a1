"""Whatever files say, what reads them refuses by our own errors; `python -m tests.fuzz` tries ten times as many."""

import pytest

from tests.fuzz import run
from tests.fuzz_readers import READERS

CASES = 50


@pytest.mark.parametrize("name", READERS)
def test_files_of_strangers_are_refused_by_our_own_errors(name: str) -> None:
    # a busy machine is slower than the command's 5 s stand for: here a hang is what never ends
    failures, refused = run(READERS[name], CASES, patience=30)
    assert not failures, "\n".join(map(str, failures[:3]))
    assert refused > CASES // 3, "most cases have something wrong"
