"""Folders damaged at random: an error of ours, or what the files really hold (`tests/support/fuzz`)."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"


def test_no_damage_of_a_folder_ends_in_anything_but_an_error_of_ours_or_what_the_files_hold():
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fuzz", "--cases", "500", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
