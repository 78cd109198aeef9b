"""Ray clusters beside the tests, as somebody else's would be."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from processes import end

HEAD = """
import sys
import ray
from ray.scripts.scripts import main

ray.__version__ = sys.argv.pop(1)
sys.exit(main())
"""

MARK = "FEDMAESTRO_TEST_HEAD"


@contextmanager
def head_node(version: str = ray.__version__, **environment: str) -> Iterator[str]:
    """Start a Ray cluster of one CPU that calls itself ``version``; give its address, and end it."""
    mark = uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command = [sys.executable, "-c", HEAD, version, "start", *options, "--disable-usage-stats"]
    # Not in pytest's folder, whose path is too long for sockets.
    with tempfile.TemporaryDirectory(prefix="fm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, MARK: mark, **environment}
        head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not (Path(folder) / "ray" / "ray_current_cluster").exists():
                assert head.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            end(MARK, mark)
            head.wait(10)
