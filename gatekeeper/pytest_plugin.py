"""pytest collects ``*.table.yaml``: each row a test. Load with ``-p gatekeeper.pytest_plugin``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.errors import RuleError
from gatekeeper.load import load_rules, shipped_rules
from gatekeeper.log import quiet
from gatekeeper.rules import RuleSet
from gatekeeper.tables import SUFFIX, Row, read_table, run_row

_RULES = pytest.StashKey[RuleSet]()


def _rules(config: pytest.Config) -> RuleSet:
    """Return the rule set of this run, loaded once."""
    if _RULES not in config.stash:
        folder = config.getoption("--gatekeeper-rules")
        config.stash[_RULES] = load_rules(folder) if folder else shipped_rules()
    return config.stash[_RULES]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gatekeeper-rules DIR``."""
    parser.addoption("--gatekeeper-rules", metavar="DIR", help="rule set that tables are run against")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a table."""
    if file_path.name.endswith(SUFFIX):
        table: pytest.Collector = TableFile.from_parent(parent, path=file_path)
        return table
    return None


class TableFile(pytest.File):
    """One table."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test for each row."""
        try:
            rows = read_table(self.path)
        except RuleError as error:
            raise self.CollectError(str(error)) from None
        for row in rows:
            yield RowTest.from_parent(self, name=row.name, row=row)


class RowTest(pytest.Item):
    """One row of a table."""

    def __init__(self, *, row: Row, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.row = row

    def runtest(self) -> None:
        """Decide the row and compare."""
        try:
            rules = _rules(self.config)
        except RuleError as error:
            raise RowFailed(str(error)) from None
        with quiet():
            result = run_row(rules, self.row)
        if not result.passed:
            raise RowFailed("\n".join(result.lines))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Say what differs, without a traceback."""
        if isinstance(excinfo.value, RowFailed):
            return f"{self.row.where}: {self.row.name}\n{excinfo.value}"
        return str(super().repr_failure(excinfo, style))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Point at the row."""
        return self.path, self.row.where.line - 1, self.name


class RowFailed(Exception):
    """A row whose decision is not the expected one."""
