import os
import sys
from pathlib import Path

# Several ranks share few cores in these tests; threads inside each only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
