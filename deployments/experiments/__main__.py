"""`python -m deployments.experiments` is `pensieve experiment`."""

import sys

from deployments.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
