"""Drawing: each module is one picture, but for `style` and `labels`, which they share. Of the package, only this imports
matplotlib.

Raises:
    CordaError: on import, where matplotlib is not installed.
"""

from corda_vlm.extras import require

require("matplotlib", "report", "drawing the pictures of a report")
