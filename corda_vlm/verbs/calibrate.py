"""The verb calibrate: covariances of what a model's layers see of the knowledge."""

from __future__ import annotations

from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions, SiteOptions
from corda_vlm.options import as_keywords
from corda_vlm.verbs.shared import Data, load_source, modified, say_next


def calibrate(
    model: str,
    data: Data,
    output: str = "covariance.safetensors",
    *,
    options: CalibrationOptions,
    load: LoadOptions,
) -> None:
    """Collect the second moments of the layers' inputs over data; resumes when interrupted.

    Example:
        corda-vlm calibrate emoji-clip folder:photos --samples 256 --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        data: Images, texts or both, e.g. folder:photos, or a mapping like '{source: "parquet:x.parquet", split: train}'; for
            a model that generates text with a format:, e.g. llava, chat, qa, alpaca or text.
        output: The file to write, and to go on from.
    """
    checks.check_source(model)
    checks.check_data(data)
    checks.check_output(output)
    from corda_vlm.covariance.memory import memory_of
    from corda_vlm.experiment import steps
    from corda_vlm.sites import find_sites

    records, loaded = steps.load_data(data), load_source(model, load)
    before = modified(output)
    sites = find_sites(loaded.model, **as_keywords(options, SiteOptions))
    told = memory_of(loaded.model, sites, rounds=options.rounds, precision=options.precision)
    print(told, flush=True)
    store = steps.calibrate(loaded, records, output, options)
    print(store.summary())
    done = f"{output} was complete before" if before == modified(output) else f"wrote {output}"
    say_next(done, "plan", model, "--covariance", output, "--output", "plan.json")
