"""Install the wheel into a bare virtual environment and run the smoke test there.

    python tests/packaging/bare.py                                  # the versions of constraints.txt
    python tests/packaging/bare.py --lowest                         # every lower bound of pyproject.toml
    python tests/packaging/bare.py --pin transformers==5.24.0       # else the newest that pip finds
    python tests/packaging/bare.py --extras                         # only ask pip whether the extras resolve

TORCH_INDEX: where the CPU build of torch is, as in the Makefile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINES = ("vllm", "sglang")
"""They pin torch and more themselves, so each has an environment of its own."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def newest_wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("ctc_drafter-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit("There is no wheel in dist/; run `make wheel` first.")
    return wheels[-1]


def lower_bounds() -> dict[str, str]:
    """The oldest version of each direct dependency that pyproject.toml allows."""
    found = (re.fullmatch(r"([\w-]+)>=([\w.]+).*", line) for line in PROJECT["dependencies"])
    return {match[1]: match[2] for match in found if match}


def install(python: Path, pins: dict[str, str], constraints: Path | None) -> None:
    """torch goes first and alone, so that the extra index can bring nothing but torch."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    limits = ["-c", str(constraints)] if constraints else []
    index = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    torch = f"torch=={pins['torch']}" if "torch" in pins else "torch"
    extra = ["--extra-index-url", index] if index else []
    subprocess.run([*pip, *limits, "--retries", "1", "--no-deps", *extra, torch], check=True)
    others = [f"{name}=={version}" for name, version in pins.items() if name != "torch"]
    subprocess.run([*pip, *limits, str(newest_wheel()), *others], check=True)


def resolve_extras(python: Path, constraints: Path) -> None:
    """Raise unless pip finds versions for all extras at once, and for each other engine alone; installs nothing."""
    extras = list(PROJECT["optional-dependencies"])
    together = [name for name in extras if not name.startswith(ENGINES)]
    for names in [together, *([name] for name in extras if name not in together)]:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        limits = ["-c", str(constraints)] if names is together else []
        subprocess.run([*pip, *limits, f"{newest_wheel()}[{','.join(names)}]"], check=True)
        print(f"extras resolve: {', '.join(names)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pin", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--lowest", action="store_true", help="pin every direct dependency to its lower bound")
    parser.add_argument("--extras", action="store_true", help="resolve the extras and stop")
    options = parser.parse_args()
    pins = lower_bounds() if options.lowest else {}
    pins |= dict(pin.split("==", 1) for pin in options.pin)
    constraints = ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory(prefix="ctc-drafter-bare-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        if options.extras:
            resolve_extras(python, constraints)
            return
        install(python, pins, None if pins else constraints)
        # From another folder and without the caller's paths, so that only what is installed can be found.
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        smoke = Path(folder, "smoke.py")
        smoke.write_text((Path(__file__).with_name("smoke.py")).read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run([str(python), str(smoke)], cwd=folder, env=clean, check=True)


if __name__ == "__main__":
    main()
