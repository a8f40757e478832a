import os
import subprocess
import sys
import time

from chainfed_engine.federation.processes import lives


def test_a_process_ends_soon_after_the_one_that_owns_it() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    program = "import sys, time; from chainfed_engine.federation.processes import end_with; end_with(int(sys.argv[1]))"
    owned = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print(flush=True); time.sleep(600)", str(owner.pid)], stdout=-1
    )
    try:
        assert owned.stdout is not None and owned.stdout.readline()
        time.sleep(1.0)
        assert owned.poll() is None and lives(owner.pid)
        owner.kill()
        owner.wait(10)
        assert owned.wait(20) == 1 and not lives(owner.pid)
        assert lives(os.getpid())
    finally:
        for process in (owner, owned):
            process.kill()
            process.wait(10)
        if owned.stdout is not None:
            owned.stdout.close()
