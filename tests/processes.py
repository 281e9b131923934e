"""Child processes of the tests."""

import signal
import subprocess

from example_project.servers import end_with_parent


class LoggedProcess(subprocess.Popen):
    """A child that writes its output into the file `log` and ends with its parent."""

    def __init__(self, command, log, **options):
        self.log = log
        with log.open("w") as output:
            super().__init__(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(signal.SIGKILL),
                **options,
            )
