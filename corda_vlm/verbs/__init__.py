"""The verbs of the command line: new, run, sites, calibrate, gradient, plan, train, evaluate, ask, export, import, report.

Each is a thin function over the classes of options: it refuses what can be told to be wrong before PyTorch is imported, calls
the library, and says what there is now. Each reads the file that the verb before it wrote, and refuses one made from
another model or other data.
"""

from __future__ import annotations

from corda_vlm.verbs.ask import ask
from corda_vlm.verbs.calibrate import calibrate
from corda_vlm.verbs.evaluate import evaluate
from corda_vlm.verbs.export import export
from corda_vlm.verbs.gradient import gradient
from corda_vlm.verbs.import_ import import_
from corda_vlm.verbs.new import new
from corda_vlm.verbs.plan import plan
from corda_vlm.verbs.report import report
from corda_vlm.verbs.run import run
from corda_vlm.verbs.sites import sites
from corda_vlm.verbs.train import train

VERBS = {
    verb.__name__.rstrip("_"): verb  # import is a word of Python's
    for verb in (
        *(new, run, sites, calibrate, gradient, plan, train),
        *(evaluate, ask, export, import_, report),
    )
}
VERBS["init"] = plan  # what it was called
