import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(f"no mini cluster: {reason}")
    # Not below pytest's folder: munged wants every folder above its socket to be open to all.
    root = Path(tempfile.mkdtemp(prefix="rapo-slurm-"))
    root.chmod(0o755)
    cluster = Cluster(root)
    try:
        cluster("up", timeout=300)
        yield cluster
    finally:
        cluster("down")
        shutil.rmtree(root, ignore_errors=True)
