"""Speed against the published algorithm, in ratios: `python -m benchmarks --json FILE`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter on stderr
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
