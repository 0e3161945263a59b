#!/usr/bin/env python3
"""Make or refresh .venv with the pinned packages; does nothing where it is up to date. `make` calls it first.

Kept to the standard library and to syntax that old Pythons read, so that one of them gets a sentence, not a traceback.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".ready"
PINNED_TORCH = "torch"  # the default of --torch: the release that constraints.txt pins
SYSTEM_TORCH = "system"  # use the torch that this Python already has
READ = ("pyproject.toml", "constraints.txt", "scripts/setup_venv.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch",
        default=PINNED_TORCH,
        help="a requirement (torch==2.11.0), a path or address of a wheel, or `system` for the one this Python has",
    )
    torch = parser.parse_args().torch.strip() or PINNED_TORCH
    if sys.version_info < (3, 11):
        fail("Python 3.11 or newer is needed, this is {}; try make PYTHON=python3.12".format(sys.version.split()[0]))

    os.chdir(str(ROOT))
    wanted = fingerprint(torch)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return
    make_venv(system_packages=torch == SYSTEM_TORCH)
    STAMP.unlink(missing_ok=True)  # whatever stops us from here on, the next run starts over
    install(torch)
    STAMP.write_text(wanted)


def fingerprint(torch):
    """Everything that decides what .venv holds, as one text."""
    digest = hashlib.sha256()
    for name in READ:
        digest.update((ROOT / name).read_bytes())
    wheel = Path(torch)
    if wheel.is_file():
        digest.update(str(wheel.stat().st_mtime_ns).encode())
    return "{}\n{}\n{}\n{}\n".format(digest.hexdigest(), torch, sys.version, ROOT)


def make_venv(system_packages):
    """Make .venv, or keep the one that is there and fits."""
    settings = VENV / "pyvenv.cfg"
    python = VENV / "bin" / "python"
    if settings.is_file() and runs(python):
        seen = "include-system-site-packages = true" in settings.read_text()
        if seen == system_packages:
            return
    if VENV.exists():
        shutil.rmtree(str(VENV))
    say("making .venv with {}".format(sys.executable))
    options = ["--system-site-packages"] if system_packages else []
    done = subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)])
    if done.returncode:
        fail("this Python can't make virtual environments; Debian and Ubuntu have that in the package python3-venv")
    if system_packages and sys.prefix != sys.base_prefix:
        # We run from an environment ourselves: "system" means its packages, which .venv would pass over.
        mine = sysconfig.get_path("purelib", vars={"base": str(VENV), "platbase": str(VENV)})
        (Path(mine) / "_system.pth").write_text(sysconfig.get_path("purelib") + "\n")


def runs(python):
    """True if `python` starts and is of the same minor version as we are."""
    try:
        done = subprocess.run(
            [str(python), "-c", "import sys, pip; print(sys.version_info[:2])"], stdout=subprocess.PIPE, text=True
        )
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == str(tuple(sys.version_info[:2]))


def install(torch):
    """Install torch first: what depends on it must find it there, else pip would pick a build by itself."""
    pins = VENV / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if torch == PINNED_TORCH:
        pins.write_text("\n".join(lines) + "\n")
    else:
        pins.write_text("\n".join(line for line in lines if not line.startswith("torch==")) + "\n")
    if torch == SYSTEM_TORCH:
        # What the system happens to have must not stand in for a pinned tool, whose program would then be missing here.
        say("installing the pinned packages beside the system's torch")
        pip("--ignore-installed", "--no-deps", "-r", str(pins))
    else:
        requirement = next(line for line in lines if line.startswith("torch==")) if torch == PINNED_TORCH else torch
        say("installing {}".format(requirement))
        pip("-c", str(pins), requirement)
    with pins.open("a") as file:
        file.write("torch=={}\n".format(torch_version()))
    say("installing model-gatekeeper and its tools")
    # hatchling comes first and pinned, so that building our own package downloads nothing of its own choice.
    pip("-c", str(pins), "hatchling", "editables")
    pip("-c", str(pins), "--no-build-isolation", "-e", ".[loader,dev]")


def torch_version():
    """The release in .venv; read from its metadata, for importing torch takes seconds."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([str(VENV / "bin" / "python"), "-c", code], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        fail("no torch in .venv; TORCH=system needs a torch that {} can import".format(sys.executable))
    return done.stdout.strip()


def pip(*arguments):
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command + list(arguments), stdin=subprocess.DEVNULL)
    if done.returncode:
        fail("pip could not install {}; its message is above".format(" ".join(arguments)))


def say(text):
    print("setup: " + text, file=sys.stderr, flush=True)


def fail(text):
    say(text)
    sys.exit(1)


if __name__ == "__main__":
    main()
