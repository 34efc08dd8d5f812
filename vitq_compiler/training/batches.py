"""Which batches are trained on and which are held back, and where tensors of them lie meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitq_compiler.pipeline import Compilation
from vitq_compiler.prefix import Store

HELD_BACK = 8  # one batch of so many is not trained on


def split(count: int, copies: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of those held back; what has ``copies`` is held back with all of them."""
    last = count // copies - 1
    held_back = [b for b in range(count) if b // copies % HELD_BACK == HELD_BACK - 1 or b // copies == last < HELD_BACK - 1]
    return [b for b in range(count) if b not in held_back], held_back


@contextmanager
def temporary_store(c: Compilation) -> Iterator[Store]:
    """A store that lasts for a while: in the work directory, where there is one."""
    with ExitStack() as stack:
        yield Store(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=c.work_dir))) if c.work_dir else None)
