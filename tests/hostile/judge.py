"""A process that runs commands on hostile folders in forks of itself, each within hard limits, and says what they took.

Lines of JSON in, `[program, argument, ...]`; a line of JSON out for each. Forked, for a start of Python costs more than
all that is measured here; `python` is started all the same. The peak of a process counts what it was forked from, which
is why this one is small.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from typing import Any

from gatekeeper.load import shipped_rules

MEGABYTE = 1 << 20
MOST_MEGABYTES = 200
MOST_CPU_SECONDS = 20
"""Against hanging only; machines differ."""
MOST_WAIT_SECONDS = 120


def limit(megabytes: int) -> None:
    """Let this process end where it takes too much: memory of its own, processor time, or time spent waiting."""
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MEGABYTE,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS,) * 2)
    signal.alarm(MOST_WAIT_SECONDS)


def judged(arguments: list[str]) -> dict[str, Any]:
    """Run one command; its exit status (negative: the signal that ended it), output, peak megabytes, seconds."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            run(arguments)
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "output": output.read().decode(errors="backslashreplace"),
            "megabytes": usage.ru_maxrss / 1024,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }


def run(arguments: list[str]) -> None:
    """Be the command, and nothing after it."""
    code: Any = 70
    try:
        limit(MOST_MEGABYTES)
        program, *rest = arguments
        if program == "python":
            os.execv(sys.executable, [sys.executable, *rest])
        sys.argv = [program, *rest]
        if program == "moe-loader":
            from loader.cli import main
        else:
            from gatekeeper.cli import main
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001  # whatever it is, the test shows it
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    shipped_rules()
    for line in sys.stdin:
        print(json.dumps(judged(json.loads(line))), flush=True)
