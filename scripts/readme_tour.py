"""Keep the README's tour true: `python scripts/readme_tour.py` runs its commands and writes down what they print.

The commands are the `console` blocks between `<!-- tour: begin ... -->` and `<!-- tour: end -->`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
TOUR = re.compile(r"(?<=^<!-- tour: begin).*?(?=^<!-- tour: end -->$)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```console\n\$ (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL)


def fresh(page: str) -> str:
    """Return the page with the output of every command of the tour as it is now."""
    return TOUR.sub(lambda tour: BLOCK.sub(_block, tour[0]), page)


def _block(found: re.Match[str]) -> str:
    program, *arguments = shlex.split(found["command"].replace("\\\n", " "))
    module = {"gatekeeper": "gatekeeper", "moe-loader": "loader"}[program]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return f"```console\n$ {found['command']}\n{done.stdout.rstrip()}\n```"


if __name__ == "__main__":
    PAGE.write_text(fresh(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
