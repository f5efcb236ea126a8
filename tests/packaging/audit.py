"""Ask pip-audit about the pinned versions, and tell "nothing is known" from "nobody answered".

    python tests/packaging/audit.py [options of pip-audit]

Exit code 0: nothing known; 1: weaknesses, listed; 2: the service did not answer, so nothing is known either way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
TOOL = Path(sys.executable).with_name("pip-audit")


def main() -> None:
    line = [str(TOOL), "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*line, *sys.argv[1:]], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        not_audited((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
    weak = [(package, found) for package in packages for found in package.get("vulns", [])]
    for package, found in weak:
        fixed = ", ".join(found["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    skipped = [package["skip_reason"] for package in packages if "skip_reason" in package]
    print(f"{len(packages)} packages, {len(packages) - len(skipped)} of them audited, {len(weak)} known weaknesses.")
    if weak:
        sys.exit(1)
    if skipped:
        not_audited(f"it knows nothing of {len(skipped)} packages: {skipped[0]}")


def not_audited(reason: str) -> NoReturn:
    print(
        f"Not audited in full, which is neither clean nor weak: the vulnerability service gave no answer ({reason}); "
        'ask the other one (`make audit`, `make audit ARGS="-s osv"`), or scan what `make sbom` writes.',
        file=sys.stderr,
    )
    sys.exit(2)


if __name__ == "__main__":
    main()
