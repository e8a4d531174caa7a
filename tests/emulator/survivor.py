"""Why an edit of mutate.py that nothing catches changes nothing: the form of every SURVIVORS."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Survivor:
    """Edits that change nothing: of these kinds, at a source line (anywhere in the chain of inlined calls) with `at`."""

    kinds: str
    at: str
    because: str
    kernels: str = ""  # parts of names, any of them; empty: every kernel
    after: str = ""  # in one of the two lines before
