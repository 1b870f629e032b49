"""Entry of `dipaco`: looks for shadowed packages, runs the command, turns a person's mistake into one sentence."""

from __future__ import annotations

import os
import sys

from dipaco import ending, shadows


def main() -> None:
    """Run the command line and exit with one of the codes of `dipaco.ending`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read by gRPC when it is loaded; what fails is told in a sentence
    shadowed = shadows.find()
    if shadowed is not None:
        ending.say_wrong(shadowed)
        sys.exit(ending.WRONG)
    from dipaco.commands import app

    try:
        app(prog_name="dipaco")
    except KeyboardInterrupt:
        ending.say_wrong("interrupted")
        sys.exit(ending.INTERRUPTED)
    except Exception as error:
        sentence = ending.sentence(error)
        if sentence is None:
            raise
        ending.say_wrong(sentence)
        sys.exit(ending.WRONG)


if __name__ == "__main__":
    main()
