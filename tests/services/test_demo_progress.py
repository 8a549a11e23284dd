"""What the demo prints while it runs."""

from __future__ import annotations

import io
from typing import cast

from rich.console import Console

from services.demo.progress import Progress
from services.status import Collector


def test_a_line_is_printed_with_the_names_in_its_brackets() -> None:
    printed = io.StringIO()
    collector = cast(Collector, None)  # asked for pictures only
    Progress(collector, Console(file=printed, width=40)).say("pip install 'exfm[gpu]' for the teacher's kernels")
    assert printed.getvalue() == "pip install 'exfm[gpu]' for the teacher's kernels\n"
