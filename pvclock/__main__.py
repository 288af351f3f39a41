"""`python -m pvclock`."""

import sys

from pvclock.commands import main

sys.exit(main())
