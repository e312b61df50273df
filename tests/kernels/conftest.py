import os
import sys
from pathlib import Path

# The folder's own helper, `aot`, is a script as well and belongs to no package.
sys.path.insert(0, str(Path(__file__).parent))
# Triton decides once and for all, when a kernel is decorated, whether it is interpreted: test_values.py starts a
# process for these.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
