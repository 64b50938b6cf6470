"""Looks the installed dependencies up in the database of known vulnerabilities, with pip-audit.

Fails where one has a vulnerability that another version fixes. Passes, and says so, where no database can be reached.
"""

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Prints what was found; the exit code."""
    program = str(Path(sys.executable).with_name("pip-audit"))
    command = [program, "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)  # noqa: S603
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        dependencies = []
    known = [entry for entry in dependencies if "vulns" in entry]
    if not known:
        print("audit: no database of vulnerabilities can be reached from here, nothing was looked up")
        return 0
    found = [(entry, vulnerability) for entry in known for vulnerability in entry["vulns"]]
    for entry, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        print(f"audit: {entry['name']} {entry['version']} has {vulnerability['id']}, fixed in {fixed}")
    print(f"audit: {len(known)} of {len(dependencies)} dependencies looked up, {len(found)} known vulnerabilities")
    return int(any(vulnerability["fix_versions"] for _, vulnerability in found))


if __name__ == "__main__":
    sys.exit(main())
