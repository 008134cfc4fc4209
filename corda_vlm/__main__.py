"""The console script: the verb that a command names is called, and what goes wrong ends in words and with a status."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from corda_vlm.command_line import call
from corda_vlm.distributed.launch import check_processes, in_processes, launched, say_error
from corda_vlm.errors import CordaError
from corda_vlm.plugins import of_command, without_plugins
from corda_vlm.progress import Meter, be_quiet
from corda_vlm.verbs import VERBS

_ABOUT = (
    "Fine-tune vision-language models without losing what they know. Each verb reads the file that the one before it \
wrote, and refuses one made from another model or other data; calibrate, gradient, train and run go on from where they were \
stopped. Every verb takes --quiet: results, warnings and errors alone, no progress; and --plugin FILE.py, which runs a file of yours first, e.g. to \
register a method. What takes long tells how far it is every half minute where the standard error is a file, and \
TQDM_DISABLE=1 turns that off."
)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a person reads it, without the line of source that raised it."""
    print(f"corda-vlm: warning: {message}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Wrong input ends with its message and status 2, Ctrl-C with status 130."""
    given = list(sys.argv[1:] if args is None else args)
    quiet = "--quiet" in given
    be_quiet(quiet or launched()[0] > 0)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("corda_vlm").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet or not sys.stderr.isatty():  # bars of others: a log wants lines
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    try:
        with Meter(" ".join(["corda-vlm", *given[:1]]), bar=False):
            words, plugins = without_plugins([word for word in given if word != "--quiet"])
            check_processes(words)
            with in_processes(), of_command(plugins):
                call(VERBS, words, _ABOUT)
    except CordaError as error:
        if not error.is_relayed:
            say_error(error)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who reads it has read enough, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (
        OSError,
        MemoryError,
    ) as error:  # the machine's own no: a folder without permission, a bad disk
        reason = getattr(error, "strerror", None) or str(error) or "there is not enough memory"
        about = getattr(error, "filename", None)
        say_error(f"{reason[:1000]}" + (f": {about!s:.500}" if about else ""))
        raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped or 'stopped; run the same command again to go on'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
