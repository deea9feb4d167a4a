"""Every block of code in README and docs runs, or says visibly why it does not."""

from __future__ import annotations

import contextlib
import doctest
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, blocks, name_of

CODE = [page for page in PAGES if any(blocks(page, "python"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", CODE, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, project: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            if not block.runs:
                continue
            if block.code.lstrip().startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(
                    block.code, project, block.name, str(page), block.line
                )
                assert doctest.DocTestRunner().run(test).failed == 0, block.name
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                exec(compile("\n" * block.line + block.code, str(page), "exec"), project)
            if block.printed is not None:
                assert out.getvalue() == block.printed, block.name


def test_few_blocks_do_not_run_and_each_says_why() -> None:
    still = [block for page in PAGES for block in blocks(page, "python") if not block.runs]
    assert [block.name for block in still if len(block.mark) < len("not run: x")] == []
    assert len(still) <= 6
