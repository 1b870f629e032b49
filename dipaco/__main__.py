"""Entry of `dipaco`: looks for shadowed packages, runs the command, turns a person's mistake into one sentence."""

from __future__ import annotations

import sys

from dipaco import ending, shadows


def main() -> None:
    """Run the command line and exit with one of the codes of `dipaco.ending`."""
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
