"""The rows of a check: what fails becomes one and the rest goes on; at the end a table, a JSON file, perhaps a log."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


class Findings:
    """Rows (check, value, unit, ok), written as JSON to `out`; `heading` goes above them and `clean` after each try."""

    def __init__(self, out: Path, heading: dict, clean: Callable[[], None]) -> None:
        """Write the file at once: a place that cannot be written is known now (OSError), not after three minutes."""
        from rich.console import Console

        self.out, self.heading, self.clean, self.rows = out, heading, clean, []
        self.console, self.began = Console(file=sys.stdout, soft_wrap=True), time.monotonic()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, check: str, value: float | str, unit: str = "", ok: bool = True) -> None:
        text = value if isinstance(value, str) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        self.rows.append({"check": check, "value": text, "unit": unit, "ok": bool(ok)})

    def attempt(self, check: str, work: Callable[[], None]) -> bool:
        """Whether `work` came to its end; if not, a row says so and the log has the traceback."""
        succeeded = False
        try:
            work()
            succeeded = True
        except Exception as error:  # noqa: BLE001  whatever fails is the finding
            self.add(check, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", ok=False)
            print(f"\n{check} failed:\n{traceback.format_exc()}", flush=True)  # stdout is the log
        self.clean()  # only now: the traceback held what the failed work had made
        return succeeded

    def part(self, work: Callable[[], None]) -> bool:
        """Attempt a whole part; its docstring is shown meanwhile. What it found is safe from a crash of the next."""
        with self.console.status(work.__doc__):
            succeeded = self.attempt(work.__name__.replace("_", " "), work)
        self.write()
        return succeeded

    def passed(self) -> bool:
        return bool(self.rows) and all(row["ok"] for row in self.rows)

    def write(self) -> None:
        seconds = round(time.monotonic() - self.began, 1)
        self.out.write_text(json.dumps({**self.heading, "rows": self.rows, "seconds": seconds}, indent=1) + "\n")

    @contextlib.contextmanager
    def told(self, title: str) -> Iterator[None]:
        """Whatever is printed meanwhile goes to a log, kept beside `out` if a row failed; then the table, always."""
        with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
            finished = False
            try:
                with contextlib.redirect_stdout(log):
                    yield
                finished = True
            finally:
                log.flush()
                self.write()
                self.print_table(title)
                places = [str(self.out)]
                if not (finished and self.passed()):
                    places.append(str(shutil.copyfile(log.name, self.out.with_suffix(".log"))))
                seconds = time.monotonic() - self.began
                self.console.print(f"{seconds:.1f} s; {', '.join(places)}", markup=False)

    def print_table(self, title: str) -> None:
        from rich.markup import escape
        from rich.table import Table

        table = Table("check", "value", "unit", "ok", title=escape(title))
        for row in self.rows:
            mark = "yes" if row["ok"] else "[bold red]NO[/]"
            table.add_row(escape(row["check"]), escape(row["value"]), row["unit"], mark)
        self.console.print(table)
