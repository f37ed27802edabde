"""What must be set before any test module imports torch."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts set it: idle threads must not spin
