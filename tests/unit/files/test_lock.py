"""A folder has one process at work in it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from sprat.files import lock


def test_a_second_process_in_the_folder_is_told_who_is_at_work(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys
        from sprat.errors import MachineError
        from sprat.files import lock
        try:
            with lock.lock_folder(sys.argv[1]):
                print("free")
        except MachineError as error:
            print(error)
    """)

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        return done.stdout

    with lock.lock_folder(tmp_path):
        assert f"another sprat is at work in this folder (pid {os.getpid()})" in other()
    assert other() == "free\n"
