"""Export and deploy long-history recommenders (STCA): one operator, a reusable user state, parity at each step."""

import os

# ONNX Runtime reads this when it is loaded: without it, a serving process writes files and looks up a host of others.
# Set it to 0 to have its telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

# Some rooms lie at the top of the repository, and links stand for them here. A copy without links finds them there:
# a source distribution, a zip unpacked by Python, a clone with core.symlinks=false.
_HERE = os.path.dirname(os.path.abspath(__file__))
_TOP = os.path.dirname(os.path.dirname(_HERE))
if not os.path.isdir(os.path.join(_HERE, "runtime")) and os.path.isfile(os.path.join(_TOP, "runtime", "session.py")):
    __path__.append(_TOP)
